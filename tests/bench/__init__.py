"""Measurements. `make bench` prints them as a table; nothing here asserts a time."""
