"""Acknowledged means kept, and "nothing was done" means that nothing was."""

from typing import TYPE_CHECKING, Any

from coordinator.protocol.entries import Begun, Forgotten, Opened
from tests.simulation.checkers.base import Checker

if TYPE_CHECKING:
    from coordinator.facts import Applied
    from coordinator.ledger import Ledger
    from tests.simulation.world import World


class Acknowledged(Checker):
    """A transaction that a client was told of is there at the end, unless it was forgotten by an entry of the log."""

    name = "acknowledged"

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[str, str] = {}
        self._not_done: dict[str, str] = {}
        self._keys: dict[str, str] = {}
        self._floor = False

    def named(self, client: str, key: str | None, gid: str, body: Any) -> None:
        self._told.setdefault(gid, client)

    def refused(self, client: str, key: str) -> None:
        self._not_done[key] = client

    def missed(self, client: str, gid: str, status: int) -> None:
        if status == 404:
            self.complain(f"{client} was told of {gid} once, and now that there is no such transaction")
        elif not self._floor:
            self.complain(f"{client} was told that {gid} is forgotten, and nothing ever was")

    def anew(self, world: "World", copy: "Ledger") -> None:
        self._told = {gid: client for gid, client in self._told.items() if copy.get(gid) is not None}
        self._floor = True

    def applied(self, node: str, result: "Applied") -> None:
        entry = result.entry
        if isinstance(entry, Begun | Opened) and result.verdict.name == "APPLIED" and entry.key is not None:
            self._keys.setdefault(entry.key, entry.gid)
        self._floor = self._floor or isinstance(entry, Forgotten)

    def at_rest(self, world: "World") -> None:
        for name, node in sorted(world.nodes.items()):
            for gid, client in self._told.items():
                if node.ledger.get(gid) is None and node.ledger.knowledge(gid).name != "FORGOTTEN":
                    self.complain(f"{gid}, which {client} was told of, is not on {name}")
        for key, client in self._not_done.items():
            if key in self._keys:
                self.complain(f"{client} was told that nothing was done for {key}, and it began {self._keys[key]}")
