"""The HTTP face of a node: parse, call the driver, render. No rules live here.

Every node answers every call. What only the leader can know or do goes through `Relay.run`, which runs it here when
this node leads and at the leader when it does not.
"""

import asyncio
import logging
import random
import ssl
import uuid
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web

from cluster.replication.clock import Clock
from cluster.replication.log import ReplicatedLog
from coordinator import parsing, rendering
from coordinator.bodies import whole_body
from coordinator.codec import JSON_TYPE, json_answer, json_bytes
from coordinator.config import NodeConfig
from coordinator.copying import Copying
from coordinator.driver import Driver, NewTransaction
from coordinator.errors import (
    NoLeader,
    NotFound,
    NotLeader,
    OutcomeUnknown,
    OutlastError,
    Unprocessable,
)
from coordinator.inquiry import Inquiry
from coordinator.ledger import Ledger
from coordinator.metrics import Metrics
from coordinator.protocol.transaction import Decision, Transaction
from coordinator.relay import Relay
from coordinator.security import check_origin, check_token

_log = logging.getLogger(__name__)

KEY_HEADER: Final = "Idempotency-Key"
WAIT_HEADER: Final = "Outlast-Wait-Ms"
"""On a request that was passed on: what is left of the client's patience."""

PROBLEM_TYPE: Final = "application/problem+json"
_OPEN_PATHS: Final = ("/healthz", "/readyz")
_EXTRA_WAIT_S: Final = 1.0
"""A wait may outlive the transaction's own timeout by this much, so that it sees the abort that the timeout brings."""

