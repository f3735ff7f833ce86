"""Moves bytes: a replicated log behind one small protocol (`log.py`), and its implementations.

Nothing in this package knows what a transaction is, and it imports nothing of ours.

| file | idea |
|---|---|
| `log.py` | what a replicated log promises |
| `raft_log.py` | the same, over Raft: a node's life, turn by turn |
| `raft.py` | its replica of pysyncobj's: the only importer of it |
| `proposals.py` | proposals that have no answer yet |
| `membership.py` | how a node comes to count, by the rules of `standing.py` |
| `guard.py` | what stands between the wire and pysyncobj, so that nothing acknowledged is lost |
| `transport.py` | the wire between nodes |
| `holdback.py` | what must not be said before the disk holds it |
| `raft_journal.py` | the journal as pysyncobj sees it |
| `journal.py` | the durable journal; `segments.py`, `records.py`, `entries.py`, `disk.py`, `pump.py` are its parts |
| `snapshot.py` | the state as of one entry, on disk |
| `compaction.py` | when one is taken, and from where on the log is kept then |
| `catch_up.py` | a snapshot handed over to a node that is far behind |
| `prevote.py` | asking first: who campaigns deposes no healthy leader |
| `settings.py` | times and limits |
| `term.py` | term and vote of a node that is alone |
| `memory.py` | the same promises in one process, in memory: tests |
| `solo.py` | the same, on one disk: the unreplicated baseline |
| `clock.py` | where time comes from |
"""
