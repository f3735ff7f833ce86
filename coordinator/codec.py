"""Bytes to records and back: versioned, tagged msgpack for what is stored, plain JSON shapes for what participants see.

No pickle, here or anywhere: what is decoded here can only become the records that are named here.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

import msgpack

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

JSON_TYPE: Final = "application/json"
MSGPACK_TYPE: Final = "application/msgpack"


class Malformed(ValueError):
    """Bytes or a value that are not what they should be. The text says what is wrong, for people."""


# ------------------------------------------------------------------------------------------------ records


class RecordCodec:
    """Frozen dataclasses to msgpack arrays and back, by a table of tags.

    A record becomes `[tag, field, field, ...]` in the order of its definition. Fields may be added at the end of a
    record when they have a default: older bytes then decode to that default. Tags are never reused.
    """

    def __init__(self, types: Mapping[int, type]) -> None:
        self._types = dict(types)
        self._tags = {record: tag for tag, record in types.items()}
        self._names = {record: tuple(f.name for f in fields(record)) for record in self._tags}

    def to_plain(self, record: object) -> list[Any]:
        """Nested lists that msgpack can hold."""
        kind = type(record)
        return [self._tags[kind], *(self._field(getattr(record, name)) for name in self._names[kind])]

    def _field(self, value: object) -> Any:
        if type(value) in self._tags:
            return self.to_plain(value)
        if type(value) is tuple:
            return [self._field(item) for item in value]
        return value

    def from_plain(self, plain: object) -> Any:
        """The record that `to_plain` was given. Raises `Malformed`."""
        if not isinstance(plain, list) or not plain or not isinstance(plain[0], int):
            raise Malformed(f"not a tagged record: {plain!r:.80}")
        kind = self._types.get(plain[0])
        if kind is None:
            raise Malformed(f"unknown record tag {plain[0]}")
        names = self._names[kind]
        if len(plain) - 1 > len(names):
            raise Malformed(f"{kind.__name__} has {len(plain) - 1} fields, at most {len(names)} are known")
        values = {name: self._value(item) for name, item in zip(names, plain[1:], strict=False)}
        try:
            return kind(**values)
        except (TypeError, ValueError) as error:
            raise Malformed(f"{kind.__name__}: {error}") from error

    def _value(self, item: object) -> object:
        if not isinstance(item, list):
            return item
        # A record starts with its tag, a plain tuple of records starts with a list: the two cannot be confused,
        # because no record has a field that is a tuple of integers.
        if item and isinstance(item[0], int):
            return self.from_plain(item)
        return tuple(self._value(part) for part in item)


# ------------------------------------------------------------------------------------------------ JSON text


def json_bytes(value: object) -> bytes:
    """Compact JSON text, ASCII only (so that a lone surrogate survives), and never NaN."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _json_bytes_of_foreign(value: object) -> bytes:
    """`json_bytes` of what a participant sent, which msgpack may have filled with things that JSON lacks."""
    try:
        return json_bytes(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed(f"not a JSON value: {error}") from error


def json_value(text: bytes | str) -> Any:
    """What `text` spells. Raises `Malformed`; NaN and Infinity are not JSON."""

    def refuse(name: str) -> None:
        raise Malformed(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise Malformed("nested too deeply") from error
    except ValueError as error:
        if isinstance(error, Malformed):
            raise
        raise Malformed(str(error)) from error


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
            raise Malformed(f"409 with state {state!r:.40}")
        return Contradicted(gid=gid, branch=branch, state=state)
    if status != 200:
        raise Malformed(f"status {status}")
    if not isinstance(message, Prepare):
        wanted = "committed" if isinstance(message, Commit) else "aborted"
        if body.get("state") != wanted:
            raise Malformed(f"state {body.get('state')!r:.40} where {wanted} was asked for")
        return Acked(gid=gid, branch=branch)
    vote = body.get("vote")
    if vote == "refused":
        reason, retryable = body.get("reason", "no reason given"), body.get("retryable", False)
        if not isinstance(reason, str) or not isinstance(retryable, bool):
            raise Malformed("reason must be a string and retryable a boolean")
        reason = reason.encode(errors="replace").decode()[:_REASON_LIMIT]
        return Refused(gid=gid, branch=branch, reason=reason, retryable=retryable)
    if vote not in ("prepared", "read_only"):
        raise Malformed(f"vote {vote!r:.40}")
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
