"""Bytes to records and back: versioned, tagged msgpack for what is stored, plain JSON shapes for what participants see.

No pickle, here or anywhere: what is decoded here can only become the records that are named here.
"""

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import UnionType
from typing import Any, Final, get_args, get_origin

import msgpack
import msgspec
from msgspec import NODEFAULT, structs
from msgspec.structs import FieldInfo

from coordinator.protocol.messages import (
    Abort,
    Acked,
    Answer,
    Commit,
    Contradicted,
    Gid,
    Pending,
    Prepare,
    Prepared,
    ReadOnly,
    Refused,
    Request,
    StaleEpoch,
    Stamp,
)
from coordinator.protocol.record import Record

JSON_TYPE: Final = "application/json"
MSGPACK_TYPE: Final = "application/msgpack"


class Malformed(ValueError):
    """Bytes or a value that are not what they should be. The text says what is wrong, for people."""


class Newer(Malformed):
    """A newer software may have written this, and know what it means."""


# ------------------------------------------------------------------------------------------------ records


_PLAIN: Final = frozenset({str, bytes, int, bool, type(None)})

to_msgpack: Final = msgspec.msgpack.Encoder().encode
"""Plain values, and records as they are, to msgpack."""


@dataclass(frozen=True, slots=True)
class _Field:
    """What a record's field may hold, read off its annotation."""

    name: str
    default: object
    words: Mapping[object, Enum]
    """What an enum's values are on the wire, if it may be one."""
    item: Any
    """What it holds many of, if it does."""
    plain: frozenset[type]
    """Types that are on the wire as they are."""

    @classmethod
    def of(cls, field: FieldInfo) -> "_Field":
        types: set[type] = set()
        words: dict[object, Enum] = {}
        item = None
        for option in get_args(field.type) if isinstance(field.type, UnionType) else (field.type,):
            if get_origin(option) is tuple:
                types.add(tuple)
                item = get_args(option)[0]
            else:
                types.add(option)
                if issubclass(option, Enum):
                    words |= {each.value: each for each in option}
        assert not words or str not in types, "a word would never become its enum"
        assert types <= _PLAIN | {tuple} or words, "a record is nested as one of many"
        assert tuple not in types or len(types) == 1, "there may be none of many, but not nothing in their place"
        return cls(field.name, field.default, words, item, frozenset(types) & _PLAIN)


