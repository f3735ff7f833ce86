"""What clients send, made into what the driver takes; every complaint names the field and says what it should be."""

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from coordinator.codec import MAX_NESTING, Malformed, json_bytes, json_value, nested_too_deeply
from coordinator.config import MAX_NAME, Limits, valid_name, valid_url
from coordinator.driver import NewTransaction
from coordinator.errors import BadRequest, TooLarge, Unprocessable
from coordinator.protocol.entries import BranchPlan
from coordinator.protocol.registry import DEFAULT_PROTOCOL, PROTOCOLS
from coordinator.protocol.transaction import Decision, State

WAITS: Final = ("none", "decided", "ended")
NOTE_MAX: Final = 500
"""Characters of an operator's note: it stays in the ledger, and in every copy of it."""


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` spells. Raises `BadRequest`."""
    try:
        value = json_value(body)
    except (Malformed, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value


def new_transaction(body: Mapping[str, Any], key: str | None, limits: Limits) -> tuple[NewTransaction, str]:
    """The transaction and `wait` of a `POST /v1/transactions`. Raises `Unprocessable`, `TooLarge`.

    Without a key, nothing will ever be compared with what was asked for, and there is no hash of it.
    """
    _only(body, ("protocol", "branches", "timeout_s", "wait"), "the body")
    protocol = _protocol(body)
    branches = _branches(body.get("branches"), limits)
    timeout_s = duration_s(body.get("timeout_s", limits.default_timeout_s), limits)
    body_hash = None
    if key is not None:
        # `wait` is left out of the hash: a client may retry with more patience.
        plain = [protocol, [[plan.name, plan.participant, plan.payload.decode()] for plan in branches], timeout_s]
        body_hash = _hash_of(plain)
    new = NewTransaction(
        protocol=protocol,
        branches=branches,
        timeout_ms=max(1, round(timeout_s * 1000)),
        key=key,
        body_hash=body_hash,
    )
    return new, wait(body.get("wait", "decided"))


def application_transaction(body: Mapping[str, Any], key: str | None, limits: Limits) -> NewTransaction:
    """The transaction of a `POST /v1/transactions/begin`. Raises `Unprocessable`."""
    _only(body, ("protocol", "timeout_s"), "the body")
    protocol = _protocol(body)
    timeout_s = duration_s(body.get("timeout_s", limits.default_timeout_s), limits)
    return NewTransaction(
        protocol=protocol,
        branches=(),
        timeout_ms=max(1, round(timeout_s * 1000)),
        key=key,
        # Never the hash of a transaction that is submitted whole: a key names one or the other.
        body_hash=None if key is None else _hash_of(["begin", protocol, timeout_s]),
        active=True,
    )


def _hash_of(plain: object) -> bytes:
    return hashlib.sha256(json_bytes(plain)).digest()[:16]


def enlistment(body: Mapping[str, Any]) -> tuple[str, str]:
    """Branch and participant of a `POST /v1/transactions/{gid}/branches`. Raises `Unprocessable`."""
    _only(body, ("participant", "branch"), "the body")
    return _names(body, "the body")


def seal(body: Mapping[str, Any], limits: Limits) -> tuple[tuple[str, ...], str]:
    """Names of the branches, and `wait`, of a `POST /v1/transactions/{gid}/commit`. Raises `Unprocessable`."""
    _only(body, ("branches", "wait"), "the body")
    names = body.get("branches")
    if not isinstance(names, list) or not all(isinstance(name, str) and valid_name(name) for name in names):
        raise Unprocessable("branches must be the list of the branches' names", code="no_branches")
    if len(names) > limits.max_branches:
        raise _too_many_branches(len(names), limits)
    for name in names:
        if names.count(name) > 1:
            raise Unprocessable(f"branch {name} is there twice", code="duplicate_branch")
    return tuple(names), wait(body.get("wait", "decided"))


def resolution(body: Mapping[str, Any]) -> tuple[str, Decision, str | None]:
    """Branch, outcome and note of a `POST /v1/transactions/{gid}/resolve`. Raises `Unprocessable`."""
    _only(body, ("branch", "outcome", "note"), "the body")
    branch, outcome, note = body.get("branch"), body.get("outcome"), body.get("note")
    if not isinstance(branch, str) or not valid_name(branch):
        raise Unprocessable("branch must be the name of a branch of this transaction")
    if outcome not in tuple(Decision):
        raise Unprocessable("outcome must be commit or abort", code="invalid_outcome")
    if note is not None and (not isinstance(note, str) or len(note) > NOTE_MAX or not _is_text(note)):
        raise Unprocessable(f"note must be a text of at most {NOTE_MAX} characters", code="invalid_note")
    return branch, Decision(outcome), note or None


def _is_text(note: str) -> bool:
    """Whether the log and a terminal can take it."""
    return all(char.isprintable() or char == "\n" for char in note)


def _protocol(body: Mapping[str, Any]) -> str:
    protocol = body.get("protocol", DEFAULT_PROTOCOL)
    if protocol not in tuple(PROTOCOLS):
        raise Unprocessable(f"protocol must be one of {', '.join(PROTOCOLS)}", code="unknown_protocol")
    return str(protocol)


def _too_many_branches(count: int, limits: Limits) -> Unprocessable:
    return Unprocessable(f"{count} branches; at most {limits.max_branches} (max_branches)", code="too_many_branches")


def _branches(value: object, limits: Limits) -> tuple[BranchPlan, ...]:
    if not isinstance(value, list):
        raise Unprocessable("branches must be a list", code="no_branches")
    if not value:
        raise Unprocessable("branches is empty: a transaction has at least one", code="no_branches")
    if len(value) > limits.max_branches:
        raise _too_many_branches(len(value), limits)
    plans = tuple([_branch(item, f"branches[{index}]", limits) for index, item in enumerate(value)])
    names = [plan.name for plan in plans]
    for name in names:
        if names.count(name) > 1:
            raise Unprocessable(
                f"two branches are called {name!r}; give each a `branch` of its own", code="duplicate_branch"
            )
    return plans


def _branch(value: object, where: str, limits: Limits) -> BranchPlan:
    if not isinstance(value, dict):
        raise Unprocessable(f"{where} must be an object")
    _only(value, ("participant", "branch", "payload"), where)
    name, participant = _names(value, where)
    try:
        payload = json_bytes(value.get("payload"))
    except ValueError as error:
        # 1e999 is JSON, but reads as infinity.
        raise BadRequest(f"{where}.payload holds a number that is too large") from error
    except RecursionError as error:
        raise _too_deep(where) from error
    if nested_too_deeply(payload):
        raise _too_deep(where)
    if len(payload) > limits.max_payload_bytes:
        raise TooLarge(
            f"{where}.payload has {len(payload)} bytes; at most {limits.max_payload_bytes} (max_payload_bytes)"
        )
    return BranchPlan(name=name, participant=participant, payload=payload)


def _too_deep(where: str) -> Unprocessable:
    return Unprocessable(f"{where}.payload is nested more than {MAX_NESTING} deep", code="too_deep")


def _names(value: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Of a branch: its own, and its participant's."""
    participant = value.get("participant")
    if not isinstance(participant, str) or not valid_name(participant):
        raise Unprocessable(f"{where}.participant must be the name of a registered participant")
    name = value.get("branch", participant)
    if name is not participant and (not isinstance(name, str) or not valid_name(name)):
        raise Unprocessable(
            f"{where}.branch must be 1 to {MAX_NAME} lower-case letters, digits and inner hyphens, letter first"
        )
    return name, participant


def duration_s(value: object, limits: Limits) -> float:
    """A timeout, in seconds. Raises `Unprocessable`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= limits.max_timeout_s:
        raise Unprocessable(
            f"timeout_s must be a number of seconds above 0 and at most {limits.max_timeout_s:g} (max_timeout_s)",
            code="invalid_timeout",
        )
    return float(value)


def wait(value: object) -> str:
    """One of `WAITS`. Raises `Unprocessable`."""
    if value not in WAITS:
        raise Unprocessable(f"wait must be one of {', '.join(WAITS)}", code="invalid_wait")
    return str(value)


def idempotency_key(value: str | None, limits: Limits) -> str | None:
    """The key of the request's header, if any. Raises `BadRequest`."""
    if value is None:
        return None
    if not 0 < len(value) <= limits.max_key_length or not value.isascii() or not value.isprintable():
        raise BadRequest(
            f"Idempotency-Key must be 1 to {limits.max_key_length} printable ASCII characters (max_key_length)"
        )
    return value


def registration(name: str, body: Mapping[str, Any]) -> tuple[str, bool]:
    """URL and batch flag of a `PUT /v1/participants/{name}`. Raises `Unprocessable`."""
    if not valid_name(name):
        raise Unprocessable(
            f"a participant's name is 1 to {MAX_NAME} lower-case letters, digits and inner hyphens, letter first",
            code="invalid_name",
        )
    _only(body, ("url", "batch"), "the body")
    url, batch = body.get("url"), body.get("batch", False)
    if not isinstance(url, str) or not valid_url(url):
        raise Unprocessable(
            "url must be http(s)://host[:port][/path], without user, query or fragment", code="invalid_url"
        )
    if not isinstance(batch, bool):
        raise Unprocessable("batch must be true or false")
    return url.rstrip("/"), batch


def page(query: Mapping[str, str], limits: Limits) -> tuple[State | None, str | None, int, bool]:
    """State, after and limit of a listing, and whether of heuristics only. Raises `Unprocessable`."""
    _only(query, ("state", "after", "limit", "heuristic"), "the query")
    heuristic = query.get("heuristic", "false")
    if heuristic not in ("true", "false"):
        raise Unprocessable("heuristic must be true or false")
    state, limit = query.get("state") or None, query.get("limit", "100")
    if state is not None and state not in tuple(State):
        raise Unprocessable(f"state must be one of {', '.join(State)}")
    if not limit.isascii() or not limit.isdigit() or len(limit) > 10 or not 0 < int(limit) <= limits.max_page:
        raise Unprocessable(f"limit must be a number from 1 to {limits.max_page} (max_page)")
    chosen = State(state) if state is not None else None
    return chosen, query.get("after") or None, int(limit), heuristic == "true"


def _only(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in values:
        if name not in known:
            raise Unprocessable(
                f"{where} has no field {name[:100]!r}; there are {', '.join(known)}", code="unknown_field"
            )
