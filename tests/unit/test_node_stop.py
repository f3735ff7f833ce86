"""A node that is asked to stop does not wait for its clients longer than it may."""

import asyncio
import time
from dataclasses import replace

import aiohttp

from tests.support.nodes import QUICK, configs, running
from tests.support.participants import ScriptedParticipant, hang
from tests.support.waiting import eventually

GRACE_S = 3.0


async def test_clients_that_wait_hold_up_a_stop_for_its_grace_and_no_longer(scripted: ScriptedParticipant) -> None:
    scripted.rule = hang
    (config,) = configs(timing=replace(QUICK, stop_grace_s=GRACE_S))
    async with running(config) as node:
        await node.register("stock", scripted.url)
        waiting = asyncio.create_task(node.submit("stock", timeout_s=60))
        _, writer = await asyncio.open_connection("127.0.0.1", int(config.me.api.rpartition(":")[2]))
        writer.write(b"POST /v1/transactions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        await eventually(lambda: scripted.heard)
        began_s = time.monotonic()
    took_s = time.monotonic() - began_s
    assert took_s < GRACE_S * 1.6
    writer.close()
    try:
        await waiting
    except aiohttp.ClientError:
        pass  # its connection was closed; it asks another node
    else:
        raise AssertionError("there is nothing that it could have been told")
