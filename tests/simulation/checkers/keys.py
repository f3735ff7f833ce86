"""Idempotency keys are linearizable: a key is a register that is written once.

Whatever comes first under a key names the transaction that all others are told of; another body is refused. Only when a
transaction has been forgotten, by an entry of the log, may its key name another one. And what was asked for without a
key, which clients do once, begins once: nodes repeat such a request among themselves.
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coordinator.protocol.entries import Begun, Forgotten, Opened, Reconciled
from tests.simulation.checkers.base import Checker

if TYPE_CHECKING:
    from coordinator.facts import Applied
    from coordinator.ledger import Ledger
    from tests.simulation.world import World


class Keys(Checker):
    name = "keys"

    def __init__(self) -> None:
        super().__init__()
        self._begun: dict[str, list[str]] = {}
        """What has begun under a key, in the order of the log."""
        self._seen: set[str] = set()
        self._requests: dict[str, str] = {}
        self._forgetting = False
        self._told: dict[str, tuple[str, Any]] = {}

    def applied(self, node: str, result: "Applied") -> None:
        entry = result.entry
        if isinstance(entry, Forgotten):
            self._forgetting = True
        if isinstance(entry, Reconciled) and entry.decision is None and result.verdict.name == "APPLIED":
            self._forget(lambda gid: gid != entry.gid)
        if not isinstance(entry, Begun | Opened) or result.verdict.name != "APPLIED" or entry.gid in self._seen:
            return
        self._seen.add(entry.gid)
        if isinstance(entry, Begun):
            request = json.loads(entry.branches[0].payload)["request"]
            asked = self._requests.setdefault(request, entry.gid)
            if asked != entry.gid and not self._forgetting:
                self.complain(f"{request} was asked for once, and began {asked} and {entry.gid}")
        if entry.key is None:
            return
        begun = self._begun.setdefault(entry.key, [])
        begun.append(entry.gid)
        if len(begun) > 1 and not self._forgetting:
            self.complain(f"{entry.key} names {begun}")

    def anew(self, world: "World", copy: "Ledger") -> None:
        self._forget(lambda gid: copy.get(gid) is not None)

    def _forget(self, kept: Callable[[str], bool]) -> None:
        """The others are forgotten, and so are their keys."""
        self._begun = {key: [gid for gid in gids if kept(gid)] for key, gids in self._begun.items()}
        self._requests = {request: gid for request, gid in self._requests.items() if kept(gid)}
        self._told = {key: told for key, told in self._told.items() if kept(told[0])}

    def named(self, client: str, key: str | None, gid: str, body: Any) -> None:
        if key is None:
            return
        known = self._told.setdefault(key, (gid, body))
        if known[0] != gid and not self._forgetting:
            self.complain(f"{client} was told that {key} names {gid}, and before that {known[0]}")
        elif known[0] == gid and known[1] != body:
            self.complain(f"{key} was used with two bodies, and both were told of {gid}")
