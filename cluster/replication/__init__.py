"""Moves bytes: a replicated log behind one small protocol (`log.py`), and its implementations.

Nothing in this package knows what a transaction is, and it imports nothing of ours.

| file | idea |
|---|---|
| `log.py` | what a replicated log promises |
| `raft.py` | the same, over pysyncobj: the only importer of it |
| `transport.py` | the wire between nodes |
| `memory.py` | the same promises in one process: tests and the unreplicated baseline |
| `clock.py` | where time comes from |
"""
