"""Serves a resource manager over HTTP: the face that a coordinator sees.

    POST /prepare, /commit, /abort   one message, JSON
    POST /batch                      a list of them, JSON or msgpack by content type; answered in kind
    GET  /branches                   what is prepared and waits for its decision; ?before=GID: of older transactions
    GET  /branches?gid=...           what is on record of these transactions, in whatever state
    GET  /healthz                    alive, and how much is under way
    GET  /metrics                    the same and more, for Prometheus

The parts: `intake` turns messages into batches, the resource manager answers them, `resolver` asks about branches that
were left in doubt, and this module translates between them and HTTP. Errors are problem+json (RFC 9457) with a `code`:

    400, 415, 417, 431 malformed (also what is no HTTP at all)
    401 unauthenticated    403 forbidden          404 not_found      405 method_not_allowed
    408 slow_body          413 too_large          415 unsupported_media_type
    503 unavailable (nothing is known of this message: ask again), too_many_connections (nothing was read)

What to call:

    start(manager, host=..., port=..., settings=...) -> Participant     inside an event loop; `await participant.stop()`
    serve(manager, ...)                                                 inside an event loop, until SIGTERM or SIGINT
    run(manager, ...)                                                   a whole process: uvloop, and `serve`

`serve` and `run` print `listening on http://127.0.0.1:PORT` once requests are answered. Stopping finishes the batch
that runs, answers "unknown" to what waits, and closes the manager.
"""

import asyncio
import hmac
import logging
import random
import signal
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import uvloop
from aiohttp import web

from coordinator.codec import (
    JSON_TYPE,
    MSGPACK_TYPE,
    Malformed,
    answer_to_wire,
    batch_from_bytes,
    batch_to_bytes,
    json_bytes,
    json_value,
    request_from_wire,
)
from coordinator.protocol.messages import Answer, Gid, Pending
from participants.intake import Intake, Outcome
from participants.listening import Crowd, Site
from participants.manager import BranchId, Envelope, InDoubt, ResourceManager, TellsWhatItKnows, Unavailable
from participants.metrics import Metrics
from participants.resolver import Resolver
from participants.settings import ServerSettings, SettingsError, is_loopback
from participants.tls import coordinator_context, reload, server_context

_log = logging.getLogger(__name__)

_EPOCH_LIMIT: Final = 2**62
"""Above every Raft term, and small enough for any storage."""

_GIDS_LIMIT: Final = 100
"""Transactions that one `GET /branches` may ask about."""

