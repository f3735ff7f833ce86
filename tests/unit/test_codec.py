"""Bytes to records and back, and the participants' wire: round trips, and what strangers may send."""

import contextlib
import json
import math
import reprlib
from collections.abc import Callable
from enum import Enum
from types import UnionType
from typing import Any, get_args, get_origin

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from coordinator import commands
from coordinator.codec import (
    JSON_TYPE,
    MSGPACK_TYPE,
    Malformed,
    Newer,
    RecordCodec,
    answer_from_wire,
    answer_to_wire,
    batch_from_bytes,
    batch_to_bytes,
    call_of,
    json_answer,
    json_bytes,
    json_value,
    request_from_wire,
    request_to_wire,
    to_msgpack,
)
from coordinator.commands import COMMAND_VERSION, ENTRIES, decode_command, encode_command
from coordinator.facts import Participant
from coordinator.protocol.entries import (
    Begun,
    BranchPlan,
    BranchVote,
    ContradictionSeen,
    Decided,
    Ended,
    Entry,
    Forgotten,
    Header,
    Registered,
    TookOver,
    Unregistered,
)
from coordinator.protocol.messages import (
    Abort,
    Acked,
    Commit,
    Contradicted,
    Gid,
    Pending,
    Prepare,
    Prepared,
    ReadOnly,
    Refused,
    StaleEpoch,
    Stamp,
)
from coordinator.protocol.record import Record
from coordinator.protocol.transaction import Branch, Decision, Transaction, VoteKind
from coordinator.states import RECORDS

ANY = settings(deadline=None, derandomize=True, database=None, max_examples=300)

GID = "m-1-1"
PREPARE = Prepare(gid=GID, branch="a", payload=b'{"n":1}')
COMMIT = Commit(gid=GID, branch="a")
ABORT = Abort(gid=GID, branch="a")
MESSAGES = (PREPARE, COMMIT, ABORT)

# ------------------------------------------------------------------------------------------------ records

RECORD_EXAMPLES = [
    TookOver(node="n1"),
    Begun(
        gid=GID,
        protocol="2pc",
        branches=(BranchPlan(name="a", participant="a", payload=b"1"),),
        timeout_ms=5,
        key="k",
        body_hash=b"\0\xff",
    ),
    Decided(gid=GID, decision=Decision.ABORT, reason="é", votes=(BranchVote(branch="a", vote=VoteKind.REFUSED),)),
    ContradictionSeen(gid=GID, branch="a", state="committed"),
    Ended(gid=GID),
    Registered(name="a", url="http://a", batch=True),
    Unregistered(name="a"),
    Forgotten(floor=5, before=7),
]


@pytest.mark.parametrize("record", RECORD_EXAMPLES, ids=lambda record: type(record).__name__)
def test_entries_round_trip(record):
    assert ENTRIES.from_plain(msgpack.unpackb(to_msgpack(ENTRIES.to_plain(record)))) == record


@pytest.mark.parametrize(
    "record",
    [
        Transaction(
            gid=GID,
            protocol="2pc",
            epoch=1,
            branches=(Branch(name="a", participant="b", payload=b"1"),),
            timeout_ms=1,
            started_at=2,
        ),
        Participant(name="a", url="http://a", batch=False),
    ],
    ids=lambda record: type(record).__name__,
)
def test_states_round_trip(record):
    assert RECORDS.from_plain(msgpack.unpackb(to_msgpack(RECORDS.to_plain(record)))) == record


class Old(Record, frozen=True, tag=1):
    name: str


class New(Record, frozen=True, tag=1):
    name: str
    size: int = 3


def test_fields_added_at_the_end_take_their_default_in_older_bytes():
    assert RecordCodec(New).from_plain(RecordCodec(Old).to_plain(Old(name="x"))) == New(name="x", size=3)


def test_bytes_of_a_newer_version_are_refused_rather_than_cut():
    with pytest.raises(Malformed, match="at most 1"):
        RecordCodec(Old).from_plain(RecordCodec(New).to_plain(New(name="x", size=5)))


def nested(depth):
    value = [1]
    for _ in range(depth):
        value = [1, value]
    return value