_ROWS_AT_ONCE: Final = 100
"""Transactions of a page that are rendered before others get their turn: heartbeats must not wait for a long list."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """The routes of one node."""

    def __init__(
        self,
        *,
        config: NodeConfig,
        driver: Driver,
        ledger: Ledger,
        log: ReplicatedLog,
        clock: Clock,
        metrics: Metrics,
        inquiry: Inquiry,
        tls: ssl.SSLContext | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._rng = rng if rng is not None else random.SystemRandom()
        self._config = config
        self._limits = config.limits
        self._driver = driver
        self._ledger = ledger
        self._log = log
        self._clock = clock
        self._metrics = metrics
        self._relay = Relay(config=config, driver=driver, log=log, clock=clock, tls=tls)
        self._copying = Copying(
            config=config, driver=driver, ledger=ledger, clock=clock, relay=self._relay, inquiry=inquiry
        )

    def application(self) -> web.Application:
        """An aiohttp application with all routes."""
        app = web.Application(client_max_size=self._limits.max_body_bytes, middlewares=[self._guard])
        app.add_routes(
            [
                web.post("/v1/transactions", self._submit),
                web.get("/v1/transactions", self._list),
                web.post("/v1/transactions/begin", self._begin),
                web.get("/v1/transactions/{gid}", self._show),
                web.post("/v1/transactions/{gid}/branches", self._enlist),
                web.post("/v1/transactions/{gid}/commit", self._commit),
                web.post("/v1/transactions/{gid}/abort", self._abort),
                web.post("/v1/transactions/{gid}/resolve", self._resolve),
                web.post("/v1/transactions/{gid}/acknowledge", self._acknowledge),
                web.get("/v1/outcomes/{gid}", self._outcome),
                web.get("/v1/participants", self._participants),
                web.put("/v1/participants/{name}", self._register),
                web.get("/v1/participants/{name}", self._participant),
                web.delete("/v1/participants/{name}", self._unregister),
                web.get("/v1/cluster", self._cluster),
                *self._copying.routes(),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._render_metrics),
            ]
        )
        app.on_cleanup.append(self._close)
        return app

    async def _close(self, _app: web.Application) -> None:
        await self._relay.close()

    # -------------------------------------------------------------------------------------------- errors

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every error becomes problem+json; only our own mistakes become a 500, with a trace in the log alone."""
        try:
            if request.path not in _OPEN_PATHS:
                check_origin(request)
                check_token(request, self._config.token, self._config.older_tokens)
            return await handler(request)
        except OutlastError as error:
            return problem(error.status, error.title, error.detail, code=error.code, retry_after_s=error.retry_after_s)
        except web.HTTPRequestEntityTooLarge:
            limit = self._limits.max_body_bytes
            return problem(413, "Too large", f"the body exceeds {limit} bytes (max_body_bytes)", code="too_large")
        except web.HTTPException as error:
            title = HTTPStatus(error.status).phrase
            allowed = error.headers.get("Allow")
            detail = f"{request.method} {request.path[:200]}" + (f": there is {allowed}" if allowed else "")
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status, "malformed")
            return problem(error.status, title, detail, code=code, headers={"Allow": allowed} if allowed else None)
        except web.RequestPayloadError as error:
            return problem(400, "Malformed request", f"the body could not be read: {error}", code="malformed")
        except Exception:  # noqa: BLE001  # the border: a defect must not become a stack trace in somebody's client
            _log.exception("%s %s failed", request.method, request.path[:200])
            return problem(
                500,
                "Internal error",
                "this is a defect of the node; its log says more. It may have been done",
                code="internal",
            )

    # -------------------------------------------------------------------------------------------- transactions

    async def _submit(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        key = parsing.idempotency_key(request.headers.get(KEY_HEADER), self._limits)
        asked = parsing.json_object(body)
        new, wait = parsing.new_transaction(asked, key, self._limits)
        wait_s = self._patience_s(request, new.timeout_ms / 1000 + _EXTRA_WAIT_S if wait != "none" else 0.0)
        until_s = self._clock.monotonic_s() + wait_s
        return await self._begun(
            request,
            body,
            new,
            lambda own_key: parsing.new_transaction(asked, own_key, self._limits)[0],
            lambda txn: self._when(txn.gid, wait, until_s),
            wait_s=wait_s,
        )

    async def _begun(
        self,
        request: web.Request,
        body: bytes,
        new: NewTransaction,
        again: Callable[[str], NewTransaction],
        then: Callable[[Transaction], Awaitable[web.Response]],
        *,
        wait_s: float,
    ) -> web.Response:
        """What `then` makes of the transaction once it has begun, here or at the leader.

        again: the same as `new`, under a key.
        """
        attempt = new

        def keyed() -> NewTransaction:
            nonlocal attempt
            if attempt.key is None:
                own_key = uuid.UUID(int=self._rng.getrandbits(128), version=4)
                attempt = again(f"node-{own_key}")
            return attempt

        # To be passed on, or made again at the next leader, a request needs a key; while this node leads it does not,
        # and the ledger need not remember one.
        is_first = True

        async def here() -> web.Response:
            nonlocal is_first
            this_time = attempt if is_first and self._driver.leading else keyed()
            is_first = False
            try:
                txn = await self._driver.submit(this_time)
            except OutcomeUnknown as error:
                error.repeatable = this_time.key is not None
                raise
            return await then(txn)

        return await self._relay.run(
            request,
            here,
            body=body,
            extra=lambda: {KEY_HEADER: str(keyed().key), **_patience(wait_s)},
            wait_s=wait_s,
        )

    async def _begin(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        key = parsing.idempotency_key(request.headers.get(KEY_HEADER), self._limits)
        asked = parsing.json_object(body)
        new = parsing.application_transaction(asked, key, self._limits)

        async def then(txn: Transaction) -> web.Response:
            return self._application_transaction(txn)

        return await self._begun(
            request,
            body,
            new,
            lambda own_key: parsing.application_transaction(asked, own_key, self._limits),
            then,
            wait_s=self._config.timing.proposal_timeout_s,
        )

    async def _enlist(self, request: web.Request) -> web.Response:
        gid, body = request.match_info["gid"], await self._body(request)
        branch, participant = parsing.enlistment(parsing.json_object(body))

        async def here() -> web.Response:
            return self._application_transaction(await self._driver.enlist(gid, branch, participant))

        return await self._relay.run(request, here, body=body, wait_s=self._config.timing.proposal_timeout_s)

    async def _commit(self, request: web.Request) -> web.Response:
        gid, body = request.match_info["gid"], await self._body(request)
        branches, wait = parsing.seal(parsing.json_object(body), self._limits)
        # How long the transaction may take is known where it is led: a decision comes before its deadline, or with it.
        wait_s = self._patience_s(request, self._limits.max_timeout_s + _EXTRA_WAIT_S if wait != "none" else 0.0)
        until_s = self._clock.monotonic_s() + wait_s

        async def here() -> web.Response:
            txn = await self._driver.seal(gid, branches)
            left_s = max(0.0, (txn.expires_at - self._clock.wall_ms()) / 1000) + _EXTRA_WAIT_S
            return await self._when(txn.gid, wait, min(until_s, self._clock.monotonic_s() + left_s))

        return await self._relay.run(request, here, body=body, extra=lambda: _patience(wait_s), wait_s=wait_s)

    def _application_transaction(self, txn: Transaction) -> web.Response:
        return answer(rendering.application_transaction(txn, self._driver.tally(txn.gid)))

    async def _show(self, request: web.Request) -> web.Response:
        gid = request.match_info["gid"]
        self._check_query(request, ("wait", "timeout_s"))
        wait = parsing.wait(request.query.get("wait", "none"))
        wait_s = self._patience_s(request, self._query_timeout_s(request) if wait != "none" else 0.0)
        until_s = self._clock.monotonic_s() + wait_s

        async def here() -> web.Response:
            txn = self._driver.read(gid)
            return await self._when(txn.gid, wait, until_s, told=True)

        return await self._relay.run(request, here, extra=lambda: _patience(wait_s), wait_s=wait_s)

    async def _when(self, gid: str, wait: str, until_s: float, *, told: bool = False) -> web.Response:
        """The transaction once it is as far as `wait` says, or at `until_s`, whichever comes first.

        told: with what it waits for.
        """
        left_s = max(0.0, until_s - self._clock.monotonic_s())
        if wait == "decided":
            await self._driver.wait_decided(gid, left_s)
        elif wait == "ended":
            await self._driver.wait_ended(gid, left_s)
        txn = self._ledger.get(gid)
        if txn is None:
            raise self._driver.absent(gid)  # it was forgotten meanwhile, or a restore has shown that nobody knows
        far_enough = wait == "none" or (wait == "decided" and txn.decision is not None) or txn.ended_at is not None
        return self._transaction(txn, status=200 if far_enough else 202, told=told)

    async def _list(self, request: web.Request) -> web.Response:
        state, after, limit, heuristic = parsing.page(request.query, self._limits)
        if after is not None and self._ledger.own_gid(after) is None:
            raise Unprocessable("after must be a gid of this cluster")

        async def here() -> web.Response:
            if not self._driver.leading:
                raise NotLeader("a follower may be behind")
            self._driver.require_copy()
            found, more = self._ledger.page(
                state=state, after=after, limit=limit, scan=self._limits.max_scan, heuristic=heuristic
            )
            rows: list[dict[str, Any]] = []
            for txn in found:
                if rows and len(rows) % _ROWS_AT_ONCE == 0:
                    await asyncio.sleep(0)
                rows.append(self._rendered(txn))
            return answer({"transactions": rows, "next": more})

        return await self._relay.run(request, here)

    async def _abort(self, request: web.Request) -> web.Response:
        gid = request.match_info["gid"]
        await self._body(request)
        wait_s = self._patience_s(request, self._config.timing.proposal_timeout_s)

        async def here() -> web.Response:
            txn = await self._driver.abort(gid, "requested by a client", wait_s)
            return self._transaction(txn)

        return await self._relay.run(request, here, wait_s=wait_s)

    async def _resolve(self, request: web.Request) -> web.Response:
        gid, body = request.match_info["gid"], await self._body(request)
        branch, outcome, note = parsing.resolution(parsing.json_object(body))

        async def here() -> web.Response:
            return self._transaction(await self._driver.resolve(gid, branch, outcome, note))

        return await self._relay.run(request, here, body=body, wait_s=self._config.timing.proposal_timeout_s)

    async def _acknowledge(self, request: web.Request) -> web.Response:
        gid = request.match_info["gid"]
        await self._body(request)

        async def here() -> web.Response:
            return self._transaction(await self._driver.acknowledge(gid))

        return await self._relay.run(request, here, wait_s=self._config.timing.proposal_timeout_s)

    async def _outcome(self, request: web.Request) -> web.Response:
        gid = request.match_info["gid"]

        async def here() -> web.Response:
            decision = await self._driver.outcome(gid)
            return answer({"outcome": "committed" if decision is Decision.COMMIT else "aborted"})

        return await self._relay.run(request, here, wait_s=self._config.timing.proposal_timeout_s)

    def _transaction(self, txn: Transaction, *, status: int = 200, told: bool = False) -> web.Response:
        return answer(self._rendered(txn, told=told), status=status)

    def _rendered(self, txn: Transaction, *, told: bool = True) -> dict[str, Any]:
        waiting = self._driver.waiting_for(txn) if told else None
        return rendering.transaction(txn, self._driver.tally(txn.gid), waiting)

    # -------------------------------------------------------------------------------------------- participants

    async def _register(self, request: web.Request) -> web.Response:
        name, body = request.match_info["name"], await self._body(request)
        url, batch = parsing.registration(name, parsing.json_object(body))

        async def here() -> web.Response:
            return answer(rendering.participant(await self._driver.register(name, url, batch=batch)))

        return await self._relay.run(request, here, body=body, wait_s=self._config.timing.proposal_timeout_s)

    async def _unregister(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]

        async def here() -> web.Response:
            await self._driver.unregister(name)
            return web.Response(status=204)

        return await self._relay.run(request, here, wait_s=self._config.timing.proposal_timeout_s)

    async def _participant(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]

        async def here() -> web.Response:
            if not self._driver.leading:
                raise NotLeader("a follower may be behind")
            record = self._ledger.participants.get(name)
            if record is None:
                raise NotFound(f"no participant {name[:100]!r} is registered")
            return answer(self._participant_with_lane(name))

        return await self._relay.run(request, here)

    async def _participants(self, request: web.Request) -> web.Response:
        async def here() -> web.Response:
            if not self._driver.leading:
                raise NotLeader("a follower may be behind")
            return answer({"participants": [self._participant_with_lane(name) for name in self._ledger.participants]})

        return await self._relay.run(request, here)

    def _participant_with_lane(self, name: str) -> dict[str, Any]:
        rendered = rendering.participant(self._ledger.participants[name])
        lane = self._driver.lanes().get(name)
        rendered["owed"] = 0 if lane is None else lane.owed
        rendered["reachable"] = lane is None or not lane.down
        rendered["trouble"] = None if lane is None else lane.trouble
        rendered["down_since"] = None if lane is None else rendering.date(lane.down_since)
        return rendered

    # -------------------------------------------------------------------------------------------- the node

    async def _cluster(self, _request: web.Request) -> web.Response:
        leadership = self._log.leadership()
        reachable = self._log.reachable()
        understands = self._log.understands()
        joining = self._log.joining()
        trouble = self._log.trouble
        nodes = []
        for peer in self._config.nodes:
            mine = peer.id == self._config.node
            role = "joining" if peer.id in joining else "leader" if peer.id == leadership.leader else "follower"
            nodes.append(
                {
                    "id": peer.id,
                    "url": peer.url,
                    "role": role,
                    "reachable": mine or peer.id in reachable,
                    "understands": understands.get(peer.id),
                    "trouble": trouble if mine else None,
                }
            )
        return answer(
            {
                "cluster": self._config.cluster,
                "node": self._config.node,
                "role": next(row["role"] for row in nodes if row["id"] == self._config.node),
                "leader": leadership.leader,
                "epoch": self._ledger.epoch,
                "level": self._ledger.level,
                "ready": self._is_ready(),
                "nodes": nodes,
                "in_flight": self._driver.in_flight,
                "trouble": trouble,
                "reconciling": self._ledger.lost is not None or self._driver.awaits_copy,
            }
        )

    def _is_ready(self) -> bool:
        leadership = self._log.leadership()
        if leadership.is_leader:
            return self._driver.leading
        if self._config.node in self._log.joining():
            return False
        return leadership.leader is not None and self._ledger.epoch == self._ledger.epoch_base + leadership.term

    async def _healthz(self, _request: web.Request) -> web.Response:
        return answer({"status": "ok"})

    async def _readyz(self, _request: web.Request) -> web.Response:
        if not self._is_ready():
            raise NoLeader("this node knows no leader, or has not caught up with it")
        return answer({"status": "ready"})

    async def _render_metrics(self, _request: web.Request) -> web.Response:
        survey = await self._driver.survey()
        self._metrics.ready.set(1 if self._is_ready() else 0)
        self._metrics.surveyed(survey, self._ledger.participants, self._clock.wall_ms())
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    # -------------------------------------------------------------------------------------------- small things

    async def _body(self, request: web.Request) -> bytes:
        return await whole_body(request, self._limits)

    def _patience_s(self, request: web.Request, own_s: float) -> float:
        """How long to wait: `own_s`, or what is left of it on the node that passed the request on."""
        left_ms = request.headers.get(WAIT_HEADER, "")
        if left_ms.isascii() and left_ms.isdigit() and len(left_ms) < 10:
            return min(own_s, int(left_ms) / 1000)
        return own_s

    def _query_timeout_s(self, request: web.Request) -> float:
        text = request.query.get("timeout_s")
        if text is None:
            return self._limits.default_timeout_s + _EXTRA_WAIT_S
        try:
            return parsing.duration_s(float(text), self._limits)
        except ValueError as error:
            raise Unprocessable("timeout_s must be a number of seconds", code="invalid_timeout") from error

    @staticmethod
    def _check_query(request: web.Request, known: tuple[str, ...]) -> None:
        for name in request.query:
            if name not in known:
                raise Unprocessable(
                    f"the query has no field {name[:100]!r}; there are {', '.join(known)}", code="unknown_field"
                )


def _patience(wait_s: float) -> dict[str, str]:
    """The header that tells the leader how long its answer may take."""
    return {WAIT_HEADER: str(int(wait_s * 1000))}


def answer(value: dict[str, Any], *, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(status=status, body=json_answer(value), content_type=JSON_TYPE)


def problem(
    status: int,
    title: str,
    detail: str,
    *,
    code: str,
    retry_after_s: float | None = None,
    headers: dict[str, str] | None = None,
) -> web.Response:
    """An error as RFC 9457 wants it. `Retry-After` is in whole seconds; `retry_after_s` in the body is exact."""
    body: dict[str, Any] = {
        "type": f"urn:outlast:problem:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
    }
    kept = {**(headers or {}), "Outlast-Code": code}
    if retry_after_s is not None:
        body["retry_after_s"] = retry_after_s
        kept["Retry-After"] = str(max(1, round(retry_after_s)))
    return web.Response(status=status, body=json_bytes(body), content_type=PROBLEM_TYPE, headers=kept)