_PROBLEM_TYPE: Final = "application/problem+json"
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Problem(Exception):
    """A request that is answered with an error. `detail` is for people, `code` for programs."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail

    def body(self) -> dict[str, Any]:
        """The problem+json object."""
        return {
            "type": "about:blank",
            "title": self.code.replace("_", " "),
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }

    def response(self) -> web.Response:
        """The whole answer."""
        headers = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 503:
            headers["Retry-After"] = "1"
        return web.Response(
            status=self.status, body=json_bytes(self.body()), content_type=_PROBLEM_TYPE, headers=headers
        )


_UNAVAILABLE: Final = Problem(503, "unavailable", "nothing is known of this message; ask again")


def _malformed(status: int, detail: str) -> web.Response:
    return Problem(status, "malformed", detail).response()


class Participant:
    """A resource manager that is being served. `url` is where; made by `start`. `rng`: where chance comes from."""

    def __init__(self, manager: ResourceManager, settings: ServerSettings, *, rng: random.Random | None = None) -> None:
        self._manager = manager
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._resolver = Resolver(settings, self._finish, held=manager.in_doubt, rng=rng)
        self._intake = Intake(manager, settings, heard=self._heard, lost=self._lost)
        self._metrics = Metrics(
            prepared=lambda: self._resolver.held,
            oldest_s=self._resolver.oldest_s,
            working=lambda: self._intake.working,
            waiting=lambda: self._intake.waiting,
        )
        self._unheard = False
        self._listing: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None
        self._tls: ssl.SSLContext | None = None
        self.url = ""
        self.port = 0

    async def _finish(self, envelope: Envelope) -> Answer | None:
        # Shielded: whoever stops waiting must not take the answer away from others that wait for it.
        return await asyncio.shield(self._intake.submit(envelope))

    def _heard(self, envelope: Envelope, answer: Answer) -> None:
        self._resolver.hear(envelope, answer)
        if self._unheard and self._listing is None:
            self._listing = asyncio.get_running_loop().create_task(self._list_unheard())

    def _lost(self) -> None:
        # Its branches may be prepared all the same, and then nobody would ever ask about them.
        self._unheard = True

    async def _list_unheard(self) -> None:
        """The manager works again after a batch was lost: look at what that batch has left prepared."""
        try:
            self._resolver.found(await self._manager.in_doubt())
            self._unheard = False
        except Unavailable as error:
            _log.warning("what is prepared cannot be listed yet: %s", error)
        finally:
            self._listing = None

    async def _sweep(self) -> None:
        """Finds what is prepared although nobody here has heard its vote, until it is cancelled.

        Such as the branch of an application that died, or one whose prepare outlived the connection that sent it. Only
        what two looks in a row have seen counts: what one has seen may be over, and on its way out of the answer.
        """
        seen: set[BranchId] = set()
        failed = False
        while True:
            await asyncio.sleep(self._settings.sweep_every_s)
            try:
                listed = await self._manager.in_doubt()
            except Exception as error:  # noqa: BLE001  # never the end of all sweeps; it is told of, and tried again
                if not failed:
                    defect = None if isinstance(error, Unavailable) else error
                    _log.warning("what is prepared cannot be listed for now: %s", error, exc_info=defect)
                failed = True
                self._metrics.swept(failed=True)
                continue
            failed = False
            self._metrics.swept(failed=False)
            self._resolver.found([each for each in listed if BranchId(each.gid, each.branch) in seen])
            seen = {BranchId(each.gid, each.branch) for each in listed}

    async def start(self, host: str, port: int) -> None:
        """Recovers, listens, and asks about what a crash left in doubt. Call `stop` even if this fails."""
        self._metrics.listen()
        refuse_exposure(host, self._settings)
        self._tls = server_context(self._settings)
        trusted = coordinator_context(self._settings)
        found = await self._manager.open()
        app = web.Application(middlewares=[self._guard], client_max_size=self._settings.body_limit_bytes)
        for call in ("prepare", "commit", "abort"):
            app.router.add_post(f"/{call}", self._single)
        app.router.add_post("/batch", self._batch)
        app.router.add_get("/branches", self._branches)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/metrics", self._render_metrics)
        # aiohttp waits so long twice: for requests that are whole, and then for all, bodies that never come included.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=self._settings.stop_within_s / 2)
        await self._runner.setup()
        await Site(self._runner, host, port, self._tls, _malformed, self._crowd()).start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http{'' if self._tls is None else 's'}://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._resolver.start(found, tls=trusted)
        self._sweeping = asyncio.get_running_loop().create_task(self._sweep())

    def _crowd(self) -> Crowd:
        limit = self._settings.connections_limit
        detail = f"{limit} callers are connected (connections_limit); nothing was done, try again"
        return Crowd(self._settings, Problem(503, "too_many_connections", detail).response())

    def reload(self) -> None:
        """Shows the certificate that the files hold now. A wrong file changes nothing, and is told of in the log."""
        if self._tls is None:
            return
        try:
            reload(self._tls, self._settings)
        except SettingsError as error:
            _log.error("the certificate stays as it was: %s", error)
        else:
            _log.info("certificate and key are read anew")

    async def stop(self) -> None:
        """Finishes the batch that runs, answers what is open, closes the manager."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait([self._sweeping])
        await self._resolver.stop()
        await self._intake.stop()
        if self._listing is not None:
            await self._listing
        if self._runner is not None:
            await self._runner.cleanup()
        await self._manager.close()
        self._metrics.close()

    # --------------------------------------------------------------------------------------------- every request

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            self._authenticate(request)
            return await handler(request)
        except Problem as problem:
            return problem.response()
        except web.HTTPNotFound:
            return Problem(404, "not_found", f"nothing is at {request.path:.100}").response()
        except web.HTTPMethodNotAllowed as error:
            response = Problem(405, "method_not_allowed", f"use {', '.join(sorted(error.allowed_methods))}").response()
            response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
            return response
        except Unavailable as error:
            _log.error("%s: %s", request.path, error)  # the text says it all, the traceback nothing
            return _UNAVAILABLE.response()
        except web.HTTPRequestEntityTooLarge:
            detail = f"a body may have {self._settings.body_limit_bytes} bytes"
            return Problem(413, "too_large", detail).response()

    def _authenticate(self, request: web.Request) -> None:
        wanted = self._settings.caller_token
        if wanted is None or request.path == "/healthz":
            return
        if request.transport is not None and request.transport.get_extra_info("peercert"):
            return  # verified in the TLS handshake; nobody is asked for one unless client_ca is set
        scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not shown:
            raise Problem(401, "unauthenticated", "show a bearer token")
        tokens = (wanted, *self._settings.older_caller_tokens)
        # All are compared, so that the time taken does not tell which one was close.
        matches = [hmac.compare_digest(shown.encode(errors="replace"), each.encode()) for each in tokens]
        if not any(matches):
            raise Problem(403, "forbidden", "this token is not accepted here")

    async def _body(self, request: web.Request, *content_types: str) -> bytes:
        if request.content_type not in content_types:
            # Also keeps out forms that a web page could send here behind its visitor's back.
            raise Problem(415, "unsupported_media_type", f"send {' or '.join(content_types)}")
        try:
            async with asyncio.timeout(self._settings.body_within_s):
                return await request.read()
        except TimeoutError as error:
            detail = f"the body must arrive within {self._settings.body_within_s} s"
            raise Problem(408, "slow_body", detail) from error
        except (ConnectionError, web.RequestPayloadError) as error:
            raise Problem(400, "malformed", "the body could not be read: it breaks off, or is badly encoded") from error

    # --------------------------------------------------------------------------------------------- messages

    async def _single(self, request: web.Request) -> web.Response:
        try:
            envelope = envelope_from_wire(request.path[1:], json_value(await self._body(request, JSON_TYPE)))
        except Malformed as error:
            raise Problem(400, "malformed", str(error)) from error
        outcome = self._intake.submit(envelope)
        await self._wait_for([outcome])
        status, body = _rendered(envelope, outcome)
        if outcome.done() and outcome.result() is None:
            return _UNAVAILABLE.response()
        return web.Response(status=status, body=json_bytes(body), content_type=JSON_TYPE)

    async def _batch(self, request: web.Request) -> web.Response:
        content_type = request.content_type
        try:
            items = batch_from_bytes(content_type, await self._body(request, JSON_TYPE, MSGPACK_TYPE))
        except Malformed as error:
            raise Problem(400, "malformed", str(error)) from error
        if len(items) > self._settings.batch_items_limit:
            raise Problem(413, "too_large", f"a batch may have {self._settings.batch_items_limit} items")
        asked: list[tuple[Envelope, Outcome] | Malformed] = []
        for item in items:
            try:
                envelope = envelope_from_wire(item.get("call") if isinstance(item, dict) else None, item)
            except Malformed as error:
                asked.append(error)
            else:
                asked.append((envelope, self._intake.submit(envelope)))
        await self._wait_for([each[1] for each in asked if not isinstance(each, Malformed)])
        answers: list[dict[str, Any]] = []
        for each in asked:
            if isinstance(each, Malformed):
                answers.append(Problem(400, "malformed", str(each)).body())
            else:
                status, body = _rendered(*each)
                answers.append({**body, "status": status})
        if content_type == JSON_TYPE:
            return web.Response(body=json_bytes(answers), content_type=JSON_TYPE)
        # An integer that msgpack cannot hold makes this JSON, which the content type tells.
        content_type, raw = batch_to_bytes(answers)
        return web.Response(body=raw, content_type=content_type)

    async def _wait_for(self, outcomes: Sequence[Outcome]) -> None:
        """Until all are known, or `answer_within_s` is over. The work goes on either way.

        Once one is known, the others have as long again as it took. One of them may wait for a lock that another's
        branch holds until its vote has been heard, and that vote is in the same answer. What is answered at once
        because there was no room for it, or no time, tells nothing that anybody waits for.
        """
        open_ones = {outcome for outcome in outcomes if not outcome.done()}
        began_s, limit_s = self._loop.time(), self._settings.answer_within_s
        known = len(open_ones) < len(outcomes) and any(map(_tells, outcomes))
        took_s = 0.0
        while open_ones and not known and took_s < limit_s:
            done, open_ones = await asyncio.wait(
                open_ones, timeout=limit_s - took_s, return_when=asyncio.FIRST_COMPLETED
            )
            known = any(map(_tells, done))
            took_s = self._loop.time() - began_s
        if open_ones and took_s < limit_s:
            again_s = max(took_s, self._settings.stragglers_within_s)
            await asyncio.wait(open_ones, timeout=min(again_s, limit_s - took_s))

    # --------------------------------------------------------------------------------------------- people and probes

    async def _branches(self, request: web.Request) -> web.Response:
        if "gid" in request.query:
            return await self._known(request.query.getall("gid"))
        if "before" in request.query:
            bound = _gid(request.query["before"], "before")
            # Looked at first: what is at work now, and prepared a moment later, is in one of the two.
            working = sum(_precedes(key.gid, bound) for key in self._intake.under_way)
            found = [each for each in await self._manager.in_doubt() if _precedes(each.gid, bound)]
            return self._listed(found, {"working": working})
        return self._listed(await self._manager.in_doubt(), {})

    def _listed(self, found: Sequence[InDoubt], more: dict[str, int]) -> web.Response:
        shown = [
            {"gid": each.gid, "branch": each.branch, "state": "prepared", "prepared_at": each.prepared_at}
            for each in found[: self._settings.branches_limit]
        ]
        body = {"branches": shown, "total": len(found), **more}
        return web.Response(body=json_bytes(body), content_type=JSON_TYPE)

    async def _known(self, gids: list[str]) -> web.Response:
        """What is on record of some transactions: also what is over, as far as the manager can tell."""
        if len(gids) > _GIDS_LIMIT:
            raise Problem(400, "malformed", f"at most {_GIDS_LIMIT} gids at once")
        parsed = [_gid(text, "gid") for text in gids]
        cluster = parsed[0].cluster
        if any(gid.cluster != cluster for gid in parsed):
            raise Problem(400, "malformed", "the gids must be of one cluster")
        body: dict[str, Any]
        if isinstance(self._manager, TellsWhatItKnows):
            known = await self._manager.known(gids)
            branches = [{"gid": each.gid, "branch": each.branch, "state": each.state} for each in known.branches]
            floor = str(Gid.of_number(cluster, known.floor)) if known.floor else None
            body = {"branches": branches, "known": True, "epoch": known.epoch, "floor": floor}
        else:
            wanted = set(gids)
            branches = [
                {"gid": each.gid, "branch": each.branch, "state": "prepared"}
                for each in await self._manager.in_doubt()
                if each.gid in wanted
            ]
            body = {"branches": branches, "known": False}
        return web.Response(body=json_bytes(body), content_type=JSON_TYPE)

    async def _healthz(self, _request: web.Request) -> web.Response:
        body = {
            "status": "ok",
            "prepared": self._resolver.held,
            "working": self._intake.working,
            "waiting": self._intake.waiting,
        }
        return web.Response(body=json_bytes(body), content_type=JSON_TYPE)

    async def _render_metrics(self, _request: web.Request) -> web.Response:
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=self._metrics.render(), headers=headers)


