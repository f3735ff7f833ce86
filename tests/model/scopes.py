"""The worlds that are walked in full, under the rules of production.

Depth is never bounded: every walk goes on until there is no new state. Three things are bounded:

- *Participants*: three. The rules look at branches one by one and at "all of them", never at how many there are.
- *Leader changes*: two, so that there is a leader that replaces one and is replaced itself. The ledger compares epochs
  and never counts them.
- *Transactions*: two where they can meet, which is in floors, in pruning and under one idempotency key. One that an
  application does itself meets a later one in the floor that its branch must not be below.

All of three participants and two changes is 3.4 million states, a good minute and 1.1 GB. `python -m tests.model` walks
that too, with the rest of `LARGE`; the tests walk `SCOPES`, where three participants see one change (142,400 states).
"""

from collections.abc import Mapping

from tests.model.world import Planned, Scope

_ONE_LEADERS_TWO = (Planned("m-1-1", (0,)), Planned("m-1-2", (0,)))
_TWO_LEADERS = (Planned("m-1-1", (0,)), Planned("m-2-1", (0,)))
_APPLICATION = (Planned("m-1-1", (0,), application=True),)
_APPLICATION_AT_TWO = (Planned("m-1-1", (0, 1), application=True),)
_APPLICATION_AND_A_STRAY = (Planned("m-1-1", (0,), application=True, strays=(1,)),)
_APPLICATION_THEN_ANOTHER = (Planned("m-1-1", (0,), application=True), Planned("m-1-2", (0,)))
_RETRIED = (Planned("m-1-1", (0, 1), "k"), Planned("m-2-1", (0, 1), "k"))

SCOPES: Mapping[str, Scope] = {
    "1 participant": Scope(1, 2),
    "1, unwritten refusals lost": Scope(1, 2, records_lost=True),
    "2 participants": Scope(2, 2),
    "2, unwritten refusals lost": Scope(2, 1, records_lost=True),
    "3 participants": Scope(3, 1),
    "2, a client's retry at the next leader": Scope(2, 1, _RETRIED),
    "1, two transactions, forgetting": Scope(1, 0, _ONE_LEADERS_TWO, forgetting=True, serial=True),
    "1, a transaction of each leader, forgetting": Scope(1, 1, _TWO_LEADERS, forgetting=True, serial=True),
    "2, forgetting": Scope(2, 2, forgetting=True, serial=True),
    "1, an application's own, forgetting": Scope(1, 2, _APPLICATION, forgetting=True, serial=True),
    "2, an application's own": Scope(2, 1, _APPLICATION_AT_TWO),
    "2, an application's own, forgetting": Scope(2, 1, _APPLICATION_AT_TWO, forgetting=True, serial=True),
    "2, an application's own with a stray": Scope(2, 1, _APPLICATION_AND_A_STRAY),
    "1, an application's own and another": Scope(1, 0, _APPLICATION_THEN_ANOTHER, serial=True),
    "1, with an operator, forgetting": Scope(1, 1, forgetting=True, serial=True, operator=True),
    "2, with an operator": Scope(2, 0, operator=True),
    "1, an application's own, with an operator": Scope(1, 0, _APPLICATION, forgetting=True, serial=True, operator=True),
}

LARGE: Mapping[str, Scope] = {
    "2, with an operator, a change": Scope(2, 1, operator=True),
    "2, with an operator, forgetting": Scope(2, 0, forgetting=True, serial=True, operator=True),
    "1, two transactions, a change, forgetting": Scope(1, 1, _ONE_LEADERS_TWO, forgetting=True, serial=True),
    "2, unwritten refusals lost, two changes": Scope(2, 2, records_lost=True),
    "3 participants, two changes": Scope(3, 2),
    "2, an application's own, two changes": Scope(2, 2, _APPLICATION_AT_TWO),
    "1, an application's own and another, forgetting": Scope(
        1, 0, _APPLICATION_THEN_ANOTHER, forgetting=True, serial=True
    ),
}