@pytest.mark.parametrize(
    "plain",
    [
        None,
        5,
        "x",
        [],
        [None],
        ["7"],
        [True, GID],
        [99],
        [7],
        [7, None],
        [7, 5],
        [7, GID, 1],
        [4, GID, 5],
        [4, GID, "perhaps"],
        [4, GID, ["commit"]],
        [4, GID, "commit", None, 1],
        [4, GID, "commit", None, False, None],
        [4, GID, "commit", None, False, [[7, GID]]],
        [4, GID, "commit", None, False, [5]],
        [4, GID, "commit", None, False, [5, "a", "prepared"]],
        [8, "a", "http://a", 1],
        [10, 1.5, 0],
        [10, True, 0],
        nested(900),
        [7, nested(900)],
        [4, GID, nested(900)],
    ],
    ids=lambda plain: reprlib.repr(plain)[:40],
)
def test_what_is_no_entry_is_malformed(plain):
    with pytest.raises(Malformed):
        ENTRIES.from_plain(plain)


@pytest.mark.parametrize(
    ("plain", "is_newer"),
    [
        ([99], True),
        ([7, GID, 1], True),
        ([4, GID, "perhaps"], True),
        ([4, GID, "perhaps", None, 5], True),
        ([2, GID, "2pc", [[3, "a", "a", b"", "new"]]], True),
        ([2, GID, "2pc", [[99]], 5, 7], True),
        ([4, GID], False),
        ([4, GID, 5, None, False, [[99]]], False),
        ([2, GID, "2pc", [[7, GID]], 5], False),
        ([2, GID, "2pc", [[7, GID, 1]], 5], False),
    ],
)
def test_what_stands_first_says_whether_newer_software_may_have_written_it(plain, is_newer):
    with pytest.raises(Malformed) as caught:
        ENTRIES.from_plain(plain)
    assert isinstance(caught.value, Newer) is is_newer


def test_how_deep_decoding_goes_is_not_up_to_the_bytes():
    plain = [2, GID, "2pc", [], 5]
    for _ in range(5000):
        plain = [2, GID, "2pc", [plain], 5]
    with pytest.raises(Malformed, match="Begun where BranchPlan should be"):
        ENTRIES.from_plain(plain)


def nested(*texts_and_numbers: object) -> st.SearchStrategy[object]:
    return st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-1, 11)
        | st.sampled_from([GID, "commit", "prepared", *texts_and_numbers])
        | st.binary(max_size=2),
        lambda inner: st.lists(inner, max_size=7),
        max_leaves=15,
    )


PLAIN = nested(5.0)


@ANY
@given(nested(5.0, "\ud800", 2**70))
def test_plain_values_are_a_record_or_malformed_and_nothing_else(plain):
    try:
        record = ENTRIES.from_plain(plain)
    except Malformed:
        return
    again = ENTRIES.to_plain(record)
    assert again[: len(plain)] == plain, "nothing is changed on the way"
    assert ENTRIES.from_plain(again) == record


@ANY
@given(st.binary(max_size=80) | PLAIN.map(msgpack.packb))
def test_bytes_are_a_command_or_malformed_and_nothing_else(command):
    with contextlib.suppress(Malformed):
        decode_command(command)


# ------------------------------------------------------------------------------------------------ commands


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """What a field of this annotation may hold."""
    if isinstance(hint, UnionType):
        return st.one_of([values_of(option) for option in get_args(hint)])
    if get_origin(hint) is tuple:
        return st.lists(values_of(get_args(hint)[0]), max_size=3).map(tuple)
    if issubclass(hint, Record):
        return st.builds(hint, **{field.name: values_of(field.type) for field in structs.fields(hint)})
    if issubclass(hint, Enum):
        return st.sampled_from(list(hint))
    return {
        str: st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
        bytes: st.binary(max_size=300),
        int: st.integers(-(1 << 63), (1 << 64) - 1),
        bool: st.booleans(),
        type(None): st.none(),
    }[hint]


COMMANDS = st.tuples(values_of(Header), st.lists(values_of(Entry), max_size=3))


def as_written(record: Any) -> list[Any]:
    """By the rule in words: the tag, and all fields; those at the end that have their defaults are left out."""
    kept = list(structs.fields(record))
    while kept and kept[-1].default == getattr(record, kept[-1].name):
        kept.pop()
    plain = [record.__struct_config__.tag]
    for field in kept:
        value = getattr(record, field.name)
        if isinstance(value, tuple):
            value = [part if isinstance(part, str) else as_written(part) for part in value]
        plain.append(value)
    return plain


