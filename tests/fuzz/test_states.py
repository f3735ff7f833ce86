"""States from elsewhere: snapshots that nodes send each other or read at start, and copies that people restore.

A copy comes through `POST /v1/restore`, with checksums that anybody can compute; its pieces go through the log, and
what one of them made a node raise, it would make every node raise, at every start again.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.replication.log import NeedsNewer
from coordinator.codec import MAX_NESTING, Malformed
from coordinator.commands import encode_command
from coordinator.config import valid_name, valid_url
from coordinator.copies import CopyBroken, CopyHeader, CopyReader, chained, cut, written
from coordinator.facts import Verdict
from coordinator.ledger import Ledger
from coordinator.levels import NEWEST
from coordinator.protocol.entries import CopyInstalled, CopyPiece, Header, Raised, TookOver
from coordinator.protocol.messages import Gid
from tests.fuzz import HUNT, examples
from tests.fuzz.lives import CLUSTER, LIFE, RESTORE, check_usable, content, ledger_after
from tests.fuzz.mutations import altered, damaged, in_parts, pack

STATES = [
    [msgpack.unpackb(piece) for piece in cut(ledger_after(which, count).snapshot()(), 100)]
    for which, life in (("life", LIFE), ("restore", RESTORE))
    for count in range(2, len(life) + 1)
]
"""As lists: the pieces of each, unpacked."""
STATE = st.integers(0, len(STATES) - 1).map(STATES.__getitem__)
PIECES = altered(STATE).map(lambda plain: [pack(piece) for piece in plain] if isinstance(plain, list) else [])
FILE_OF = CopyHeader(
    cluster=CLUSTER, level=NEWEST, epoch=2, generation=0, made_at=5, transactions=7, undecided=2, newest="m-2-3"
)
Restore = Callable[[Ledger, list[bytes]], None]


def _restored(ledger: Ledger, pieces: list[bytes]) -> None:
    ledger.restore(pieces)()


def restores(pieces: list[bytes], restore: Restore = _restored) -> None:
    ledger = Ledger(CLUSTER)
    held = content(ledger)
    try:
        restore(ledger, pieces)
    except (Malformed, NeedsNewer) as error:
        assert len(str(error)) < 1000
        assert content(ledger) == held
        return
    content(ledger)


@examples(80)
@given(PIECES)
def test_a_state_is_taken_whole_or_refused(pieces: list[bytes]) -> None:
    restores(pieces)


@examples(40)
@given(STATE, st.data())
def test_damage_in_a_piece_is_noticed_or_harmless(plain: list[Any], data: st.DataObject) -> None:
    pieces = [pack(piece) for piece in plain]
    at = data.draw(st.integers(0, len(pieces) - 1))
    pieces[at] = data.draw(damaged(st.just(pieces[at])))
    restores(pieces)


# ------------------------------------------------------------------------------------------------ through the log


def installs(pieces: list[bytes]) -> None:
    ledger = Ledger(CLUSTER)
    header, digest = Header(epoch=1, at=5), b""
    ledger.apply(encode_command(header, [TookOver(node="n1"), Raised(level=NEWEST)]))
    for index, data in enumerate(pieces):
        digest = chained(digest, data)
        ledger.apply(encode_command(header, [CopyPiece(restore="r", index=index, data=data)]))
    (last,) = ledger.apply(
        encode_command(header, [CopyInstalled(restore="r", pieces=len(pieces), digest=digest, epoch_base=100_002)])
    )
    assert ledger.staged is None
    if last.verdict is Verdict.APPLIED:
        assert ledger.epoch == 100_002
    else:
        assert ledger.is_fresh
    assert all(valid_name(each.name) and valid_url(each.url) for each in ledger.participants.values())
    check_usable(ledger)


@examples(60)
@given(PIECES)
def test_a_copy_s_pieces_do_no_harm_in_the_log(pieces: list[bytes]) -> None:
    installs(pieces)


DEEP = b"[" * (MAX_NESTING + 1) + b"]" * (MAX_NESTING + 1)
STRANGE = {
    "a protocol that nobody knows": [7, 6, 6, 1, 1, "3pc", None, None, None, []],
    "a result that is not JSON": [7, 6, 6, 1, 1, "2pc", None, None, None, [["a", 1, None, None, False, b"{"]]],
    "a payload that is not JSON": [1, "m-1-1", "2pc", 1, [[2, "a", "a", b"{"]], 1000, 5],
    "a participant that is not registered": [1, "m-1-1", "2pc", 1, [[2, "a", "b", b"1"]], 1000, 5],
    "a branch whose name is none": [1, "m-1-1", "2pc", 1, [[2, "A b", "a", b"1"]], 1000, 5],
    "an unfinished one that has ended": [1, "m-1-1", "2pc", 1, [], 9, 5, None, None, "commit", None, False, 5, 6],
    "a row that is too short": [7, 6],
    "a payload that is nested deeper than one can be": [1, "m-1-1", "2pc", 1, [[2, "a", "a", DEEP]], 1000, 5],
    "a result that is": [7, 6, 6, 1, 1, "2pc", None, None, None, [["a", 1, None, None, False, DEEP]]],
    "a payload in another encoding": [1, "m-1-1", "2pc", 1, [[2, "a", "a", "[[]]".encode("utf-16-le")]], 1000, 5],
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_strange_row_of_a_copy_is_refused(what: str) -> None:
    row = STRANGE[what]
    head = [2, 2, "m", 1, "n1", -1, [[3, "a", "http://a", False]], 1]
    pieces = [pack(head), pack([[Gid("m", 1, 1).number, row if row[0] == 1 else pack(row)]])]
    installs(pieces)
    assert _verdicts(pieces) == [Verdict.APPLIED, Verdict.MALFORMED]


def _verdicts(pieces: list[bytes]) -> list[Verdict]:
    """What applying each of them as a piece of a copy does."""
    ledger = Ledger(CLUSTER)
    header = Header(epoch=1, at=5)
    ledger.apply(encode_command(header, [TookOver(node="n1"), Raised(level=NEWEST)]))
    return [
        ledger.apply(encode_command(header, [CopyPiece(restore="r", index=index, data=data)]))[0].verdict
        for index, data in enumerate(pieces)
    ]


@pytest.mark.parametrize(
    "participant",
    [["a", "http://[::1"], ["a", "a"], ["a", "http://a?b"], ["a", "http://a:b"], ["", "http://a"], ["A b", "http://a"]],
)
def test_a_participant_of_a_copy_that_could_not_register_is_refused(participant: list[str]) -> None:
    """Asked after the restore, at such a URL, it would be asked for ever; its name goes into the log."""
    pieces = [pack([2, 2, "m", 1, "n1", -1, [[3, *participant, False]], 0])]
    installs(pieces)
    assert _verdicts(pieces) == [Verdict.MALFORMED]


@pytest.mark.parametrize("depth", [1, MAX_NESTING, MAX_NESTING + 1, *range(900, 1000, 5)])
def test_how_deep_json_may_be_does_not_depend_on_the_stack(depth: int) -> None:
    """Else one replica would take a piece that another refuses."""
    row = [1, "m-1-1", "2pc", 1, [[2, "a", "a", b"[" * depth + b"]" * depth]], 1000, 5]
    head = [2, 2, "m", 1, "n1", -1, [[3, "a", "http://a", False]], 1]
    pieces = [pack(head), pack([[Gid("m", 1, 1).number, row]])]

    def deeper(frames: int) -> list[Verdict]:
        return deeper(frames - 1) if frames else _verdicts(pieces)

    assert {tuple(deeper(frames)) for frames in (0, 1, 3, 100)} == {
        (Verdict.APPLIED, Verdict.APPLIED if depth <= MAX_NESTING else Verdict.MALFORMED)
    }


def test_copies_within_copies_end_somewhere() -> None:
    """As deep as the bytes say would be too deep for the stack."""
    head = next(iter(ledger_after("life", 1).snapshot()()))
    staged = {"staged": ["r", 1, b""]}
    pieces = [head]
    for depth in range(600):
        pieces += [_wrapped(msgpack.packb(staged), depth), _wrapped(head, depth + 1)]
    restores(pieces)
    installs(pieces)
    restores([head, msgpack.packb(staged), _wrapped(head, 600)])


def _wrapped(piece: bytes, times: int) -> bytes:
    for _ in range(times):
        piece = msgpack.packb({"piece": piece})
    return piece


# ------------------------------------------------------------------------------------------------ as a file


def _frames(payloads: list[tuple[bytes, bytes]]) -> bytes:
    """Sealed again after a change: anybody can compute a CRC."""
    out = [struct.pack("<8sI", b"outlcopy", 1)]
    for kind, payload in payloads:
        head = struct.pack("<cI", kind, len(payload))
        out.append(head + payload + struct.pack("<I", zlib.crc32(head + payload)))
    return b"".join(out)


def _good_frames() -> list[list[Any]]:
    pieces = list(ledger_after("life", len(LIFE)).snapshot()())
    digest = b""
    for piece in pieces:
        digest = chained(digest, piece)
    trailer = {"pieces": len(pieces), "digest": digest}
    return [[b"H", FILE_OF.to_plain()], *([b"P", msgpack.unpackb(piece)] for piece in pieces), [b"T", trailer]]


WHOLE = b"".join(written(FILE_OF, ledger_after("life", len(LIFE)).snapshot()()))
RESEALED = altered(st.builds(_good_frames)).map(
    lambda frames: _frames(
        [
            (frame[0], pack(frame[1]))
            for frame in (frames if isinstance(frames, list) else [])
            if isinstance(frame, list) and len(frame) > 1 and isinstance(frame[0], bytes) and len(frame[0]) == 1
        ]
    )
)
Feed = Callable[[CopyReader, bytes], list[bytes]]


def reads(parts: list[bytes], feed: Feed = CopyReader.feed) -> None:
    def taken(parts: list[bytes]) -> Iterator[object]:
        reader = CopyReader(most=1 << 16)
        try:
            for part in parts:
                yield from feed(reader, part)
                assert len(reader._rest) <= (1 << 16) + 9 + len(part)
            yield reader.end()
        except CopyBroken as error:
            assert len(str(error)) < 500
            yield "broken"

    found = list(taken(parts))
    at_once = list(taken([b"".join(parts)]))
    assert (found[-1] == "broken") == (at_once[-1] == "broken"), "however it comes"
    assert found[-1] == "broken" or found == at_once


@examples(50)
@given(st.data(), damaged(st.just(WHOLE)) | RESEALED)
def test_a_copy_is_whole_or_broken_however_it_comes(data: st.DataObject, file: bytes) -> None:
    reads(data.draw(in_parts(file)))


def test_the_undamaged_are_taken() -> None:
    for plain in STATES:
        ledger = Ledger(CLUSTER)
        ledger.restore([pack(piece) for piece in plain])()
        check_usable(ledger)
        installs([pack(piece) for piece in plain])
    reader = CopyReader()
    assert reader.feed(WHOLE)
    assert reader.end()[0] == FILE_OF


# ------------------------------------------------------------------------------------------------ known to be bad


def _trusting(ledger: Ledger, pieces: list[bytes]) -> None:
    """Takes a packed row for what its length says."""
    for piece in pieces[1:]:
        try:
            plain = msgpack.unpackb(piece)
        except ValueError as error:
            raise Malformed("not msgpack") from error
        for row in plain if isinstance(plain, list) else ():
            if isinstance(row, list) and len(row) == 2 and isinstance(row[1], bytes):
                _key = msgpack.unpackb(row[1])[7]
    ledger.restore(pieces)()


def _in_place(ledger: Ledger, pieces: list[bytes]) -> None:
    """Changes the ledger as it reads."""
    for piece in pieces:
        ledger.feed(piece)
    if not ledger.is_whole:
        raise Malformed("not whole")


@pytest.mark.parametrize(("restore", "error"), [(_trusting, Exception), (_in_place, AssertionError)])
def test_a_careless_restore_is_found(restore: Restore, error: type[Exception]) -> None:
    @HUNT
    @given(PIECES)
    def hunt(pieces: list[bytes]) -> None:
        restores(pieces, restore)

    with pytest.raises(error) as caught:
        hunt()
    assert not isinstance(caught.value, Malformed)


def _unbounded(reader: CopyReader, data: bytes) -> list[bytes]:
    """Waits for as much as the length says."""
    reader._most = 2**32
    return reader.feed(data)


def test_a_reader_without_the_length_check_is_found() -> None:
    file = bytearray(WHOLE)
    file[13:17] = b"\xff\xff\xff\x7f"
    parts = [bytes(file), *[bytes(1 << 15)] * 4]
    reads(parts)
    with pytest.raises(AssertionError):
        reads(parts, _unbounded)
