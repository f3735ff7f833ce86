"""The Python client: transactions by any node of a cluster.

    from coordinator.client import Branch, Client

    async with Client(["http://127.0.0.1:7401", "http://127.0.0.1:7402", "http://127.0.0.1:7403"]) as client:
        txn = await client.submit(
            [
                Branch("inventory", {"op": "reserve", "sku": "apple", "count": 2}),
                Branch("payments", {"op": "charge", "account": "alice", "cents": 500}),
            ],
            timeout_s=10,
        )
        if txn.committed:
            print(txn.gid, "committed at", txn.decided_at)
        else:
            print(txn.gid, "did not commit:", txn.reason)

With `client.transaction()` an application works on its own database connections instead: `client_transaction.py`.

A decision to abort is an answer, not an exception; `txn.raise_for_abort()` or `submit(..., or_raise=True)` make it one.

Retries
-------
Every call may be repeated safely, and is, until it is answered or its time is over: a submission carries an
`Idempotency-Key` (its own, when none is given), so that all tries name one transaction. A try that a node does not
answer within `try_timeout_s` is given up and made at the next node; a node that answers is asked first from then on,
or the leader, once a node has said who that is. When no node could do it, a pause follows: it doubles up to a cap, with
jitter. An overloaded cluster is left alone for as long as its `Retry-After` says.

Errors
------
They are split by two questions: was it done, and whose fault is it?

| error | was it done? | what to do |
|---|---|---|
| `InvalidRequest`, `KeyReused` | no, and never will be | correct the request |
| `NotAllowed` | no | show the right token |
| `NotFound`, `Forgotten`, `Conflict` | no | look again at what is asked for |
| `Overloaded` | no | come back later |
| `Unavailable`, `NotKnownYet` | no | try again |
| `OutcomeUnknown` | nobody knows | submit again with its `key`: that finds the same transaction |
| `TransactionAborted` | no: all of it was undone | look at `retryable` and `reason` |

The client imports nothing of a node, keeps no state but its connections, and belongs to one event loop.
"""

import asyncio
import ipaddress
import json
import os
import random
import ssl
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import aiohttp
from yarl import URL

from coordinator.client_results import (
    Branch,
    BranchResult,
    ClientError,
    Cluster,
    Conflict,
    Definite,
    Forgotten,
    Indefinite,
    InvalidRequest,
    KeyReused,
    Node,
    NotAllowed,
    NotFound,
    NotKnownYet,
    OutcomeUnknown,
    Overloaded,
    Participant,
    TransactionAborted,
    TransactionResult,
    Unavailable,
    read_cluster,
    read_outcome,
    read_page,
    read_participant,
    read_participants,
    read_transaction,
)
from coordinator.client_transaction import ApplicationTransaction, Enlistable, OpenBranch
from coordinator.protocol.transaction import Decision, State

__all__ = [
    "ApplicationTransaction",
    "Branch",
    "BranchResult",
    "Client",
    "ClientError",
    "Cluster",
    "Conflict",
    "Decision",
    "Definite",
    "Enlistable",
    "Forgotten",
    "Indefinite",
    "InvalidRequest",
    "KeyReused",
    "Node",
    "NotAllowed",
    "NotFound",
    "NotKnownYet",
    "OpenBranch",
    "OutcomeUnknown",
    "Overloaded",
    "Participant",
    "State",
    "TransactionAborted",
    "TransactionResult",
    "Unavailable",
]

Wait = Literal["none", "decided", "ended"]
"""How far a transaction is to be before it is returned: begun, decided, or acknowledged by every participant."""

MAX_ANSWER_BYTES: Final = 64 << 20
"""More than a page of a thousand transactions; a larger answer comes from something that is no node."""

MAX_KEY: Final = 255
BACKOFF_MIN_S: Final = 0.05
BACKOFF_MAX_S: Final = 1.0

_LEAST_TRY_S: Final = 0.1
"""A try gets so long at least, and none is begun with less time left: it would tell nothing, and hide what is known."""

_CONNECT_TIMEOUT_S: Final = 1.0
_ANSWER_MARGIN_S: Final = 1.0
"""A node is asked to answer this much before the try is given up: what is late is then not slow, but hanging."""

