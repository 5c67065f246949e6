"""Sequence layers: one file each, found by file name."""
