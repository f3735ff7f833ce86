"""`outlast chaos`: a cluster of its own under load, while everything that can fail does, and a verdict.

- `plan.py`: which faults happen when, all of it from a seed.
- `stage.py`: nodes, the shop's services on SQLite and PostgreSQL, and what they are joined by; `wires.py`
  (with `sockets.py`), `disks.py`, `node.py` are what makes links, disks and clocks fail without harm to the machine.
- `faults.py`: carries out the plan.
- `load.py`: clients; `application.py`: one that does transactions of its own, in `books.py`, and dies;
  `applications.py` follows it; `watch.py`: who looks on.
- `history.py`: what all of them write down, one JSON object a line.
- `checks/`: what must hold of a history, one property in each file. They know nothing else of a run.
- `run.py` puts it together; `report.py` draws it.
"""