_NOT_DONE_CODES: Final = ("no_leader", "not_leader", "shutting_down", "too_many_connections", "not_before_upgrade")
"""Codes of a failed try that say that nothing was done by it."""

_T = TypeVar("_T")

_BY_STATUS: Final[Mapping[int, type[Definite]]] = {
    401: NotAllowed,
    403: NotAllowed,
    404: NotFound,
    409: Conflict,
    410: Forgotten,
}

# ------------------------------------------------------------------------------------------------ tries


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What a node said. `leader`: the URL of the node that this one passed the request on to."""

    status: int
    body: Any
    retry_after_s: float | None
    leader: str | None

    @property
    def code(self) -> str | None:
        code = self.body.get("code") if isinstance(self.body, dict) else None
        return code if isinstance(code, str) else None

    @property
    def detail(self) -> str:
        if isinstance(self.body, dict):
            for name in ("detail", "title"):
                if isinstance(self.body.get(name), str):
                    return str(self.body[name])
        return f"status {self.status}"


class _Failed(Exception):
    """A try without an answer that ends the call. `done`: it may have had an effect. The text says what happened."""

    def __init__(self, trouble: str, *, done: bool, answer: _Answer | None = None) -> None:
        super().__init__(trouble)
        self.done = done
        self.answer = answer


class Client:
    """Talks to the nodes at `urls`. Use it as an async context manager; see the module's text.

    token: shown to every node as a bearer token.
    ca: a file with the authority that issued the nodes' certificates, for https; else the system's are trusted.
    certificate, key: files; shown to nodes that take a client certificate instead of the token.
    try_timeout_s: how long one node may take to answer; above the 3 s within which a node says that it has no leader.
    patience_s: how long a call goes on trying beyond what it waits for.
    rng: spreads the pauses; tests give a seeded one.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        token: str | None = None,
        ca: str | os.PathLike[str] | None = None,
        certificate: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        try_timeout_s: float = 4.0,
        patience_s: float = 10.0,
        rng: random.Random | None = None,
    ) -> None:
        if isinstance(urls, str) or not urls:
            raise ValueError("urls must be a list of at least one node's URL")
        if try_timeout_s <= 0 or patience_s <= 0:
            raise ValueError("try_timeout_s and patience_s must be positive")
        self._nodes = tuple(_node_url(url) for url in urls)
        self._headers = {"Accept-Encoding": "identity"}
        if token is not None:
            if not token or not token.isascii() or not token.isprintable() or " " in token:
                raise ValueError("a token is printable ASCII without spaces")
            exposed = [url for url in self._nodes if url.startswith("http://") and not _is_loopback(url)]
            if exposed:
                raise ValueError(f"a token goes beyond loopback only over TLS: use the https URL of {exposed[0]}")
            self._headers["Authorization"] = f"Bearer {token}"
        if (certificate is None) != (key is None):
            raise ValueError("certificate and key go together")
        self._tls: ssl.SSLContext | bool = True
        if ca is not None or certificate is not None:
            self._tls = ssl.create_default_context(cafile=ca)
            if certificate is not None:
                self._tls.load_cert_chain(certificate, key)
        self._try_timeout_s = try_timeout_s
        self._patience_s = patience_s
        self._rng = rng if rng is not None else random.Random()  # noqa: S311  # spreads retries, keeps no secret
        self._first = 0
        """The node that is asked first: the last one that answered, or the leader it named."""
        self._session: aiohttp.ClientSession | None = None
        self._sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def __aenter__(self) -> Self:
        if self._session is not None:
            raise RuntimeError("this client is in use already")
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0, ssl=self._tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give up the connections; calls that are under way fail."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # -------------------------------------------------------------------------------------------- transactions

    async def submit(
        self,
        branches: Sequence[Branch | Mapping[str, Any]],
        *,
        timeout_s: float = 10.0,
        wait: Wait = "decided",
        key: str | None = None,
        protocol: str | None = None,
        or_raise: bool = False,
        patience_s: float | None = None,
    ) -> TransactionResult:
        """Begin a transaction, or find the one that `key` names, and wait until it is as far as `wait` says.

        branches: `Branch` objects, or dicts with `participant`, `payload` and perhaps `branch`.
        timeout_s: the cluster aborts the transaction when it is undecided by then.
        key: makes repeated calls name one transaction; one is made for this call when it is left out.
        or_raise: return only a transaction whose decision is to commit.
        patience_s: how long to go on trying beyond `timeout_s`; the client's own when left out.

        The result may be less far than asked for when time runs out on the way: its `decision` tells.

        Raises `InvalidRequest`, `KeyReused`, `NotAllowed`, `Overloaded`, `Unavailable` (not begun), `OutcomeUnknown`;
        with `or_raise` also `TransactionAborted`, and `OutcomeUnknown` while it is undecided. ValueError or TypeError
        when the request cannot be written as JSON: nothing was sent then.
        """
        if or_raise and wait == "none":
            raise ValueError("or_raise needs a decision to look at: wait for 'decided' or 'ended'")
        key = f"client-{uuid.uuid4()}" if key is None else _valid_key(key)
        request: dict[str, Any] = {
            "branches": [item.to_json() if isinstance(item, Branch) else dict(item) for item in branches],
            "timeout_s": timeout_s,
            "wait": wait,
        }
        if protocol is not None:
            request["protocol"] = protocol
        until_s = self._until(patience_s, _seconds(timeout_s) if wait != "none" else 0.0)
        txn = await self._call(
            "POST",
            "/v1/transactions",
            read_transaction,
            body=request,
            headers={"Idempotency-Key": key},
            until_s=until_s,
            key=key,
        )
        txn = replace(await self._follow(txn, wait, until_s), key=key)
        if not or_raise:
            return txn
        if txn.decision is None:
            raise OutcomeUnknown(f"{txn.gid} is still {txn.state.value}; ask for it again", key=key, gid=txn.gid)
        return txn.raise_for_abort()

    async def get(self, gid: str, *, wait: Wait | None = None, patience_s: float | None = None) -> TransactionResult:
        """The transaction, at once, or when it is as far as `wait` says or `patience_s` is over.

        Raises `NotFound`, `Forgotten`, `NotAllowed`, `Unavailable`.
        """
        until_s = self._until(patience_s)
        txn = await self._call("GET", _path("transactions", gid), read_transaction, until_s=until_s, harmless=True)
        return await self._follow(txn, wait or "none", until_s)

    async def list(self, *, state: State | str | None = None, page: int = 100) -> AsyncIterator[TransactionResult]:
        """Every transaction that the cluster remembers, newest first; `state` keeps only those.

        Pages of at most `page` are asked for as they are needed. Raises `InvalidRequest`, `NotAllowed`, `Unavailable`.
        """
        query: dict[str, str] = {"limit": str(page)} | ({} if state is None else {"state": str(state)})
        while True:
            path = f"/v1/transactions?{urlencode(query)}"
            found, more = await self._call("GET", path, read_page, until_s=self._until(None), harmless=True)
            for txn in found:
                yield txn
            if more is None:
                return
            query["after"] = more

    async def abort(self, gid: str, *, patience_s: float | None = None) -> TransactionResult:
        """Ask for an abort. The result holds the stored decision, which may be to commit.

        Raises `NotFound`, `Forgotten`, `NotAllowed`, `Unavailable`, `OutcomeUnknown`.
        """
        path = f"{_path('transactions', gid)}/abort"
        return await self._call("POST", path, read_transaction, until_s=self._until(patience_s), gid=gid)

    async def outcome(self, gid: str, *, patience_s: float | None = None) -> Decision:
        """How a transaction ended, as a participant in doubt asks for it. A question that decides: a transaction of
        which the cluster knows nothing, and that might still begin, is aborted by it.

        Raises `NotKnownYet` when it is undecided for as long as this call is patient; `NotFound`, `Forgotten`.
        """
        return await self._call(
            "GET", _path("outcomes", gid), read_outcome, until_s=self._until(patience_s), harmless=True
        )

    # -------------------------------------------------------------------------------------------- an application's own

    def transaction(
        self,
        *,
        timeout_s: float = 10.0,
        key: str | None = None,
        protocol: str | None = None,
        patience_s: float | None = None,
    ) -> ApplicationTransaction:
        """A transaction in which the application works on its own connections: `async with client.transaction() as tx`.

        timeout_s: for all of it, from here to the last vote; the cluster aborts what is undecided then.
        patience_s: how long the commit is asked for beyond that; the client's own when left out.
        """
        return ApplicationTransaction(
            self,
            timeout_s=timeout_s,
            key=f"client-{uuid.uuid4()}" if key is None else _valid_key(key),
            protocol=protocol,
            patience_s=self._patience_s if patience_s is None else patience_s,
        )

    async def begin(
        self, *, timeout_s: float = 10.0, key: str | None = None, protocol: str | None = None
    ) -> TransactionResult:
        """Begin a transaction that an application does itself, or find the one that `key` names.

        This, `enlist` and `commit` are what `transaction` is made of, for databases that it does not know. Raises as
        `submit` does.
        """
        key = f"client-{uuid.uuid4()}" if key is None else _valid_key(key)
        request = {"timeout_s": timeout_s} | ({} if protocol is None else {"protocol": protocol})
        txn = await self._call(
            "POST",
            "/v1/transactions/begin",
            read_transaction,
            body=request,
            headers={"Idempotency-Key": key},
            until_s=self._until(None),
            key=key,
        )
        return replace(txn, key=key)

    async def enlist(self, gid: str, participant: str, *, branch: str | None = None) -> TransactionResult:
        """Say that the application will work at `participant`; before it does.

        Raises `Conflict` (`not_active`, `branch_taken`), `InvalidRequest`, `NotFound`, `Forgotten`, `NotAllowed`,
        `Overloaded`, `Unavailable`, `OutcomeUnknown`.
        """
        body = {"participant": participant} | ({} if branch is None else {"branch": branch})
        path = f"{_path('transactions', gid)}/branches"
        return await self._call("POST", path, read_transaction, body=body, until_s=self._until(None), gid=gid)

    async def commit(
        self, gid: str, branches: Sequence[str], *, wait: Wait = "decided", patience_s: float | None = None
    ) -> TransactionResult:
        """Ask for the commit of a transaction whose branches, these and no others, the application has prepared.

        The result holds the decision, whatever it is; it has none when `patience_s` is over before there is one.
        Raises `Conflict` (`branches_differ`), and as `enlist`.
        """
        until_s = self._until(patience_s)
        body = {"branches": list(branches), "wait": wait}
        path = f"{_path('transactions', gid)}/commit"
        txn = await self._call("POST", path, read_transaction, body=body, until_s=until_s, gid=gid)
        return await self._follow(txn, wait, until_s)

    # -------------------------------------------------------------------------------------------- participants

    async def register(self, name: str, url: str, *, batch: bool = False) -> Participant:
        """Register a participant, or say that it has moved. `batch`: it answers `POST {url}/batch`.

        Raises `InvalidRequest`, `NotAllowed`, `Overloaded`, `Unavailable`, `OutcomeUnknown`.
        """
        body = {"url": url, "batch": batch}
        return await self._call(
            "PUT", _path("participants", name), read_participant, body=body, until_s=self._until(None)
        )

    async def unregister(self, name: str) -> None:
        """Give up a participant's name. Raises `NotFound`, `Conflict` while transactions need it, and as `register`."""
        path, until_s = _path("participants", name), self._until(None)
        # A DELETE that finds nothing may follow one whose answer was lost: whether there was something is asked before.
        await self._call("GET", path, read_participant, until_s=until_s, harmless=True)
        await self._call("DELETE", path, lambda _: None, until_s=until_s, gone_is_done=True)

    async def participants(self) -> tuple[Participant, ...]:
        """All that are registered, and how they are. Raises `NotAllowed`, `Unavailable`."""
        return await self._call("GET", "/v1/participants", read_participants, until_s=self._until(None), harmless=True)

    async def cluster(self) -> Cluster:
        """The cluster, as the node that answers first sees it. Raises `NotAllowed`, `Unavailable`."""
        return await self._call("GET", "/v1/cluster", read_cluster, until_s=self._until(None), harmless=True)

    # -------------------------------------------------------------------------------------------- tries

    def _until(self, patience_s: float | None, more_s: float = 0.0) -> float:
        return asyncio.get_running_loop().time() + more_s + (self._patience_s if patience_s is None else patience_s)

    async def _follow(self, txn: TransactionResult, wait: Wait, until_s: float) -> TransactionResult:
        """Ask for `txn` until it is as far as `wait` says, or time is over."""
        loop = asyncio.get_running_loop()
        path = f"{_path('transactions', txn.gid)}?wait={wait}"
        failures = 0
        while not _far_enough(txn, wait) and loop.time() < until_s:
            asked_s = loop.time()
            try:
                txn = await self._call("GET", path, read_transaction, until_s=until_s, harmless=True)
            except ClientError:
                break  # what is known of it is returned: that it was begun
            if loop.time() - asked_s < _ANSWER_MARGIN_S / 2:
                # This node does not wait, for whatever reason.
                await self._sleep(max(0.0, min(until_s - loop.time(), self._pause_s(failures))))
                failures += 1
        return txn

    async def _call(
        self,
        method: str,
        path: str,
        read: Callable[[Any], _T],
        *,
        until_s: float,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        harmless: bool = False,
        gone_is_done: bool = False,
        key: str | None = None,
        gid: str | None = None,
    ) -> _T:
        """What `read` makes of the answer, from the first node that gives one.

        harmless: the call changes nothing, so it does not matter whether a try was dealt with.
        gone_is_done: 404 is what the call is for.
        """
        loop = asyncio.get_running_loop()
        data = None if body is None else json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
        node, failures, perhaps_done = self._first, 0, False
        while True:
            left_s = until_s - loop.time()
            try:
                answer = await self._try(
                    node, method, path, data, headers, min(self._try_timeout_s, max(left_s, _LEAST_TRY_S))
                )
                if answer.status >= 400:
                    if answer.code == "not_found" and gone_is_done:
                        return read(None)
                    raise _error_of(answer)
                result = _read(read, answer)
            except _Failed as error:
                failed = error
            else:
                self._first = self._leader(answer, node)
                return result
            perhaps_done = perhaps_done or (failed.done and not harmless)
            failures += 1
            answer_again_s = failed.answer.retry_after_s if failed.answer is not None else None
            busy = failed.answer is not None and failed.answer.status == 429
            if not busy:
                if self._first == node:
                    self._first = (node + 1) % len(self._nodes)
                node = (node + 1) % len(self._nodes)
            pause_s = self._pause_s(failures - len(self._nodes))
            if busy:
                pause_s = max(pause_s, answer_again_s or 0.0)
            elif failures < len(self._nodes):
                pause_s = 0.0  # another node may do at once what this one cannot
            elif answer_again_s is not None:
                pause_s = max(pause_s, min(answer_again_s, BACKOFF_MAX_S))
            if loop.time() + pause_s + _LEAST_TRY_S > until_s:
                raise _gave_up(failed, method, path, perhaps_done=perhaps_done, key=key, gid=gid) from failed
            await self._sleep(pause_s)

    def _pause_s(self, failures: int) -> float:
        ceiling = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2.0 ** max(0, min(failures, 16)))
        return ceiling * (0.5 + 0.5 * self._rng.random())

    def _leader(self, answer: _Answer, node: int) -> int:
        """Whom to ask first from now on. Only nodes that this client was given are ever asked: they get the token."""
        if answer.leader in self._nodes:
            return self._nodes.index(answer.leader)
        return node

    async def _try(
        self,
        node: int,
        method: str,
        path: str,
        data: bytes | None,
        headers: Mapping[str, str] | None,
        timeout_s: float,
    ) -> _Answer:
        """One request to one node. Raises `_Failed`."""
        if self._session is None:
            raise RuntimeError("use the client as a context manager: async with Client([...]) as client")
        url = self._nodes[node]
        wanted = dict(headers or {})
        wanted["Outlast-Wait-Ms"] = str(int(max(timeout_s / 2, timeout_s - _ANSWER_MARGIN_S) * 1000))
        if data is not None:
            wanted["Content-Type"] = "application/json"
        try:
            async with self._session.request(
                method,
                URL(url + path, encoded=True),
                data=data,
                headers=wanted,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(_CONNECT_TIMEOUT_S, timeout_s)),
            ) as response:
                raw = await _bounded(response)
                return _Answer(
                    status=response.status,
                    body=_json(raw),
                    retry_after_s=_retry_after_s(raw, response.headers.get("Retry-After", "")),
                    leader=response.headers.get("Outlast-Leader"),
                )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _Failed(f"{url}: {error or 'no connection'}", done=False) from error
        except TimeoutError as error:
            raise _Failed(f"{url} did not answer within {timeout_s:.3g} s", done=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Failed(f"{url}: {error or type(error).__name__}", done=True) from error


# ------------------------------------------------------------------------------------------------ small things


def _node_url(url: str) -> str:
    if not isinstance(url, str) or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"{url!r} is not a node's URL, such as http://127.0.0.1:7401")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{url!r} is not a node's URL: {error}") from error
    extra = parts.username is not None or parts.query or parts.fragment
    if parts.scheme not in ("http", "https") or not host or port == 0 or extra:
        raise ValueError(f"{url!r} is not a node's URL, such as http://127.0.0.1:7401")
    return url.rstrip("/")


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _valid_key(key: str) -> str:
    if not 0 < len(key) <= MAX_KEY or not key.isascii() or not key.isprintable():
        raise ValueError(f"an idempotency key is 1 to {MAX_KEY} printable ASCII characters")
    return key


