"""`outlast tx`: transactions from the command line."""

import argparse
import asyncio
import json
import random
import sys
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

from cluster.answers import NotANode, page, participant, transaction
from cluster.calls import Answer, Caller, NotConnected, Unreachable, Unverified
from cluster.cli import FAILED, OK, UNKNOWN, USAGE, complain, print_json
from cluster.layout import read_running
from cluster.process import ProcessTrouble
from coordinator.codec import MAX_NESTING, Malformed, json_value, nested_too_deeply

_PATIENCE_S: Final = 10.0
"""For calls that wait for nothing: long enough for an election in between."""

_PAGES_MAX: Final = 100
"""A node looks at 20,000 transactions for a page, found or not: so many pages go through all that it can remember."""

_FILE_BYTES_MAX: Final = 16 << 20
"""Of a body in a file: more than any node takes."""
_NESTING_MAX: Final = 2 * MAX_NESTING
"""Of a body: what is in it is judged by the node, and has to get there."""

_DEFAULT_TIMEOUT_S: Final = 10.0
_WAIT_MAX_S: Final = 86_400.0
"""Nobody sits before a terminal for longer, whatever timeout a cluster allows; what then becomes of it is unknown."""
_MARGIN_S: Final = 2.0
"""A node answers a call that waits by the transaction's timeout and one second more."""


class Usage(Exception):
    """The arguments do not add up to a request."""


def with_nodes(arguments: argparse.Namespace, work: Callable[[argparse.Namespace, Caller], Awaitable[int]]) -> int:
    """Do `work` with connections to the nodes that the arguments name; the exit status. Raises `ProcessTrouble`."""

    async def run() -> int:
        urls, token_file, ca = _nodes(arguments)
        async with Caller(urls, token=read_token(token_file), ca=ca) as caller:
            return await work(arguments, caller)

    try:
        return asyncio.run(run())
    except Usage as error:
        return complain(error, USAGE)
    except Unverified as error:
        return complain(error, FAILED)
    except NotConnected as error:
        return complain(f"it was not done: {error}; look at the cluster with `outlast status`", FAILED)
    except Unreachable as error:
        return complain(f"{error}; look at the cluster with `outlast status`", UNKNOWN)


def _nodes(arguments: argparse.Namespace) -> tuple[Sequence[str], Path | None, Path | None]:
    """Whom to ask, the file of the token that they want, and of the authority that issued their certificates."""
    if arguments.url:
        for url in arguments.url:
            if not is_base(url):
                raise Usage(f"--url {url} is not a node's URL, such as http://127.0.0.1:7400")
        return list(arguments.url), arguments.token_file, arguments.ca
    running = read_running(arguments.data)
    if running is None:
        raise ProcessTrouble(f"there is no cluster in {arguments.data}; name its --data, or a node with --url")
    alive = [row.url for row in running.nodes if row.identity is not None and row.identity.alive]
    if not alive:
        raise ProcessTrouble(f"no node runs in {arguments.data}; start them with `outlast up --data {arguments.data}`")
    random.shuffle(alive)
    token_file = arguments.token_file or (Path(running.token_file) if running.token_file is not None else None)
    return alive, token_file, arguments.ca or (Path(running.ca) if running.ca is not None else None)


