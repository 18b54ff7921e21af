"""Measures the instrument itself: speed, and the positive and negative control; `python -m bench`."""
