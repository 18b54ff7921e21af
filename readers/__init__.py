"""Data sets on disk -> `Demos`: LIBERO's HDF5 and LeRobot's v3, the part that is read, and checks."""
