"""A ledger's state as pieces of bytes: the format of snapshots, and of the copies that `outlast backup` makes.

    head     [version, level, cluster, epoch, leader, floor, participants, count of transactions]
    more     {name: value}, only of a cluster that is being restored, or was
    rows     [[number, packed bytes, or a record of one that has not ended], ...], as many pieces as it takes

The first piece begins with the version and, from version 2 on, the level, whatever else comes to be in it: so any later
software's can be told for what it is. Keys are not among it: each transaction knows its own.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from json import detect_encoding
from typing import Any, Final

import msgpack

from cluster.replication.log import NeedsNewer
from coordinator.codec import MAX_NESTING, Malformed, Newer, RecordCodec, json_value, nested_too_deeply, to_msgpack
from coordinator.config import valid_name, valid_url
from coordinator.facts import Participant
from coordinator.levels import OLDEST
from coordinator.packed import is_row, key_and_kept, protocol_and_results, row_of
from coordinator.protocol.messages import Gid
from coordinator.protocol.registry import PROTOCOLS
from coordinator.protocol.transaction import Branch, Transaction
from coordinator.rows import Keys, Rows, rows_of

STATE_VERSION: Final = 2
"""Of snapshots. A cluster of level 1 writes version 1, which knows no levels, so that older software can read it."""
_STATE_VERSION_OF_LEVEL_1: Final = 1
_NUMBERS: Final = 1 << 64
"""Numbers of gids are below it."""
RECORDS: Final = RecordCodec(Transaction, Branch, Participant)

# ------------------------------------------------------------------------------------------------ writing


def head_piece(level: int, rest: list[Any], participants: dict[str, Participant], count: int) -> list[Any]:
    """What the first piece holds; rest: cluster, epoch, leader, floor."""
    return [
        *([_STATE_VERSION_OF_LEVEL_1] if level == OLDEST else [STATE_VERSION, level]),
        *rest,
        [RECORDS.to_plain(participant) for participant in participants.values()],
        count,
    ]


def row_pieces(chunks: list[Any], unfinished: dict[int, Transaction]) -> Iterator[bytes]:
    """What `Rows.freeze` froze; `chunks` is empty in the end."""
    chunks.reverse()
    while chunks:
        # Let go of one after the other: freeing a million rows at once takes time.
        place, chunk = chunks.pop()
        yield to_msgpack(
            [
                [number, packed if packed is not None else RECORDS.to_plain(unfinished[number])]
                for number, packed in rows_of(place, chunk)
            ]
        )


# ------------------------------------------------------------------------------------------------ reading


def read_head(piece: bytes, understands: int) -> tuple[int, list[Any]]:
    """The level, and the rest of the first piece. Raises `Malformed`, `NeedsNewer`, and what bad bytes raise."""
    version, *head = msgpack.unpackb(piece)
    if version == _STATE_VERSION_OF_LEVEL_1:
        return OLDEST, head
    if type(version) is not int or version < 1 or not head or type(head[0]) is not int:
        raise Malformed("of no version")
    level: int = head[0]
    if level > understands:
        raise NeedsNewer(works_at(level, understands))
    if version > STATE_VERSION:
        raise Newer(f"a state of version {version}")
    if level <= OLDEST:
        raise Malformed("of a level that writes another version")
    return level, head[1:]


def participants_of(plain: Any) -> dict[str, Participant]:
    """The participants of a first piece, by name. Raises `Malformed`, and what bad bytes raise."""
    participants = [RECORDS.from_plain(item) for item in plain]
    if not all(isinstance(participant, Participant) for participant in participants):
        raise Malformed("something else among the participants")
    return {participant.name: participant for participant in participants}


def refuse_strange_participants(participants: Iterable[Participant]) -> None:
    """Raises `Malformed` unless all of them can be registered: nothing else is fit to be asked, or shown."""
    for participant in participants:
        if not valid_name(participant.name):
            raise Malformed(f"a participant cannot be called {participant.name!r:.100}")
        if not valid_url(participant.url):
            raise Malformed(f"participant {participant.name} cannot be at {participant.url!r:.100}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What rows are held against that come from outside. participants: their names; last: the highest number."""

    cluster: str
    last: int
    participants: Collection[str]

    def refuse_strange_row(self, number: int, packed: bytes, row: Any) -> None:
        """Raises `Malformed` unless `pack` writes such a row, and what bad bytes raise."""
        self._refuse_strange_number(number)
        if not is_row(packed, row):
            raise Malformed("something else where an ended transaction should be")
        protocol, results = protocol_and_results(row)
        _refuse_strange_parts(protocol, results)

    def refuse_strange_transaction(self, number: int, txn: Transaction) -> None:
        """The same for one that has not ended."""
        gid = self._refuse_strange_number(number)
        if txn.ended_at is not None:
            raise Malformed("something else where an unfinished transaction should be")
        texts = (text for branch in txn.branches for text in (branch.payload, branch.result))
        _refuse_strange_parts(txn.protocol, [text for text in texts if text is not None])
        if any(branch.participant not in self.participants for branch in txn.branches):
            raise Malformed(f"a branch of {gid} at a participant that is not registered")
        if not all(valid_name(branch.name) for branch in txn.branches):
            raise Malformed(f"a branch of {gid} whose name is none")  # no participant would take it
        if (txn.gid, txn.epoch) != (str(gid), gid.epoch):
            raise Malformed(f"{txn.gid!r:.100} in the place of {gid}")

    def _refuse_strange_number(self, number: int) -> Gid:
        gid = Gid.of_number(self.cluster, number)
        if number > self.last or Gid.parse(str(gid)) is None:
            raise Malformed("a number that is no gid's")
        return gid


