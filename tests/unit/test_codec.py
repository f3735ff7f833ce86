"""Bytes to records and back, and the participants' wire: round trips, and what strangers may send."""

import contextlib
import json
import math
import reprlib

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    json_bytes,
    json_value,
    request_from_wire,
    request_to_wire,
)
from coordinator.commands import ENTRIES, decode_command
from coordinator.facts import Participant
from coordinator.protocol.entries import (
    Begun,
    BranchPlan,
    BranchVote,
    ContradictionSeen,
    Decided,
    Ended,
    Forgotten,
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
from coordinator.protocol.record import record
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
    plain = msgpack.unpackb(msgpack.packb(ENTRIES.to_plain(record)))
    assert ENTRIES.from_plain(plain) == record


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
    plain = msgpack.unpackb(msgpack.packb(RECORDS.to_plain(record)))
    assert RECORDS.from_plain(plain) == record


@record
class Old:
    name: str


@record
class New:
    name: str
    size: int = 3


def test_fields_added_at_the_end_take_their_default_in_older_bytes():
    assert RecordCodec({1: New}).from_plain(RecordCodec({1: Old}).to_plain(Old(name="x"))) == New(name="x", size=3)


def test_bytes_of_a_newer_version_are_refused_rather_than_cut():
    with pytest.raises(Malformed, match="at most 1"):
        RecordCodec({1: Old}).from_plain(RecordCodec({1: New}).to_plain(New(name="x", size=5)))


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


def test_votes_that_come_again_are_read_once_and_only_they():
    def votes(*plain):
        return ENTRIES.from_plain([4, GID, "abort", None, False, [*plain]]).votes

    assert votes([5, "a", "prepared"], [5, "b", "refused"]) is votes([5, "a", "prepared"], [5, "b", "refused"])
    with pytest.raises(Malformed):
        votes([5, "a", "prepared"], [5.0, "b", "refused"])  # it equals what is remembered, and is of another type
    deep = []
    for _ in range(1000):
        deep = [deep]
    for strange in (deep, [5, "a", deep], [5, "a", 2**70]):
        with pytest.raises(Malformed):
            votes(strange)
    # Nor are all votes alike that cannot be packed.
    assert [votes([5, name, "prepared"])[0].branch for name in ("\ud800", "\ud801")] == ["\ud800", "\ud801"]


def test_what_is_remembered_of_votes_is_bounded():
    codec = RecordCodec({4: Decided, 5: BranchVote}, recurring={BranchVote})
    for number in range(3000):
        voted = BranchVote(branch=f"b{number}", vote=VoteKind.PREPARED, result=b"x" * 1000 if number % 2 else None)
        decided = Decided(gid=GID, decision=Decision.COMMIT, votes=(voted,))
        assert codec.from_plain(codec.to_plain(decided)) == decided
    assert 0 < len(codec._recent_parts) <= 1024
    assert 0 < len(codec._recent_plain) <= 1024
    assert all(part.result is None for parts in codec._recent_parts.values() for part in parts)


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
