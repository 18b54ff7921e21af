"""Reads run folders, without torch or a simulator: tables, statistics, figures, page; `python -m report`."""
