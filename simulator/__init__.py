"""LIBERO: environments, drawing, the scripted expert; `python -m simulator record|verify`."""