class RecordCodec:
    """Records (see `record.py`) to plain values, which `to_msgpack` takes, and back.

    A record becomes `[tag, field, field, ...]` in the order of its definition; fields at its end that have their
    default value are left out. Fields may be added at the end of a record when they have a default: older bytes then
    decode to that default, and older software can read the record as long as the new field has it. Decoding checks
    every field against its annotation, so what comes out can be relied on as if it had been built here. An unknown tag,
    an unknown value of an enum, and more fields than are known are what later software may have added: `Newer` tells
    them from what nobody can have written.

    msgspec reads the same bytes by the same rules, many times as fast, and does not tell newer from malformed: it is
    asked first where that matters, and what it refuses is explained here (see `commands.py`).
    """

    def __init__(self, *kinds: type[Record]) -> None:
        self._tags: dict[type, int] = {}
        self._kinds: dict[int, type[Record]] = {}
        self._fields: dict[type, tuple[_Field, ...]] = {}
        for kind in kinds:
            tag = kind.__struct_config__.tag
            assert isinstance(tag, int), f"{kind.__name__} has no tag"
            assert tag not in self._kinds, f"{kind.__name__} has the tag of another"
            self._tags[kind], self._kinds[tag] = tag, kind
            self._fields[kind] = tuple(_Field.of(field) for field in structs.fields(kind))
        self._defaults = {kind: (NODEFAULT, *[field.default for field in self._fields[kind]]) for kind in kinds}
        """By place; the tag, at 0, has none."""
        self._cut = {kind: self._places_to_cut(kind) for kind in kinds}
        """Places of what holds records with fields that may be left out."""

    def _places_to_cut(self, kind: type[Record]) -> tuple[int, ...]:
        return tuple(
            at
            for at, field in enumerate(self._fields[kind], 1)
            if any(part.default is not NODEFAULT for part in self._fields.get(field.item, ()))
        )

    def to_plain(self, record: Record) -> list[Any]:
        """What `to_msgpack` takes: lists, in which records stand as they are that have no fields to leave out."""
        kind = type(record)
        plain = [self._tags[kind], *structs.astuple(record)]
        defaults = self._defaults[kind]
        while plain[-1] == defaults[len(plain) - 1]:
            plain.pop()
        for at in self._cut[kind]:
            if at < len(plain):
                plain[at] = [self.to_plain(part) for part in plain[at]]
        return plain

    def from_plain(self, plain: object, wanted: type | None = None) -> Any:
        """The record that was packed, from what was unpacked; of the kind that is wanted, if one is.

        Raises `Malformed`. The fields speak in their order: what only newer software knows counts, if it stands before
        a fault.
        """
        if type(plain) is not list or not plain or type(plain[0]) is not int:
            raise Malformed(f"not a tagged record: {_shown(plain)}")
        kind = self._kinds.get(plain[0])
        if kind is None:
            raise Newer(f"unknown record tag {plain[0]}")
        if wanted is not None and kind is not wanted:
            # Before what is in it is looked at: so how deep decoding goes is up to the records, and never to the bytes.
            raise Malformed(f"{kind.__name__} where {wanted.__name__} should be")
        known = self._fields[kind]
        if len(plain) - 1 > len(known):
            raise Newer(f"{kind.__name__} has {len(plain) - 1} fields, at most {len(known)} are known")
        values = [self._value(kind, field, value) for field, value in zip(known, plain[1:], strict=False)]
        if NODEFAULT in self._defaults[kind][len(plain) :]:
            raise Malformed(f"{kind.__name__} lacks {known[len(values)].name}")
        return kind(*values)

    def _value(self, kind: type, field: _Field, plain: Any) -> object:
        if type(plain) in field.plain:
            return plain
        if type(plain) is str and field.words:
            word = field.words.get(plain)
            if word is None:
                raise Newer(f"{kind.__name__}.{field.name}: {_shown(plain)} is not known")
            return word
        if type(plain) is not list or field.item is None:
            raise Malformed(f"{kind.__name__}.{field.name} cannot be {_shown(plain)}")
        if field.item is not str:
            return tuple(self.from_plain(part, field.item) for part in plain)
        if not all(type(part) is str for part in plain):
            raise Malformed(f"{kind.__name__}.{field.name} holds something else than texts")
        return tuple(plain)


def _shown(value: object) -> str:
    """Something of `value` for people; bounded in depth, too, because deep lists written out can exhaust the stack."""
    return reprlib.repr(value)[:80]


# ------------------------------------------------------------------------------------------------ JSON text


def _refuse_constant(name: str) -> None:
    raise Malformed(f"{name} is not JSON")


# `json.dumps` would make one each time, which takes longer than most of our texts.
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
# Several times as fast, for what is plain.
_PLAIN_ENCODER: Final = msgspec.json.Encoder()
_PLAIN_DECODER: Final = msgspec.json.Decoder()


def json_bytes(value: object) -> bytes:
    """Compact JSON text, ASCII only (so that a lone surrogate survives), and never NaN."""
    return _ENCODER.encode(value).encode()


def json_answer(value: Mapping[str, Any]) -> bytes:
    """The same of plain values of ours and of results, in which nothing is that JSON lacks; several times as fast.

    For what else comes in there is no promise: NaN would become null, and bytes a text.
    """
    try:
        text = _PLAIN_ENCODER.encode(value)
    except (TypeError, UnicodeEncodeError, RecursionError):
        return json_bytes(value)  # such as a lone surrogate
    # Beyond ASCII there are characters that a terminal obeys.
    return text if text.isascii() else json_bytes(value)


