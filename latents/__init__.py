"""What is computed once from frames and kept: world latents and their encoders, the frozen tower's tokens."""