@ANY
@given(COMMANDS)
def test_commands_are_written_by_the_rule_and_read_back(command):
    header, entries = command
    encoded = encode_command(header, entries)
    assert encoded == msgpack.packb([COMMAND_VERSION, header.epoch, header.at, [as_written(each) for each in entries]])
    assert decode_command(encoded) == (header, entries)
    assert commands._looked_into(encoded) == (header, entries)


def disturb(draw: Any, plain: Any) -> Any:
    """One place of a command: something else there, nothing, or something more."""
    if not isinstance(plain, list) or (plain and draw(st.integers(0, 5)) == 0):
        return draw(nested(5.0, "abort", -(1 << 63), (1 << 64) - 1))
    match draw(st.integers(0, 4)):
        case 0:
            return plain[:-1]
        case 1:
            return [*plain, draw(PLAIN)]
        case _ if not plain:
            return [draw(PLAIN)]
    at = draw(st.integers(0, len(plain) - 1))
    return [*plain[:at], disturb(draw, plain[at]), *plain[at + 1 :]]


@st.composite
def disturbed_commands(draw: Any) -> bytes:
    header, entries = draw(COMMANDS.filter(lambda command: command[1]))
    plain = msgpack.unpackb(encode_command(header, entries))
    where = draw(st.sampled_from([None, 3, 3, 3, 3]))
    if where is None:
        plain = disturb(draw, plain)
    else:
        plain[where] = disturb(draw, plain[where])
    packed: bytes = msgpack.packb(plain)
    if draw(st.integers(0, 2)):
        return packed
    at = draw(st.integers(0, len(packed) - 1))
    return packed[:at] + draw(st.binary(min_size=1, max_size=2)) + packed[at + draw(st.integers(0, 2)) :]


def outcome(read: Callable[[bytes], object], command: bytes) -> object:
    try:
        return read(command)
    except Malformed as error:
        return type(error)


@settings(ANY, max_examples=1500)
@given(disturbed_commands())
def test_what_is_read_at_once_is_what_looking_into_it_finds(command):
    """Or replicas of older software, which always look into it, would come to have another state."""
    assert outcome(decode_command, command) == outcome(commands._looked_into, command)


# ------------------------------------------------------------------------------------------------ gids


@pytest.mark.parametrize("text", ["m-1-1", "my-shop-0-0", "a-1-2-3", f"{'c' * 24}-9999999-999999999999"])
def test_gids_round_trip(text):
    gid = Gid.parse(text)
    assert gid is not None
    assert str(gid) == text
    assert len(text) <= 64, "MariaDB's gtrid"
    assert Gid.of_number(gid.cluster, gid.number) == gid


@pytest.mark.parametrize(
    "text",
    ["", "m", "m-1", "M-1-1", "m-01-1", "m-1-01", "m--1-1-", "m-1-1\n", "-1-1", "m-1-1234567890123", "m-12345678-1",
     "m-¹-1", f"{'c' * 25}-1-1", "1m-1-1", "m-1-1 "],
)  # fmt: skip
def test_only_the_canonical_spelling_is_a_gid(text):
    assert Gid.parse(text) is None


def test_gids_are_numbered_in_the_order_in_which_they_are_given_out():
    texts = ["m-0-5", "m-1-0", "m-1-2", "m-1-10", "m-1-999999999999", "m-2-0", "m-10-0", "m-9999999-999999999999"]
    numbers = [gid.number for text in texts if (gid := Gid.parse(text)) is not None]
    assert numbers == sorted(numbers)
    assert len(numbers) == len(texts)
    assert max(numbers) < 1 << 64, "msgpack holds no larger integer"


# ------------------------------------------------------------------------------------------------ JSON text

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@ANY
@given(JSON)
def test_json_text_round_trips(value):
    assert json_value(json_bytes(value)) == value


@ANY
@given(JSON)
def test_json_text_is_that_of_the_standard_library(value):
    assert json_bytes(value) == json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


@ANY
@given(JSON)
def test_an_answer_spells_the_same(value):
    text = json_answer({"a": value})
    assert json.loads(text) == {"a": value}
    assert text.isascii()


