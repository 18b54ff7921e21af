"""What SmolVLA is made of: sizes, layers, a CPU's kernels, processors, lerobot's checkpoint format."""
