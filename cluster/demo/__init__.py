"""`outlast demo`: real processes, real crashes, and a verdict in measured numbers.

| file | idea |
|---|---|
| `stage.py` | the scenery: nodes, the shop's three services, a tap in front of each |
| `databases.py` | PostgreSQL and MariaDB servers, where the shop is to be on them |
| `load.py` | customers at a steady rate, and what each of them was told |
| `crash.py` | kill -9 at the worst moment: all branches prepared, the decision made and not delivered |
| `verdict.py` | what the databases hold against what customers were told |
| `show.py` | the play: two crashes with three nodes; then, for contrast, one with a single coordinator |
| `view.py` | what the audience sees |

Nothing in it is scripted output: the taps, the survivors' `/v1/cluster` and the databases are where numbers come from.
"""
