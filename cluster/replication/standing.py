"""What a node's promises are worth: a voter's count, an empty node's do not until it has joined.

A node whose disk is lost comes back under its old name with an empty log. It has forgotten what it acknowledged and
how it voted. If it voted at once, it and one other could elect a leader that lacks what only the third holds. So each
node has a *standing*, in a file of its own (`standing`) that is durable before anything relies on it:

- `empty`, with a random nonce that names this emptiness: it does not vote, say yes to a poll, campaign, or take
  leadership over, and it acknowledges nothing. It says `progress` instead, which lets its leader send on, or catch it
  up by a snapshot, and counts for nothing.
- `voter`: all that Raft lets a node do. A folder that has a history (a term, or entries) and no such file is that of a
  voter with older software.

Each connection begins with a `standing` from both ends; an older peer says none, and counts as a voter with a history.

**Founding.** An empty node becomes a voter without further ado if *all* configured nodes are connected and have no
history, and each has said so in answer to this node's nonce, so after this node arrived. Where a quorum has ever
promised anything, at least one node of it still has its disk, unless more are lost than may be; it is asked, too, and
says that it has a history. So lost disks never found a cluster anew while the one that remembers is away. Who was
founded, and has promised nothing yet, still says "no history": a crash in the middle of founding is no dead end. A node
that was told to rejoin never founds, and counts as one with a history.

**Joining.** A leader that hears of an empty node appends `Joined(node, nonce)` to the log, and again every while, for
as long as the node is empty. A node that *applies* that entry with the nonce that it has now becomes a voter, once its
log up to there and its standing are durable. In the term in which it applies it, it votes for nobody.

*Why that is enough.* Let J be that node, old J what it was before, k the entry, and let J have learned that k is
committed from the leader L of term T: so a majority Q, each of them in term T, held an entry of term T at or after k. J
is not in Q, for it acknowledged nothing. Two majorities have a node in common; if one of them is Q, that node is not J,
and has forgotten nothing (or has joined before, and keeps the old promises as shown here). Every promise of old J was
made before k was proposed, because k carries a nonce that did not exist yet.

- *No leader of a term above T was elected before, or is elected without k.* A majority that elects it has a node M in
  common with Q. Had M voted first, it could not have held an entry in term T after that; so it held k, and votes only
  for who has it, too. In particular no one for whom old J voted in a term above T can win it: it asked for votes before
  k was there. Whatever J forgot about those terms, no harm comes of it.
- *In term T* old J may have voted for somebody who still asks. So J does not vote in the term in which it joins.
- *What old J acknowledged*, and was committed on the strength of it, is in J's log: an entry e of a term t was sent to
  old J by the leader of t. t is not above T (see above). So L has e in its log, as Raft's leaders have what was
  committed, by the same majorities. Logs that share an entry share all before it, and k was made when e was there, so e
  stands before k, and J has applied k.

If J ends before its standing is durable, it is empty as before, with the same nonce, and has promised nothing
meanwhile. A `Joined` of an earlier emptiness has another nonce.

In a cluster of three, Q is *both* others. In one of five a node may join while another is away.

**Who is known.** Each node remembers, beside its standing, whom it has met as a voter, and says so to who comes back
empty. A node that is empty, is known, and was not told to rejoin ends: perhaps a disk is not mounted. That is a
courtesy to operators, and nothing relies on it: joining is safe with it and without.
"""

import json
import zlib
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cluster.replication.disk import Disk, RealDisk
from cluster.replication.guard import Message
from cluster.replication.log import CannotStart
from cluster.replication.segments import SyncFailed

NONCE_BYTES: Final = 16
_NAME: Final = "standing"
_UNFINISHED: Final = "standing.new"
_FORMAT: Final = 1


