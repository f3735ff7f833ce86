"""`/v1/backup` and `/v1/restore`: the whole ledger as one stream, out of a cluster that works, into one that is new.

**Out.** The leader logs a barrier, so that all that was told to anybody before the call is in the copy, freezes the
ledger, which takes less than a millisecond, and encodes it piece by piece on another thread: the next piece is made
when the client has taken the one before. Nothing waits for a slow client but its own connection, which is given up when
nothing moves on it.

**In.** The leader puts the pieces through the log, some at a time, and each node decodes them as they come. The last
entry names how many there were, and their digest: if that is what has come, the copy takes the place of the state on
every node, in no time, because nothing is left to be decoded; else all of it is dropped. When the leader changes
midway, nothing has happened; whoever asks again starts over.
"""

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final, ParamSpec, TypeVar

from aiohttp import web

from cluster.replication.clock import Clock
from coordinator import parsing
from coordinator.bodies import whole_body
from coordinator.codec import JSON_TYPE, json_bytes
from coordinator.config import NodeConfig
from coordinator.copies import CopyBroken, CopyHeader, CopyReader, cut, written
from coordinator.driver import Driver
from coordinator.errors import (
    BadRequest,
    Conflict,
    NotEmpty,
    NotFound,
    NotLeader,
    NotRestored,
    OutcomeUnknown,
    ShuttingDown,
    SlowBody,
    TooLarge,
    TooMany,
    Unprocessable,
)
from coordinator.facts import Applied, Verdict
from coordinator.inquiry import Inquiry
from coordinator.ledger import Ledger
from coordinator.lost import base_above
from coordinator.protocol.entries import CopyInstalled, CopyPiece, LostRangeNoted
from coordinator.relay import Relay, break_off

_log = logging.getLogger(__name__)

_PIECES_UNDER_WAY: Final = 8
"""Of a restore, in the log at once."""
_READ_BYTES: Final = 256 << 10

COPY_TYPE: Final = "application/octet-stream"