def test_an_answer_in_which_something_is_no_text_is_sent_all_the_same():
    assert json_answer({"reason": "\ud800", "big": 1 << 70}) == b'{"reason":"\\ud800","big":1180591620717411303424}'


def read_by_the_library(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return Malformed


ODD = st.sampled_from(
    ["-", "0", "-0", "01", "1.", ".5", "1e999", "1e-400", "1e5", "E", "9" * 19, "9" * 40, "4.9e-324", "nan", "NaN",
     "Infinity", "true", "nul", '"', "\\", "\\u", "d800", "dc00", "\x00", "\x1f", "\x7f", "\ud800", "\ufeff", "\u2028",
     "é", "[", "]", "{", "}", ",", ":", " ", "\n", "\x0b", '"a"', '"a":', '"\\u00e9"', '"\\/"', "//"]
)  # fmt: skip


@settings(ANY, max_examples=1500)
@given(
    st.one_of(JSON.map(json.dumps), st.just("")), st.lists(ODD, max_size=4).map("".join), st.integers(0, 40), st.data()
)
def test_json_is_what_the_standard_library_reads_but_for_constants(text, odd, at, data):
    text = text[:at] + odd + text[at + data.draw(st.integers(0, 2)) :]
    if any(constant in text for constant in ("NaN", "Infinity")):
        return
    raw = text.encode(data.draw(st.sampled_from(["utf-8", "utf-8", "utf-16", "utf-32"])), "surrogatepass")
    for each in (text, raw):
        try:
            found = json_value(each)
        except Malformed:
            found = Malformed
        # `repr`, for 1 is equal to True and 1.0, and -0.0 to 0.0.
        assert repr(found) == repr(read_by_the_library(each))


ENDLESS: list[object] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (b"bytes", TypeError),
        ({b"bytes": 1}, TypeError),
        ([{"set": set()}], TypeError),
        (math.nan, ValueError),
        ([-math.inf], ValueError),
        (ENDLESS, ValueError),
    ],
    ids=reprlib.repr,
)
def test_what_json_lacks_is_refused_every_time(value, error):
    for _ in range(2):
        with pytest.raises(error):
            json_bytes(value)
    assert json_bytes([1]) == b"[1]"


def test_a_lone_surrogate_survives():
    assert json_value(json_bytes("\ud800")) == "\ud800"


@pytest.mark.parametrize(
    "text", [b"1", b" 1", b"1 ", b" \t\n\r1\r\n\t ", " 1 ", " 1 ".encode("utf-16"), b"\xef\xbb\xbf1"]
)
def test_blanks_around_it_are_no_part_of_it(text):
    assert json_value(text) == 1


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"\xff",
        b"\xff\xfe",
        "[" * 100_000,
        "1" * 5000,
        b"1 2",
        b" ",
        b"\x0b1",
        b"1\x0c",
        b"\xc2\xa01",
        b"1\xc2\xa0",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_no_json_is_malformed(text):
    with pytest.raises(Malformed):
        json_value(text)


# ------------------------------------------------------------------------------------------------ requests

GIDS = st.builds(Gid, st.sampled_from(["m", "a-b"]), st.integers(0, 9_999_999), st.integers(0, 10**12 - 1)).map(str)
BRANCHES = st.text(min_size=1, max_size=128)
EPOCHS = st.integers(0, 1 << 70)
STAMPS = st.builds(Stamp, epoch=EPOCHS, floor=st.none() | GIDS)
PREPARES = st.builds(Prepare, gid=GIDS, branch=BRANCHES, payload=JSON.map(json_bytes))
PREPARE_STAMPS = st.builds(
    Stamp,
    epoch=EPOCHS,
    floor=st.none() | GIDS,
    deadline_ms=st.none() | st.integers(0, 1 << 40),
    coordinators=st.lists(st.text(max_size=5), max_size=3).map(tuple),
)
PHASE_TWO = st.builds(Commit, gid=GIDS, branch=BRANCHES) | st.builds(Abort, gid=GIDS, branch=BRANCHES)


@ANY
@given(st.tuples(PREPARES, PREPARE_STAMPS) | st.tuples(PHASE_TWO, STAMPS))
def test_requests_round_trip(request_and_stamp):
    message, stamp = request_and_stamp
    body = json_value(json_bytes(request_to_wire(message, stamp)))
    assert request_from_wire(call_of(message), body) == (message, stamp)