def _json_bytes_of_foreign(value: object) -> bytes:
    """`json_bytes` of what a participant sent, which msgpack may have filled with things that JSON lacks."""
    try:
        return json_bytes(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed(f"not a JSON value: {error}") from error


def json_value(text: bytes | str) -> Any:
    """What `text` spells, in UTF-8, -16 or -32. Raises `Malformed`; NaN and Infinity are not JSON."""
    try:
        return _PLAIN_DECODER.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass  # lone surrogates, other encodings, numbers beyond floats; or no JSON
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise Malformed("nested too deeply") from error
    except Malformed:
        raise
    except ValueError as error:
        raise Malformed(str(error)) from error


MAX_NESTING: Final = 100
"""Lists and objects within each other, in a payload or a result. Whoever takes it on its way, with whatever stack, in
whatever language, must be able to read it; some stop at 128."""

_STRING: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_BRACKET: Final = re.compile(rb"[\[\]{}]")


def nested_too_deeply(text: bytes, most: int = MAX_NESTING) -> bool:
    """Whether JSON text is nested deeper than `most`."""
    if len(text) <= most or text.count(b"[") + text.count(b"{") <= most:
        return False  # nearly always, and cheap
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", text)):
        depth += 1 if bracket in b"[{" else -1
        if depth > most:
            return True
    return False


# ------------------------------------------------------------------------------------------------ participants' wire

_CALLS: Final = {Prepare: "prepare", Commit: "commit", Abort: "abort"}


def call_of(message: Request) -> str:
    """The path segment, and the `call` of a batch item."""
    return _CALLS[type(message)]


def request_to_wire(message: Request, stamp: Stamp) -> dict[str, Any]:
    """The JSON body of a prepare, commit or abort."""
    body: dict[str, Any] = {"gid": message.gid, "branch": message.branch, "epoch": stamp.epoch}
    if stamp.floor is not None:
        body["floor"] = stamp.floor
    if type(message) is Prepare:
        body["payload"] = json_value(message.payload)
        body["deadline_ms"] = stamp.deadline_ms
        body["coordinators"] = list(stamp.coordinators)
    return body


def request_from_wire(call: str, body: object) -> tuple[Request, Stamp]:
    """What `request_to_wire` was given. Raises `Malformed`, naming the field."""
    if not isinstance(body, dict):
        raise Malformed("the body must be a JSON object")
    gid, branch, epoch = body.get("gid"), body.get("branch"), body.get("epoch")
    if not isinstance(gid, str) or Gid.parse(gid) is None:
        raise Malformed("gid must be <cluster>-<epoch>-<sequence>")
    if not isinstance(branch, str) or not 0 < len(branch) <= 128:
        raise Malformed("branch must be a string of 1 to 128 characters")
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        raise Malformed("epoch must be a non-negative integer")
    floor = body.get("floor")
    if floor is not None and (not isinstance(floor, str) or Gid.parse(floor) is None):
        raise Malformed("floor must be a gid")
    if call == "commit":
        return Commit(gid=gid, branch=branch), Stamp(epoch=epoch, floor=floor)
    if call == "abort":
        return Abort(gid=gid, branch=branch), Stamp(epoch=epoch, floor=floor)
    if call != "prepare":
        raise Malformed("call must be prepare, commit or abort")
    deadline_ms, coordinators = body.get("deadline_ms"), body.get("coordinators") or []
    if deadline_ms is not None and (
        not isinstance(deadline_ms, int) or isinstance(deadline_ms, bool) or deadline_ms < 0
    ):
        raise Malformed("deadline_ms must be a non-negative integer")
    if not isinstance(coordinators, list) or not all(isinstance(url, str) for url in coordinators):
        raise Malformed("coordinators must be a list of URLs")
    stamp = Stamp(epoch=epoch, floor=floor, deadline_ms=deadline_ms, coordinators=tuple(coordinators))
    return Prepare(gid=gid, branch=branch, payload=_json_bytes_of_foreign(body.get("payload"))), stamp


def answer_to_wire(message: Request, answer: Answer) -> tuple[int, dict[str, Any]]:
    """HTTP status and JSON body of a participant's answer to `message`."""
    match answer:
        case Prepared() | ReadOnly():
            body: dict[str, Any] = {"vote": "prepared" if isinstance(answer, Prepared) else "read_only"}
            if answer.result is not None:
                body["result"] = json_value(answer.result)
            return 200, body
        case Refused():
            return 200, {"vote": "refused", "reason": answer.reason, "retryable": answer.retryable}
        case Acked():
            return 200, {"state": "committed" if isinstance(message, Commit) else "aborted"}
        case Contradicted():
            return 409, {"state": answer.state}
        case StaleEpoch():
            return 409, {"code": "stale_epoch", "epoch": answer.epoch}
        case Pending():
            return 503, {"code": "pending"}


_REASON_LIMIT: Final = 1000


def answer_from_wire(message: Request, status: int, body: object) -> Answer:
    """What a participant answered to `message`. Raises `Malformed` for anything else: the answer is then unknown."""
    if not isinstance(body, dict):
        raise Malformed("the answer is not a JSON object")
    gid, branch = message.gid, message.branch
    if status == 503 and body.get("code") == "pending":
        return Pending(gid=gid, branch=branch)
    if status == 409:
        if body.get("code") == "stale_epoch":
            epoch = body.get("epoch")
            if not isinstance(epoch, int) or isinstance(epoch, bool):
                raise Malformed("stale_epoch without an epoch")
            return StaleEpoch(gid=gid, branch=branch, epoch=epoch)
        state = body.get("state")
        if isinstance(message, Prepare) or state not in ("working", "aborted", "committed", "unknown", "prepared"):
            raise Malformed(f"409 with state {_shown(state)}")
        return Contradicted(gid=gid, branch=branch, state=state)
    if status != 200:
        raise Malformed(f"status {status}")
    if not isinstance(message, Prepare):
        wanted = "committed" if isinstance(message, Commit) else "aborted"
        if body.get("state") != wanted:
            raise Malformed(f"state {_shown(body.get('state'))} where {wanted} was asked for")
        return Acked(gid=gid, branch=branch)
    vote = body.get("vote")
    if vote == "refused":
        reason, retryable = body.get("reason", "no reason given"), body.get("retryable", False)
        if not isinstance(reason, str) or not isinstance(retryable, bool):
            raise Malformed("reason must be a string and retryable a boolean")
        reason = reason.encode(errors="replace").decode()[:_REASON_LIMIT]
        return Refused(gid=gid, branch=branch, reason=reason, retryable=retryable)
    if vote not in ("prepared", "read_only"):
        raise Malformed(f"vote {_shown(vote)}")
    result = _json_bytes_of_foreign(body["result"]) if body.get("result") is not None else None
    if vote == "prepared":
        return Prepared(gid=gid, branch=branch, result=result)
    return ReadOnly(gid=gid, branch=branch, result=result)


# ------------------------------------------------------------------------------------------------ batches


def batch_to_bytes(items: list[dict[str, Any]]) -> tuple[str, bytes]:
    """Content type and body. msgpack, unless an integer is too large for it: JSON holds those."""
    try:
        return MSGPACK_TYPE, msgpack.packb(items)
    except (OverflowError, UnicodeEncodeError):
        return JSON_TYPE, json_bytes(items)


def batch_from_bytes(content_type: str, body: bytes) -> list[Any]:
    """The items of a batch, each still to be checked. Raises `Malformed`."""
    if content_type == MSGPACK_TYPE:
        try:
            items = msgpack.unpackb(body)
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise Malformed(f"not msgpack: {error}") from error
    else:
        items = json_value(body)
    if not isinstance(items, list):
        raise Malformed("a batch is a list")
    return items