def _gid(text: str, name: str) -> Gid:
    gid = Gid.parse(text)
    if gid is None:
        raise Problem(400, "malformed", f"{name} must be <cluster>-<epoch>-<sequence>")
    return gid


def _precedes(text: str, bound: Gid) -> bool:
    gid = Gid.parse(text)
    return gid is not None and gid.cluster == bound.cluster and gid.number < bound.number


def envelope_from_wire(call: object, body: object) -> Envelope:
    """The message in a request's body, or in an item of a batch. Raises `Malformed`, naming what is wrong."""
    message, stamp = request_from_wire(call if isinstance(call, str) else "", body)
    if stamp.epoch > _EPOCH_LIMIT:
        raise Malformed("epoch is too large")
    if not message.branch.isprintable():
        # It is a key in storage and a word in logs: no control characters, no lone surrogates.
        raise Malformed("branch must be printable")
    return Envelope(message, stamp)


def _tells(outcome: Outcome) -> bool:
    """Whether it is known what became of the message."""
    return outcome.done() and not isinstance(outcome.result(), Pending | None)


def _rendered(envelope: Envelope, outcome: Outcome) -> tuple[int, dict[str, Any]]:
    """Status and body of what is known by now."""
    if not outcome.done():
        return answer_to_wire(envelope.message, Pending(gid=envelope.message.gid, branch=envelope.message.branch))
    answer = outcome.result()
    if answer is None:
        return _UNAVAILABLE.status, _UNAVAILABLE.body()
    return answer_to_wire(envelope.message, answer)


