"""Whole clusters in one process, under virtual time: a run is a function of its seed."""
