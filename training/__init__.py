"""What a run needs: its start, optimiser, run folder and checkpoints, held-out loss, diagnostics, FLOPs."""