def participant_access(arguments: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """The file of the token that participants want, and their authority: a local cluster's are in its folder."""
    token_file, ca = arguments.participant_token_file, arguments.participant_ca
    running = None if arguments.url else read_running(arguments.data)
    if running is None:
        return token_file, ca
    own = arguments.data / "tls" / "participant-token"
    if token_file is None and own.exists():
        token_file = own
    return token_file, ca or (Path(running.ca) if running.ca is not None else None)


def is_base(url: str) -> bool:
    """Whether paths can be put behind `url`."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # half a pair of brackets, or a port that is none
        return False
    plain = url.isprintable() and " " not in url and not (parts.query or parts.fragment)
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0


def read_token(file: Path | None) -> str | None:
    """The bearer token that a file holds, if one is named. Raises `Usage`."""
    if file is None:
        return None
    try:
        # Of several tokens, which is what a change of token looks like, the first is the one in use.
        token = file.read_text("ascii").split()[0]
    except OSError as error:
        raise Usage(f"{file} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, IndexError):
        raise Usage(f"{file} holds no token") from None  # the cause holds what is in the file
    if not token.isprintable():
        raise Usage(f"{file} holds no token")
    return token


# ------------------------------------------------------------------------------------------------ submit


def submit(arguments: argparse.Namespace) -> int:
    """Begin a transaction, and wait as far as was asked for."""
    return with_nodes(arguments, _submit)


async def _submit(arguments: argparse.Namespace, caller: Caller) -> int:
    body = _body(arguments)
    wait_s = wait_for(body.get("timeout_s", _DEFAULT_TIMEOUT_S))
    # With a key of our own the request can go to another node when one does not answer.
    key = arguments.key or f"cli-{uuid.uuid4()}"
    answer = await caller.anywhere(
        "POST",
        "/v1/transactions",
        body=body,
        headers={"Idempotency-Key": key},
        within_s=wait_s + _PATIENCE_S,
        try_s=wait_s,
    )
    if answer.status not in (200, 202):
        return _refused(arguments, answer)
    txn = transaction(answer)
    _show(arguments, txn)
    if txn["decision"] == "commit":
        return OK if body.get("wait") != "ended" or answer.status == 200 else _not_yet(txn)
    if txn["decision"] == "abort":
        return complain(f"{txn['gid']} aborted: {_reason(txn)}", FAILED)
    return OK if body.get("wait") == "none" else _not_yet(txn)


def wait_for(timeout_s: object) -> float:
    """Seconds to wait for the answer to a transaction of that timeout."""
    if not isinstance(timeout_s, int | float) or not timeout_s > 0:
        timeout_s = _DEFAULT_TIMEOUT_S  # it is refused at once
    return min(timeout_s, _WAIT_MAX_S) + _MARGIN_S


def _body(arguments: argparse.Namespace) -> dict[str, Any]:
    if bool(arguments.file) == bool(arguments.branch):
        raise Usage("give either --branch PARTICIPANT=JSON, once per branch, or --file FILE")
    body = _read(arguments.file) if arguments.file else {"branches": [_branch(text) for text in arguments.branch]}
    if arguments.protocol is not None:
        body["protocol"] = arguments.protocol
    if arguments.timeout is not None:
        body["timeout_s"] = arguments.timeout
    if arguments.wait is not None:
        body["wait"] = arguments.wait
    return body


def _branch(text: str) -> dict[str, Any]:
    participant, equals, payload = text.partition("=")
    if not participant or not equals:
        raise Usage(f"--branch {text} is not PARTICIPANT=JSON")
    try:
        return {"participant": participant, "payload": _json(payload.encode())}
    except ValueError as error:
        raise Usage(f"--branch {participant}: the payload is not JSON ({error}); quote it for the shell") from error


def _read(file: str) -> dict[str, Any]:
    try:
        if file == "-":
            text = sys.stdin.read(_FILE_BYTES_MAX + 1).encode()
        else:
            with Path(file).open("rb") as opened:
                text = opened.read(_FILE_BYTES_MAX + 1)
        if len(text) > _FILE_BYTES_MAX:
            raise Usage(f"{file} holds more than {_FILE_BYTES_MAX} bytes")
        body = _json(text)
    except OSError as error:
        raise Usage(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Usage(f"{file} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Usage(f"{file} holds no JSON object")
    return body


def _json(text: bytes) -> Any:
    """Raises ValueError."""
    if nested_too_deeply(text, _NESTING_MAX):
        raise Malformed("nested too deeply")
    return json_value(text)


def _not_yet(txn: dict[str, Any]) -> int:
    return complain(f"{txn['gid']} is still {txn['state']}; ask again with `outlast tx show {txn['gid']}`", UNKNOWN)


# ------------------------------------------------------------------------------------------------ show, list, abort


def show(arguments: argparse.Namespace) -> int:
    """One transaction."""
    return with_nodes(arguments, _show_one)


async def _show_one(arguments: argparse.Namespace, caller: Caller) -> int:
    query = f"?wait={arguments.wait}" if arguments.wait else ""
    answer = await caller.anywhere(
        "GET",
        f"/v1/transactions/{quote(arguments.gid, safe='')}{query}",
        within_s=_PATIENCE_S + _DEFAULT_TIMEOUT_S,
        try_s=_DEFAULT_TIMEOUT_S + _MARGIN_S,
    )
    if answer.status not in (200, 202):
        return _refused(arguments, answer)
    txn = transaction(answer)
    _show(arguments, txn)
    return OK if answer.status == 200 else _not_yet(txn)


def listing(arguments: argparse.Namespace) -> int:
    """Transactions, newest first."""
    return with_nodes(arguments, _list)


async def _list(arguments: argparse.Namespace, caller: Caller) -> int:
    found: list[dict[str, Any]] = []
    after = arguments.after
    # A page may be short, or empty, although more follow: a node looks at so many transactions at a time.
    for _ in range(_PAGES_MAX):
        query = {"state": arguments.state, "after": after, "limit": arguments.limit - len(found)}
        query["heuristic"] = "true" if arguments.heuristic else None
        path = f"/v1/transactions?{urlencode({name: value for name, value in query.items() if value is not None})}"
        answer = await caller.anywhere("GET", path, within_s=_PATIENCE_S)
        if answer.status != 200:
            return _refused(arguments, answer)
        rows, after = page(answer)
        found += rows
        if after is None or len(found) >= arguments.limit:
            break
    if arguments.json:
        print_json({"transactions": found, "next": after})
        return OK
    for txn in found:
        branches = ", ".join(f"{branch['branch']} {branch['state']}" for branch in txn["branches"])
        heuristic = f"  {txn['heuristic']}" if "heuristic" in txn else ""
        print(f"{txn['gid']:<20} {txn['state']:<11} {txn['started_at']}  {branches}{heuristic}")
    if after is not None:
        print(f"more: --after {after}")
    return OK


def abort(arguments: argparse.Namespace) -> int:
    """Ask for an abort."""
    return with_nodes(arguments, _abort)


async def _abort(arguments: argparse.Namespace, caller: Caller) -> int:
    path = f"/v1/transactions/{quote(arguments.gid, safe='')}/abort"
    answer = await caller.anywhere("POST", path, within_s=_PATIENCE_S)
    if answer.status not in (200, 202):
        return _refused(arguments, answer)
    txn = transaction(answer)
    _show(arguments, txn)
    if txn["decision"] == "abort":
        return OK
    if txn["decision"] == "commit":
        return complain(f"{txn['gid']} had been decided already, and commits", FAILED)
    return _not_yet(txn)


# ------------------------------------------------------------------------------------------------ by hand


def resolve(arguments: argparse.Namespace) -> int:
    """Record that a branch is ended by hand, and on request tell its participant."""
    return with_nodes(arguments, _resolve)


async def _resolve(arguments: argparse.Namespace, caller: Caller) -> int:
    path = f"/v1/transactions/{quote(arguments.gid, safe='')}"
    body = {"branch": arguments.branch, "outcome": arguments.outcome, "note": arguments.note}
    answer = await caller.anywhere("POST", f"{path}/resolve", body=body, within_s=_PATIENCE_S)
    if answer.status != 200:
        return _refused(arguments, answer)
    txn = transaction(answer)
    branch = next((branch for branch in txn["branches"] if branch["branch"] == arguments.branch), None)
    if branch is None:
        raise NotANode(f"what answers is not a node: {txn['gid']} is shown without the branch {arguments.branch}")
    if not arguments.tell:
        _show(arguments, txn)
        if not arguments.json:
            print("recorded; the participant was not told: end the branch in its database, or repeat this with --tell")
        return OK
    return await _tell(arguments, caller, txn, branch["participant"])


async def _tell(arguments: argparse.Namespace, caller: Caller, txn: dict[str, Any], name: str) -> int:
    """Ask the participant for what was recorded; nobody else does any more."""
    answer = await caller.anywhere("GET", f"/v1/participants/{name}", within_s=_PATIENCE_S)
    if answer.status != 200:
        return _refused(arguments, answer)
    url = str(participant(answer)["url"])
    body = {"gid": txn["gid"], "branch": arguments.branch, "epoch": txn["epoch"]}
    told: dict[str, Any] = {"participant": name, "status": None, "state": None, "trouble": None}
    try:
        token_file, ca = participant_access(arguments)
        async with Caller([url], token=read_token(token_file), ca=ca) as direct:
            heard = await direct.once("POST", f"{url}/{arguments.outcome}", body=body, within_s=_PATIENCE_S)
    except Unreachable as error:
        told["trouble"], status = str(error), UNKNOWN
        said = f"recorded; {name} was asked for the {arguments.outcome}, and it is not known whether it did it: {error}"
    else:
        told["status"] = heard.status
        state = heard.body.get("state") if isinstance(heard.body, dict) else None
        told["state"] = state
        if heard.status == 200:
            status, said = OK, f"recorded, and {name} has done it"
        elif heard.status == 409:
            status = FAILED
            said = f"recorded; but {name} says that its branch is {state}, and did nothing: look into its database"
        else:
            told["trouble"] = heard.trouble
            status, said = UNKNOWN, f"recorded; {name} was asked for the {arguments.outcome}, and said: {heard.trouble}"
    if arguments.json:
        print_json({**txn, "told": told})
    else:
        _show(arguments, txn)
        if status == OK:
            print(said)
    return status if status == OK else complain(said, status)


def acknowledge(arguments: argparse.Namespace) -> int:
    """Record that what was resolved by hand is seen to."""
    return with_nodes(arguments, _acknowledge)


async def _acknowledge(arguments: argparse.Namespace, caller: Caller) -> int:
    path = f"/v1/transactions/{quote(arguments.gid, safe='')}/acknowledge"
    answer = await caller.anywhere("POST", path, within_s=_PATIENCE_S)
    if answer.status != 200:
        return _refused(arguments, answer)
    _show(arguments, transaction(answer))
    return OK


# ------------------------------------------------------------------------------------------------ saying it


def _refused(arguments: argparse.Namespace, answer: Answer) -> int:
    if arguments.json:
        print_json(answer.body)
    # After 503 a request may or may not have been done: only the same key tells.
    return complain(answer.trouble, UNKNOWN if answer.status == 503 else FAILED)


def _show(arguments: argparse.Namespace, txn: dict[str, Any]) -> None:
    if arguments.json:
        print_json(txn)
        return
    print(f"{txn['gid']}  {txn['state']}  started {txn['started_at']}" + _ended(txn))
    for branch in txn["branches"]:
        result = f"  {json.dumps(branch['result'])}" if "result" in branch else ""
        reason = f"  {branch['reason']}" if branch.get("reason") else ""
        name = branch["branch"]
        if branch["participant"] != name:
            name += f" ({branch['participant']})"
        print(f"  {name:<20} {branch['state']}{reason}{result}")
        if resolved := branch.get("resolved"):
            note = f": {resolved['note']}" if resolved["note"] else ""
            print(f"  {'':<20} {resolved['outcome']} by an operator, {resolved['at']}{note}")
    for each in txn.get("waiting_for", ()):
        print(f"  waits for {awaited(each)}")
    if "heuristic" in txn:
        seen_to = f"acknowledged {txn['acknowledged_at']}" if txn.get("acknowledged_at") else "not acknowledged"
        print(f"  heuristic: {txn['heuristic']}, {seen_to}")


def awaited(each: dict[str, Any]) -> str:
    """What an unfinished transaction waits for, in words."""
    match each["for"]:
        case "application":
            return "its application, which has not asked for the commit"
        case "operator":
            return f"an operator: {each['participant']} says that its branch is {each['trouble']}, against the decision"
        case what:
            words = {"vote": "the vote", "ack": "the acknowledgement"}.get(what, what)
            down = f", which has not answered since {each['down_since']}" if each["down_since"] else ""
            trouble = f": {each['trouble']}" if each["trouble"] else ""
            return f"{words} of {each['participant']} (branch {each['branch']}){down}{trouble}"


def _ended(txn: dict[str, Any]) -> str:
    at = txn["ended_at"] or txn["decided_at"]
    return f", {'ended' if txn['ended_at'] else 'decided'} {at}" if at else ""


def _reason(txn: dict[str, Any]) -> str:
    refused = [f"{branch['branch']}: {branch['reason']}" for branch in txn["branches"] if branch.get("reason")]
    return "; ".join(refused) or txn.get("reason") or "no reason given"
