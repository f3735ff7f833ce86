"""A coordinator that keeps no log: what a node is measured by, when the participants in front of both databases serve.

To clients it is like a node: it answers `POST /v1/transactions`, once the transaction is decided. It drives the same
participants, in batches, with a node's own courier; so the connections to the databases and the statements on them are
the same. But its decisions are in its memory alone: when it dies, whatever is prepared then stays so for ever. What a
node does beyond that is the price of outlasting it.

    python -m tests.bench.naive 8080 bank-a=http://127.0.0.1:9001 bank-b=http://127.0.0.1:9002
"""

import asyncio
import logging
import sys
import time
from collections.abc import Mapping
from itertools import count

import uvloop
from aiohttp import web

from cluster.replication.clock import SystemClock
from coordinator.codec import JSON_TYPE, json_bytes, json_value
from coordinator.config import Limits, Timing
from coordinator.courier import Courier
from coordinator.facts import Participant
from coordinator.protocol.messages import Acked, Answer, Commit, Gid, Prepare, Prepared, Stamp

_CLUSTER = "naive"
_TIMEOUT_S = 10.0


class _Transaction:
    """`lacking`: branches whose vote is not there; once they all are, those that have not committed."""

    def __init__(self, branches: Mapping[str, Participant], decided: asyncio.Future[None]) -> None:
        self.branches, self.decided = branches, decided
        self.lacking = set(branches)


class Coordinator:
    """Two-phase commit from memory. It never undoes anything: a vote no is the end of the run."""

    def __init__(self, participants: Mapping[str, str]) -> None:
        self._participants = {name: Participant(name=name, url=url, batch=True) for name, url in participants.items()}
        self._clock = SystemClock()
        self._courier = Courier(
            clock=self._clock, limits=Limits(), timing=Timing(), stamp=self._stamp, on_answers=self._heard
        )
        # Later runs on the same databases must not meet the names of earlier ones; an epoch has seven digits at most.
        self._epoch = int(time.time()) % 8_000_000
        self._sequence = count(1)
        self._in_flight: dict[str, _Transaction] = {}

    async def transact(self, request: web.Request) -> web.Response:
        """Prepares every branch, and decides once all are prepared; what they commit, it does not wait for."""
        body = json_value(await request.read())
        gid = str(Gid(_CLUSTER, self._epoch, next(self._sequence)))
        branches = {each["participant"]: self._participants[each["participant"]] for each in body["branches"]}
        transaction = _Transaction(branches, asyncio.get_running_loop().create_future())
        self._in_flight[gid] = transaction
        expires_s = self._clock.monotonic_s() + _TIMEOUT_S
        for each in body["branches"]:
            name = each["participant"]
            message = Prepare(gid=gid, branch=name, payload=json_bytes(each["payload"]))
            self._courier.send(self._participants[name], message, expires_s=expires_s)
        await transaction.decided
        return web.Response(body=json_bytes({"gid": gid, "decision": "commit"}), content_type=JSON_TYPE)

    def _stamp(self, _participant: str) -> Stamp:
        # The oldest in flight: below it participants forget their records, as they do for a node.
        return Stamp(epoch=self._epoch, floor=next(iter(self._in_flight), None))

    def _heard(self, answers: list[Answer]) -> None:
        for answer in answers:
            transaction = self._in_flight[answer.gid]
            if not isinstance(answer, Acked if transaction.decided.done() else Prepared):
                raise SystemExit(f"it never undoes anything, and was told {answer}")
            transaction.lacking.discard(answer.branch)
            if transaction.lacking:
                continue
            if transaction.decided.done():
                del self._in_flight[answer.gid]
                continue
            transaction.decided.set_result(None)
            transaction.lacking.update(transaction.branches)
            for name, participant in transaction.branches.items():
                self._courier.send(participant, Commit(gid=answer.gid, branch=name))


async def _healthz(_request: web.Request) -> web.Response:
    return web.Response()


async def _main(port: int, participants: Mapping[str, str]) -> None:
    application = web.Application()
    application.router.add_post("/v1/transactions", Coordinator(participants).transact)
    application.router.add_get("/healthz", _healthz)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    logging.basicConfig()
    uvloop.run(_main(int(sys.argv[1]), dict(each.split("=", 1) for each in sys.argv[2:])))