def refuse_exposure(host: str, settings: ServerSettings) -> None:
    """Raises `SettingsError` unless `host` is this machine only, or there are TLS and a token to be reached with."""
    if is_loopback(host):
        return
    for there, what in (
        (settings.certificate, "TLS: make files with `outlast certs`, and name them as certificate and key"),
        (settings.caller_token, "a caller_token, so that only coordinators are heard"),
    ):
        if there is None:
            raise SettingsError(f"to listen on {host!r}, beyond loopback, a participant needs {what}; or use 127.0.0.1")


# ------------------------------------------------------------------------------------------------ running it


async def start(
    manager: ResourceManager, *, host: str = "127.0.0.1", port: int = 0, settings: ServerSettings | None = None
) -> Participant:
    """Serves `manager` until `stop` is called on what this returns. Port 0 takes a free one.

    Raises `SettingsError` for a host beyond loopback without TLS and token, and for files that will not do, `OSError`
    when the port is taken, and what the manager's `open` raises; the manager is then closed.
    """
    participant = Participant(manager, settings or ServerSettings())
    try:
        await participant.start(host, port)
    except BaseException:
        await participant.stop()
        raise
    return participant


async def serve(
    manager: ResourceManager, *, host: str = "127.0.0.1", port: int = 0, settings: ServerSettings | None = None
) -> None:
    """Serves `manager` until SIGTERM or SIGINT, and says where on standard output. Raises what `start` raises."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    participant = await start(manager, host=host, port=port, settings=settings)
    if settings is not None and settings.certificate is not None:
        loop.add_signal_handler(signal.SIGHUP, participant.reload)
    try:
        print(f"listening on {participant.url}", flush=True)
        await stop.wait()
    finally:
        await participant.stop()


def run(
    manager: ResourceManager, *, host: str = "127.0.0.1", port: int = 0, settings: ServerSettings | None = None
) -> None:
    """`serve` as a whole process."""
    uvloop.run(serve(manager, host=host, port=port, settings=settings))