class Copying:
    """The routes that carry whole ledgers."""

    def __init__(
        self, *, config: NodeConfig, driver: Driver, ledger: Ledger, clock: Clock, relay: Relay, inquiry: Inquiry
    ) -> None:
        self._config = config
        self._driver = driver
        self._ledger = ledger
        self._clock = clock
        self._relay = relay
        self._inquiry = inquiry
        self._backups = 0
        """Streams under way."""
        self._discarding: set[asyncio.Future[Applied]] = set()

    def routes(self) -> list[web.RouteDef]:
        """What it answers."""
        return [
            web.get("/v1/backup", self._backup),
            web.post("/v1/restore", self._restore),
            web.get("/v1/reconciliation", self._reconciliation),
            web.put("/v1/reconciliation", self._leave_out),
        ]

    async def _backup(self, request: web.Request) -> web.StreamResponse:
        async def here() -> web.StreamResponse:
            most = self._config.limits.max_backups
            if self._backups >= most:
                raise TooMany(
                    f"{most} backups are under way (max_backups); nothing was begun, try again later",
                    code="too_many_backups",
                )
            self._backups += 1
            try:
                await self._driver.barrier()
                self._driver.require_copy()
                return await self._stream(request)
            finally:
                self._backups -= 1

        return await self._relay.stream(request, here, upload=False, stall_s=self._config.timing.copy_stall_s)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        ledger = self._ledger
        newest = ledger.newest()
        header = CopyHeader(
            cluster=ledger.cluster,
            level=ledger.level,
            epoch=ledger.epoch,
            generation=self._config.generation,
            made_at=self._clock.wall_ms(),
            transactions=len(ledger),
            undecided=sum(txn.decision is None for txn in ledger.unfinished.values()),
            newest=None if newest is None else str(newest),
        )
        # In one turn with the header: nothing is applied between them.
        parts = written(header, cut(ledger.snapshot()()))
        answer = web.StreamResponse(headers={"Content-Type": COPY_TYPE})
        loop = asyncio.get_running_loop()
        try:
            await answer.prepare(request)
            while (part := await loop.run_in_executor(None, next, parts, None)) is not None:
                async with asyncio.timeout(self._config.timing.copy_stall_s):
                    await answer.write(part)
            await answer.write_eof()
        except (OSError, TimeoutError) as error:
            # It has no trailer, so nobody takes it for whole; and there is nobody left to tell.
            _log.warning("a backup was broken off: %s", error or "its reader has stalled")
            break_off(request)
        return answer

    # -------------------------------------------------------------------------------------------- restore

    async def _restore(self, request: web.Request) -> web.StreamResponse:
        for name in request.query:
            if name != "above_epoch":
                raise Unprocessable(
                    f"the query has no field {name[:100]!r}; there is above_epoch", code="unknown_field"
                )
        text = request.query.get("above_epoch", "0")
        if not (text.isascii() and text.isdigit() and len(text) < 8):
            raise Unprocessable("above_epoch must be an epoch")
        length, most = request.content_length, self._config.limits.max_restore_bytes
        if length is not None and length > most:
            raise TooLarge(f"the copy has {length} bytes; at most {most} (max_restore_bytes)")

        async def here() -> web.StreamResponse:
            self._driver.require_restorable()
            try:
                return await self._take_in(request, int(text))
            except (NotLeader, ShuttingDown) as error:
                raise NotRestored(f"the leader changed midway: {error}; nothing was done, restore again") from error

        return await self._relay.stream(request, here, upload=True, stall_s=self._config.timing.copy_stall_s)

    async def _take_in(self, request: web.Request, above: int) -> web.Response:
        restore, reader = uuid.uuid4().hex, CopyReader()
        most = 2 * self._config.limits.max_command_bytes - 1000
        under_way: deque[asyncio.Future[Applied]] = deque()
        count = 0
        try:
            async for part in self._parts(request):
                pieces = _checked(reader.feed, part)
                if reader.header is not None:
                    self._check(reader.header)
                for piece in pieces:
                    if len(piece) > most:
                        raise Unprocessable(
                            f"a piece of {len(piece)} bytes; the log takes {most}: raise max_command_bytes"
                        )
                    if len(under_way) >= _PIECES_UNDER_WAY:
                        await _staged(under_way.popleft())
                    entry = CopyPiece(restore=restore, index=count, data=piece)
                    # Each is a command of its own, however small: decoding one takes some milliseconds.
                    alone = self._config.limits.max_command_bytes
                    under_way.append(asyncio.ensure_future(self._driver.log(entry, alone)))
                    count += 1
                    # Queued in this order before another is.
                    await asyncio.sleep(0)
            header, trailer = _checked(reader.end)
            while under_way:
                await _staged(under_way.popleft())
            base = base_above(header.epoch, self._ledger.epoch, above)
            if base is None:
                raise Unprocessable(
                    f"gids have no room for epochs beyond {header.epoch} and a margin: use a cluster of another name"
                )
            applied = await self._driver.log(
                CopyInstalled(restore=restore, pieces=trailer.pieces, digest=trailer.digest, epoch_base=base), 200
            )
        except BaseException:
            for future in under_way:
                future.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            self._discard(restore)
            raise
        if applied.verdict is not Verdict.APPLIED:
            if not self._ledger.is_fresh:
                raise NotEmpty("this cluster has had transactions meanwhile; nothing was done")
            raise NotRestored(f"the copy was not taken: {applied.detail or applied.verdict.value}; nothing was done")
        _log.warning("restored %d transactions from a copy made at %d", header.transactions, header.made_at)
        body = {"restored": header.to_plain(), "epoch_base": base, "reconciliation": self._inquiry.status()}
        return web.Response(body=json_bytes(body), content_type=JSON_TYPE)

    async def _parts(self, request: web.Request) -> AsyncIterator[bytes]:
        stall_s, left = self._config.timing.copy_stall_s, self._config.limits.max_restore_bytes
        while not request.content.at_eof():
            try:
                async with asyncio.timeout(stall_s):
                    part = await request.content.read(_READ_BYTES)
            except TimeoutError as error:
                raise SlowBody(
                    f"nothing of the copy came for {stall_s:g} s (copy_stall_s); nothing was done"
                ) from error
            except ConnectionError as error:
                raise BadRequest("the connection ended before the copy did; nothing was done") from error
            left -= len(part)
            if left < 0:
                raise TooLarge("the copy is too large (max_restore_bytes); nothing was done")
            yield part

    def _check(self, header: CopyHeader) -> None:
        if header.cluster != self._ledger.cluster:
            raise Unprocessable(
                f"this is a copy of the cluster {header.cluster}, and here is {self._ledger.cluster}: gids begin with "
                "the name, so it must be the same; nothing was done",
                code="other_cluster",
            )
        if header.generation >= self._config.generation:
            raise Conflict(
                f"the copy is of generation {header.generation} of this cluster, and the cluster is of generation "
                f"{self._config.generation}: set generation = {header.generation + 1} in the TOML file of every node, "
                "with empty data folders, so that no old node comes back into it; nothing was done (docs/RECOVERY.md)",
                code="same_generation",
            )
        if header.level > self._ledger.level:
            raise Unprocessable(
                f"the copy is of level {header.level}, and this cluster works at {self._ledger.level}: it needs newer "
                "software; nothing was done"
            )

    def _discard(self, restore: str) -> None:
        """Let the nodes drop what has come; should that fail, the next leader's first entry does it."""
        entry = CopyInstalled(restore=restore, pieces=0, digest=b"", epoch_base=0)
        task = asyncio.ensure_future(self._driver.log(entry, 200))
        self._discarding.add(task)
        task.add_done_callback(self._discarded)

    def _discarded(self, task: "asyncio.Future[Applied]") -> None:
        self._discarding.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.info("a restore that was not finished is dropped later: %s", error)

    # -------------------------------------------------------------------------------------------- what follows

    async def _reconciliation(self, request: web.Request) -> web.Response:
        async def here() -> web.Response:
            if not self._driver.leading:
                raise NotLeader("the leader knows how far it is")
            return web.Response(body=json_bytes(self._inquiry.status()), content_type=JSON_TYPE)

        return await self._relay.run(request, here)

    async def _leave_out(self, request: web.Request) -> web.Response:
        body = await whole_body(request, self._config.limits)
        fields = parsing.json_object(body)
        name = fields.get("without")
        if set(fields) != {"without"} or not isinstance(name, str):
            raise Unprocessable('the body must be {"without": the name of a participant}')

        async def here() -> web.Response:
            if not self._driver.leading:
                raise NotLeader("a follower may be behind")
            if self._ledger.lost is None:
                raise Conflict("nothing is being found out here: there is nobody to be left out")
            if name not in self._ledger.participants:
                raise NotFound(f"no participant {name[:100]!r} is registered")
            applied = await self._driver.log(LostRangeNoted(without=name), 200)
            if applied.verdict is not Verdict.APPLIED:
                raise NotLeader(f"it was not noted: {applied.verdict.value}")
            return web.Response(body=json_bytes(self._inquiry.status()), content_type=JSON_TYPE)

        return await self._relay.run(request, here, body=body, wait_s=self._config.timing.proposal_timeout_s)


_T = TypeVar("_T")
_P = ParamSpec("_P")


def _checked(step: Callable[_P, _T], *arguments: _P.args, **more: _P.kwargs) -> _T:
    try:
        return step(*arguments, **more)
    except CopyBroken as error:
        raise Unprocessable(f"{error}; nothing was done", code="broken_copy") from error


async def _staged(piece: "asyncio.Future[Applied]") -> None:
    try:
        applied = await piece
    except OutcomeUnknown as error:
        raise NotRestored("the log did not take a piece in time; nothing was done, restore again") from error
    if applied.verdict is Verdict.MALFORMED:
        raise Unprocessable(f"the copy cannot be used: {applied.detail}; nothing was done", code="broken_copy")
    if applied.verdict is not Verdict.APPLIED:
        raise NotRestored(f"the copy was not taken: {applied.detail or applied.verdict.value}; nothing was done")