def restore_rows(
    rows: Any,
    table: Rows,
    unfinished: dict[int, Transaction],
    keys: Keys,
    kept: set[int],
    bounds: Bounds | None = None,
) -> None:
    """Put the rows of one piece into the four. Raises `Malformed`, and what bad bytes raise.

    bounds: of a copy, in which nothing is taken that a ledger would not write.
    """
    last = table.highest
    for number, row in rows:
        if type(number) is not int or not last < number < _NUMBERS:
            raise Malformed("something else where the next number should be")
        last = number
        if isinstance(row, bytes):
            fields = row_of(row)
            if bounds is not None:
                bounds.refuse_strange_row(number, row, fields)
            table[number] = row
            key, is_kept = key_and_kept(fields)
        else:
            txn = RECORDS.from_plain(row)
            if not isinstance(txn, Transaction):
                raise Malformed("something else among the transactions")
            if bounds is not None:
                bounds.refuse_strange_transaction(number, txn)
            table[number], unfinished[number] = None, txn
            key, is_kept = txn.key, txn.kept
        if is_kept:
            kept.add(number)
        if key is not None:
            if type(key) is not str:
                raise Malformed("something else where a key should be")
            keys[key] = number


def _refuse_strange_parts(protocol: str, texts: Iterable[bytes]) -> None:
    """What holds of each transaction of a copy, ended or not. Raises `Malformed`."""
    if protocol not in PROTOCOLS:
        raise Newer(f"a transaction of the unknown protocol {protocol!r:.40}")
    for text in texts:
        _refuse_strange_json(text)


def _refuse_strange_json(text: bytes) -> None:
    """To a depth that is the same for all: how much of a stack is left differs between replicas, and moments."""
    if detect_encoding(text) != "utf-8":
        raise Malformed("JSON in another encoding than UTF-8")  # in which brackets could hide
    if nested_too_deeply(text):
        raise Malformed(f"JSON that is nested more than {MAX_NESTING} deep")
    json_value(text)


def works_at(level: int, understands: int) -> str:
    """Why a node stops whose cluster works at a level that it does not understand."""
    return needs_newer(f"this cluster works at level {level}", understands)


def needs_newer(what: str, understands: int) -> str:
    """Why a node stops: what it has found, and what to do."""
    return (
        f"{what}, and this software understands level {understands}: install the software that the other nodes run "
        "(docs/UPGRADES.md); nothing was changed"
    )
