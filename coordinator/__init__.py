"""Decides transactions: the pure protocols, and the shell that drives them on a replicated log."""