def _seconds(timeout_s: float) -> float:
    """What a transaction may take; nonsense is left to the node to refuse."""
    usable = isinstance(timeout_s, int | float) and 0 < timeout_s <= 86_400
    return float(timeout_s) if usable else 0.0


def _path(kind: str, name: str) -> str:
    return f"/v1/{kind}/{quote(name, safe='', errors='replace')}"


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise aiohttp.ClientPayloadError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


def _json(raw: bytes) -> Any:
    """The JSON value, or None: what to make of that depends on the status."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _retry_after_s(raw: bytes, header: str) -> float | None:
    """The pause asked for: exact in a problem's body, in whole seconds in the header."""
    body = _json(raw) if b"retry_after_s" in raw[:4096] else None
    exact = body.get("retry_after_s") if isinstance(body, dict) else None
    if isinstance(exact, int | float) and not isinstance(exact, bool) and 0 <= exact < 1e6:
        return float(exact)
    return float(header) if header.isascii() and header.isdigit() and len(header) < 7 else None


def _error_of(answer: _Answer) -> Exception:
    """What a status of 400 or more means for the call: an end, or another try."""
    status, code, detail = answer.status, answer.code, answer.detail
    if code is None:
        # Not a node's words: something that answers in its place, and may or may not have passed the request on.
        return _Failed(f"status {status} without a code", done=status >= 500, answer=answer)
    if status in (408, 429):
        return _Failed(detail, done=False, answer=answer)
    if status >= 500:
        return _Failed(detail, done=code not in _NOT_DONE_CODES, answer=answer)
    if code == "idempotency_key_reused":
        return KeyReused(detail, code=code, status=status)
    return _BY_STATUS.get(status, InvalidRequest)(detail, code=code, status=status)


def _read(read: Callable[[Any], _T], answer: _Answer) -> _T:
    try:
        if answer.status >= 300:
            raise ValueError(f"status {answer.status}")
        return read(answer.body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _Failed(f"the answer is not a node's: {error!r:.200}", done=True, answer=None) from error


def _gave_up(
    failed: _Failed, method: str, path: str, *, perhaps_done: bool, key: str | None, gid: str | None
) -> ClientError:
    answer = failed.answer
    status, code = (None, None) if answer is None else (answer.status, answer.code)
    what = f"{method} {path.partition('?')[0]}: {failed}"
    if perhaps_done:
        return OutcomeUnknown(f"{what}; it may have been done", code=code, status=status, key=key, gid=gid)
    if answer is not None and status == 429:
        retry_after_s = answer.retry_after_s if answer.retry_after_s is not None else BACKOFF_MAX_S
        return Overloaded(f"{what}; nothing was done", code=code, status=status, retry_after_s=retry_after_s)
    kind = NotKnownYet if code == "not_known_yet" else Unavailable
    return kind(f"{what}; nothing was done", code=code, status=status)


def _far_enough(txn: TransactionResult, wait: Wait) -> bool:
    return wait == "none" or txn.ended or (wait == "decided" and txn.decision is not None)
