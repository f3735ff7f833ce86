"""What every checker hears, and how it complains."""

from typing import TYPE_CHECKING, Any

from participants.resource import State

if TYPE_CHECKING:
    from coordinator.facts import Applied
    from coordinator.ledger import Ledger
    from tests.simulation.bank import Bank
    from tests.simulation.faults import Disaster, Fault, Miss
    from tests.simulation.world import World


def witnessed(world: "World", copy: "Ledger", gid: str, outcome: str) -> bool:
    """Whether this outcome outlasts the cluster: the copy holds it, or a participant has carried it out.

    Others may be decided anew, for nobody is left who knows of them: what a client was told is no evidence.
    """
    txn = copy.get(gid)
    if txn is not None and txn.decision is not None:
        return True
    disks = [store.disk for store in world.stores.values()]
    if outcome == "committed":
        return any(key.gid == gid for disk in disks for key in disk["marks"])
    return any(
        key.gid == gid and branch.state is State.ABORTED for disk in disks for key, branch in disk["branches"].items()
    )


class Checker:
    """Hears of what happens, as it happens; `complain`s of what must not be. One property each."""

    name = ""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.now_s = 0.0

    def complain(self, what: str) -> None:
        if len(self.complaints) < 5:
            self.complaints.append(f"{self.name}: {what} (at {self.now_s:.3f})")

    # Raft.

    def appended(self, node: str, index: int, term: int, previous_term: int | None, command: bytes) -> None:
        """An entry is in the log of a node."""

    def applied_index(self, node: str, index: int, term: int, command: bytes, results: Any) -> None:
        """A node has applied an entry, which is committed therefore."""

    def leads(self, node: str, life: int, term: int, journal: Any) -> None:
        """A node has become leader."""

    # The ledger.

    def applied(self, node: str, result: "Applied") -> None:
        """An entry changed the ledger of a node, or did not."""

    def restored(self, node: str, ledger: Any) -> None:
        """A ledger is another one now: from a snapshot."""

    # What is said.

    def saw(self, gid: str, outcome: str, where: str) -> None:
        """`outcome` ("committed" or "aborted") was said of a transaction."""

    def named(self, client: str, key: str | None, gid: str, body: Any) -> None:
        """A client was told that this is its transaction."""

    def refused(self, client: str, key: str) -> None:
        """A client was told, in answer to all it ever sent under this key, that nothing was done."""

    def missed(self, client: str, gid: str, status: int) -> None:
        """A client was told that there is no such transaction (404), or no more (410)."""

    # Participants.

    def bank_changed(self, bank: "Bank") -> None:
        """A bank has handled messages."""

    # The world.

    def anew(self, world: "World", copy: "Ledger") -> None:
        """The cluster is lost, and begins again as the next generation, with what is in `copy`."""

    def starts(self, world: "World") -> None:
        """A world begins."""

    def injected(self, fault: "Fault", who: str, missed: "Miss | None") -> None:
        """A fault has hit `who`, or has missed them."""

    def struck(self, disaster: "Disaster", missed: "Miss | None") -> None:
        """All nodes are lost, or were to be and are not."""

    def look(self, world: "World") -> None:
        """Some time has passed."""

    def at_rest(self, world: "World") -> None:
        """All is healed, and everything has come to its end."""