def test_calls_have_names():
    assert [call_of(message) for message in MESSAGES] == ["prepare", "commit", "abort"]


GOOD = {"gid": GID, "branch": "a", "epoch": 1, "payload": {}, "deadline_ms": 5, "coordinators": ["http://n"]}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"gid": None}, "gid"),
        ({"gid": "m-1"}, "gid"),
        ({"gid": ["m-1-1"]}, "gid"),
        ({"branch": ""}, "branch"),
        ({"branch": "x" * 129}, "branch"),
        ({"branch": 5}, "branch"),
        ({"epoch": -1}, "epoch"),
        ({"epoch": True}, "epoch"),
        ({"epoch": 1.0}, "epoch"),
        ({"floor": 5}, "floor"),
        ({"floor": "m"}, "floor"),
        ({"deadline_ms": -1}, "deadline_ms"),
        ({"deadline_ms": True}, "deadline_ms"),
        ({"deadline_ms": "5"}, "deadline_ms"),
        ({"coordinators": "http://n"}, "coordinators"),
        ({"coordinators": [5]}, "coordinators"),
        ({"payload": {"x": b"bytes"}}, "JSON"),
        ({"payload": {b"x": 1}}, "JSON"),
        ({"payload": float("inf")}, "JSON"),
        ({"payload": msgpack.Timestamp(1)}, "JSON"),
        ({"payload": nested(100_000)}, "JSON"),
    ],
    ids=lambda item: reprlib.repr(item)[:40],
)
def test_a_malformed_request_names_its_field(changes, field):
    with pytest.raises(Malformed, match=field):
        request_from_wire("prepare", {**GOOD, **changes})


def test_other_calls_and_bodies_are_malformed():
    with pytest.raises(Malformed, match="call"):
        request_from_wire("rollback", GOOD)
    for body in (None, [], "x", 5):
        with pytest.raises(Malformed, match="object"):
            request_from_wire("commit", body)


# ------------------------------------------------------------------------------------------------ answers

RESULTS = st.none() | JSON.filter(lambda value: value is not None).map(json_bytes)
ABOUT = {"gid": st.just(GID), "branch": st.just("a")}
VOTES = st.one_of(
    st.builds(Prepared, **ABOUT, result=RESULTS),
    st.builds(ReadOnly, **ABOUT, result=RESULTS),
    st.builds(
        Refused,
        **ABOUT,
        reason=st.text(st.characters(blacklist_categories=("Cs",)), max_size=1000),
        retryable=st.booleans(),
    ),
    st.builds(StaleEpoch, **ABOUT, epoch=EPOCHS),
    st.builds(Pending, **ABOUT),
)
PHASE_TWO_ANSWERS = st.one_of(
    st.builds(Acked, **ABOUT),
    st.builds(Contradicted, **ABOUT, state=st.sampled_from(["working", "aborted", "committed", "unknown", "prepared"])),
    st.builds(Pending, **ABOUT),
)


@ANY
@given(st.tuples(st.just(PREPARE), VOTES) | st.tuples(st.sampled_from([COMMIT, ABORT]), PHASE_TWO_ANSWERS))
def test_answers_round_trip(message_and_answer):
    message, answer = message_and_answer
    status, body = answer_to_wire(message, answer)
    assert answer_from_wire(message, status, json_value(json_bytes(body))) == answer