class StandingRefused(CannotStart):
    """A node with this folder must not take part as it was started. Says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """What the file holds."""

    node: str
    """Whose folder it is."""
    voter: bool
    nonce: bytes = b""
    """Of an empty node."""
    rejoin: bool = False
    """An empty node was told that its disk is lost."""
    known: frozenset[str] = frozenset()
    """Whom it has met as a voter."""


def load(disk: Disk) -> Marker | None:
    """The standing in this folder; None: none was ever stored. Raises `StandingRefused`, OSError."""
    if _NAME not in disk.names():
        return None
    file = disk.open(_NAME)
    try:
        text = file.read(0, file.size())
    finally:
        file.close()
    try:
        stored = json.loads(text)
        kind, check, fields = stored["format"], stored["check"], stored["standing"]
        if check != _check(fields):
            raise ValueError("its checksum is wrong")
        if kind != _FORMAT:
            raise StandingRefused(f"{disk.where(_NAME)} is of format {kind}; this version reads {_FORMAT}")
        return Marker(
            node=fields["node"],
            voter=fields["voter"],
            nonce=bytes.fromhex(fields["nonce"]),
            rejoin=fields["rejoin"],
            known=frozenset(fields["known"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StandingRefused(
            f"{disk.where(_NAME)} is damaged ({error}): it is not known whether this node may vote. Move "
            f"{disk.where()} away, and start the node with --rejoin (docs/DISKS.md)"
        ) from error


def store(disk: Disk, marker: Marker) -> None:
    """Keep it; it is durable when this returns. Raises OSError (there is no room, say), `SyncFailed`."""
    fields = {
        "node": marker.node,
        "voter": marker.voter,
        "nonce": marker.nonce.hex(),
        "rejoin": marker.rejoin,
        "known": sorted(marker.known),
    }
    text = json.dumps({"format": _FORMAT, "standing": fields, "check": _check(fields)})
    file = disk.create(_UNFINISHED)
    try:
        file.write(0, text.encode())
        try:
            file.sync()
        except OSError as error:
            raise SyncFailed(f"a sync failed in {disk.where()}: {error}") from error
    finally:
        file.close()
    try:
        disk.rename(_UNFINISHED, _NAME)
        disk.sync_names()
    except OSError as error:
        raise SyncFailed(f"a rename failed in {disk.where()}: {error}") from error


def counts(folder: Path) -> bool:
    """Whether a node with this folder would start as a voter, as far as can be seen from outside."""
    if not any(folder.glob("*.segment")):
        return False
    try:
        found = load(RealDisk(folder))
    except StandingRefused:
        return True  # it will say so itself
    return found is None or found.voter


def _check(fields: object) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def at_start(disk: Disk, node: str, *, has_log: bool, has_history: bool, rejoin: bool, nonce: bytes) -> Marker:
    """The standing of a node that starts, stored if it is a new one. Raises `StandingRefused`, OSError, `SyncFailed`.

    has_log: whether the log has any entry at all; has_history: whether the node has had a term, or an entry but the
    first; rejoin: whether it was told that its disk is lost; nonce: for a new emptiness.
    """
    found = load(disk)
    if found is not None and found.node != node:
        raise StandingRefused(
            f"{disk.where()} is that of {found.node}, and this is {node}: it would break what {found.node} has "
            "promised. Put the right folder in place. Nothing was changed"
        )
    if found is not None and found.voter and not has_log:
        raise StandingRefused(
            f"{disk.where()} is that of a node that has voted, and its log is gone from there. Put it back; or if it "
            "is lost, move the folder away, and start the node with --rejoin (docs/DISKS.md). Nothing was changed"
        )
    if rejoin and has_history and found is not None and not found.voter:
        raise StandingRefused(
            f"this node has begun to rejoin already: {disk.where()} is not empty any more. Start it without --rejoin, "
            "and it goes on. Nothing was changed"
        )
    if rejoin and (has_history or (found is not None and found.voter)):
        raise StandingRefused(
            f"--rejoin is for a node whose disk is lost, and {disk.where()} is not empty. Start the node without it; "
            "or if what is there cannot be used, move the folder away first. Nothing was changed"
        )
    if found is None:
        found = (
            Marker(node=node, voter=True) if has_history else Marker(node=node, voter=False, nonce=nonce, rejoin=rejoin)
        )
    elif rejoin and not found.rejoin:
        found = replace(found, rejoin=True)
    else:
        return found
    store(disk, found)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heard:
    """What a peer has said of itself on this connection."""

    voter: bool
    nonce: bytes
    history: bool
    echo: bytes


class Standing:
    """One node's standing, and those of its peers as far as they have said. Does no I/O."""

    def __init__(self, node: str, peers: Iterable[str], marker: Marker) -> None:
        self._node = node
        self._peers = frozenset(peers)
        self.marker = marker
        """What is durable."""
        self.known = set(marker.known)
        """Whom it has met as a voter, durably so or not."""
        self._heard: dict[str, _Heard] = {}
        self._echoed: dict[str, bytes] = {}

    @property
    def is_voter(self) -> bool:
        """Whether its promises count."""
        return self.marker.voter

    def say(self, peer: str, *, history: bool) -> Message:
        """What to tell this peer of this node."""
        heard = self._heard.get(peer)
        self._echoed[peer] = echo = b"" if heard is None else heard.nonce
        return {
            "type": "standing",
            "voter": self.is_voter,
            "nonce": b"" if self.is_voter else self.marker.nonce,
            "history": history or self.marker.rejoin,
            "echo": echo,
            "knows": peer in self.known,
        }

    def hear(self, peer: str, message: Message) -> bool:
        """A peer's standing. Returns whether it waits for an answer."""
        self._heard[peer] = heard = _Heard(
            voter=message["voter"], nonce=message["nonce"], history=message["history"], echo=message["echo"]
        )
        if heard.voter:
            self.known.add(peer)
        return bool(heard.nonce) and self._echoed.get(peer) != heard.nonce

    def forget(self, peer: str) -> None:
        """The connection to this peer has gone."""
        self._heard.pop(peer, None)
        self._echoed.pop(peer, None)

    def is_refused_by(self, message: Message) -> bool:
        """Whether this node must end: a peer knows it as a voter, and it was not told to rejoin."""
        return not self.is_voter and not self.marker.rejoin and bool(message["knows"])

    def may_found(self, connected: AbstractSet[str], *, history: bool) -> bool:
        """Whether there never was anything that could have been forgotten."""
        if self.is_voter or self.marker.rejoin or history or not self._peers <= connected:
            return False
        heard = [self._heard.get(peer) for peer in self._peers]
        return all(one is not None and not one.history and one.echo == self.marker.nonce for one in heard)

    def admits(self, node: str, nonce: bytes) -> bool:
        """Whether an applied `Joined(node, nonce)` makes this node a voter."""
        return not self.is_voter and node == self._node and nonce == self.marker.nonce

    def is_joining(self, peer: str) -> bool:
        """Whether this peer's promises do not count."""
        heard = self._heard.get(peer)
        return heard is not None and not heard.voter

    def joiners(self) -> list[tuple[str, bytes]]:
        """The peers that are empty, and their nonces."""
        return sorted((peer, heard.nonce) for peer, heard in self._heard.items() if not heard.voter)