@pytest.mark.parametrize(
    ("message", "status", "body"),
    [
        (PREPARE, 200, None),
        (PREPARE, 200, []),
        (PREPARE, 200, {}),
        (PREPARE, 200, {"vote": "yes"}),
        (PREPARE, 200, {"vote": ["prepared"]}),
        (PREPARE, 200, {"vote": nested(900)}),
        (PREPARE, 200, {"state": "committed"}),
        (PREPARE, 200, {"vote": "prepared", "result": b"bytes"}),
        (PREPARE, 200, {"vote": "prepared", "result": float("nan")}),
        (PREPARE, 200, {"vote": "read_only", "result": {1: {b"k": 1}}}),
        (PREPARE, 200, {"vote": "prepared", "result": nested(100_000)}),
        (PREPARE, 200, {"vote": "refused", "reason": 5}),
        (PREPARE, 200, {"vote": "refused", "retryable": "no"}),
        (PREPARE, 201, {"vote": "prepared"}),
        (PREPARE, 404, {"vote": "prepared"}),
        (PREPARE, 500, {"vote": "refused"}),
        (PREPARE, 503, {"code": "overloaded"}),
        (PREPARE, 409, {"state": "aborted"}),
        (PREPARE, 409, {"code": "stale_epoch"}),
        (PREPARE, 409, {"code": "stale_epoch", "epoch": True}),
        (COMMIT, 200, {}),
        (COMMIT, 200, {"state": "aborted"}),
        (COMMIT, 200, {"state": nested(900)}),
        (COMMIT, 200, {"vote": "prepared"}),
        (ABORT, 200, {"state": "committed"}),
        (COMMIT, 409, {}),
        (COMMIT, 409, {"state": "broken"}),
        (COMMIT, 409, {"state": ["aborted"]}),
        (COMMIT, 409, {"state": nested(900)}),
        (COMMIT, 502, {"state": "committed"}),
    ],
    ids=lambda item: reprlib.repr(item)[:40],
)
def test_any_other_answer_is_malformed_and_so_unknown(message, status, body):
    with pytest.raises(Malformed):
        answer_from_wire(message, status, body)


def test_a_refusal_is_cut_and_cleaned():
    answer = answer_from_wire(PREPARE, 200, {"vote": "refused", "reason": "\ud800" + "x" * 2000})
    assert isinstance(answer, Refused)
    assert answer.reason == "?" + "x" * 999
    assert answer_from_wire(PREPARE, 200, {"vote": "refused"}) == Refused(gid=GID, branch="a", reason="no reason given")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["vote", "state", "code", "epoch", "result", "reason", "retryable", "gid", "branch", "payload"]
            ),
            inner | st.sampled_from(["prepared", "refused", "committed", "aborted", "stale_epoch", "pending", GID]),
            max_size=5,
        )
    ),
    max_leaves=10,
)


@ANY
@given(st.sampled_from(MESSAGES), st.sampled_from([200, 409, 503, 500, 204]), ANYTHING)
def test_an_answer_is_understood_or_malformed_and_nothing_else(message, status, body):
    try:
        answer = answer_from_wire(message, status, body)
    except Malformed:
        return
    assert (answer.gid, answer.branch) == (GID, "a"), "it is about what was asked, whatever it says"


@ANY
@given(st.sampled_from(["prepare", "commit", "abort", "?"]), ANYTHING)
def test_a_request_is_understood_or_malformed_and_nothing_else(call, body):
    try:
        message, stamp = request_from_wire(call, body)
    except Malformed:
        return
    assert request_from_wire(call, request_to_wire(message, stamp)) == (message, stamp)


# ------------------------------------------------------------------------------------------------ batches


@ANY
@given(st.lists(JSON, max_size=4))
def test_batches_round_trip(items):
    kind, body = batch_to_bytes(items)
    assert batch_from_bytes(kind, body) == items


@pytest.mark.parametrize("items", [[{"n": 1 << 70}], [{"s": "\ud800"}]], ids=repr)
def test_what_msgpack_cannot_hold_goes_as_json(items):
    kind, body = batch_to_bytes(items)
    assert kind == JSON_TYPE
    assert batch_from_bytes(kind, body) == items
    assert batch_to_bytes([{}])[0] == MSGPACK_TYPE


@pytest.mark.parametrize("kind", [JSON_TYPE, MSGPACK_TYPE, "text/plain"])
@ANY
@given(st.binary(max_size=60) | ANYTHING.map(lambda value: msgpack.packb(value) if _packs(value) else b""))
def test_bytes_are_a_batch_or_malformed_and_nothing_else(kind, body):
    with contextlib.suppress(Malformed):
        assert isinstance(batch_from_bytes(kind, body), list)


def _packs(value):
    try:
        msgpack.packb(value)
    except (OverflowError, UnicodeEncodeError):
        return False
    return True


@pytest.mark.parametrize(
    "body",
    [b"\x91" * 3000, b"\xc7\x00\xff", b"\x81\x91\x01\x01", b"\xdd\xff\xff\xff\xff", b"\xc1"],
    ids=lambda b: str(b[:6]),
)
def test_hostile_msgpack_is_malformed(body):
    with pytest.raises(Malformed):
        batch_from_bytes(MSGPACK_TYPE, body)
