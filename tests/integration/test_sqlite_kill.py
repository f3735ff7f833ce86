"""A participant that is killed under load: whatever it has said stays true."""

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field

import aiohttp
import apsw
import pytest

from coordinator.codec import Malformed, answer_from_wire, call_of, request_to_wire
from coordinator.protocol.messages import Acked, Commit, Prepare, Prepared, Refused, Stamp
from participants.shop import inventory

pytestmark = pytest.mark.processes

SKUS, STOCK, CLIENTS, KILLS = 400, 1000, 32, 3
ENOUGH_VOTES = 300
"""Acknowledged prepares between two kills."""
DEADLINE_S = 60.0


@dataclass
class Told:
    """What the participant has said, over all its lives."""

    prepared: dict[str, str] = field(default_factory=dict)  # gid -> SKU, neither acked nor perhaps committed
    perhaps: dict[str, str] = field(default_factory=dict)  # a commit was sent, and not answered
    committed: dict[str, str] = field(default_factory=dict)
    refused: Counter = field(default_factory=Counter)
    votes: int = 0


class Participant:
    """The inventory as a process of its own."""

    def __init__(self, folder):
        self.folder = folder

    async def start(self):
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "participants.shop", "inventory", "--data", str(self.folder)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(DEADLINE_S):
            line = (await self.process.stdout.readline()).decode()
        if not line.startswith("listening on http://127.0.0.1:"):
            raise AssertionError(line + (await self.process.stderr.read()).decode())
        self.url = line.removeprefix("listening on ").strip()

    async def end(self, number):
        os.kill(self.process.pid, number)
        async with asyncio.timeout(DEADLINE_S):
            _, errors = await self.process.communicate()
        return self.process.returncode, errors.decode()


class Load:
    """Clients that reserve pieces, and commit about half of what they reserved."""

    def __init__(self, participant, told, rng):
        self.participant, self.told, self.rng = participant, told, rng
        self.last = 0
        self.enough = asyncio.Event()

    async def send(self, session, message):
        body = request_to_wire(message, Stamp(epoch=1))
        async with session.post(f"{self.participant.url}/{call_of(message)}", json=body) as response:
            return answer_from_wire(message, response.status, await response.json())

    def reserve(self, sku):
        self.last += 1
        payload = f'{{"op":"reserve","sku":"{sku}","quantity":1}}'.encode()
        return Prepare(gid=f"shop-1-{self.last}", branch="inventory", payload=payload)

    async def client(self, session):
        told = self.told
        while True:
            sku = f"sku-{self.rng.randrange(SKUS)}"
            request = self.reserve(sku)
            try:
                vote = await self.send(session, request)
            except (aiohttp.ClientError, OSError, Malformed):
                return  # it was killed: what it did not say does not count
            if isinstance(vote, Refused):
                told.refused[vote.reason] += 1
                continue
            assert isinstance(vote, Prepared)
            told.prepared[vote.gid] = sku
            told.votes += 1
            if told.votes % ENOUGH_VOTES == 0:
                self.enough.set()
            if self.rng.random() < 0.7:
                told.perhaps[vote.gid] = told.prepared.pop(vote.gid)
                try:
                    answer = await self.send(session, Commit(gid=vote.gid, branch="inventory"))
                except (aiohttp.ClientError, OSError, Malformed):
                    return
                assert isinstance(answer, Acked)
                told.committed[vote.gid] = told.perhaps.pop(vote.gid)

    async def until_killed(self):
        self.enough.clear()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            clients = [asyncio.ensure_future(self.client(session)) for _ in range(CLIENTS)]
            async with asyncio.timeout(DEADLINE_S):
                await self.enough.wait()
                code, _ = await self.participant.end(signal.SIGKILL)
                await asyncio.gather(*clients)
        assert code == -signal.SIGKILL


async def in_doubt(participant):
    async with aiohttp.ClientSession() as session, session.get(participant.url + "/branches") as response:
        return {each["gid"] for each in (await response.json())["branches"]}


async def test_what_was_voted_and_acked_survives_kill_9(tmp_path):
    inventory.seed(tmp_path, {f"sku-{i}": STOCK for i in range(SKUS)})
    participant, told = Participant(tmp_path), Told()
    load = Load(participant, told, random.Random(20))
    for _ in range(KILLS):
        await participant.start()
        await load.until_killed()
        await participant.start()
        found = await in_doubt(participant)
        assert told.prepared.keys() <= found, "a vote was lost"
        assert not told.committed.keys() & found, "an ack was lost"
        async with aiohttp.ClientSession() as session:
            for gid, sku in list(told.prepared.items())[:20]:
                answer = await load.send(session, load.reserve(sku))
                assert answer.reason == "locked: stock", (gid, answer)
            # The courier never gives up: whoever is prepared hears its decision in the end.
            for gid in found:
                assert isinstance(await load.send(session, Commit(gid=gid, branch="inventory")), Acked)
        known = told.prepared | told.perhaps
        told.committed |= known
        told.prepared.clear()
        told.perhaps.clear()
        assert await in_doubt(participant) == set()
        code, errors = await participant.end(signal.SIGTERM)
        assert code == 0, errors
        assert "ALARM" not in errors
        check_the_books(tmp_path, told)
    assert told.votes >= KILLS * ENOUGH_VOTES
    assert told.refused.keys() <= {"locked: stock"}


def check_the_books(folder, told):
    """What is committed is there once, and nothing was lost or made. A vote that was never heard may be there too."""
    connection = apsw.Connection(str(folder / inventory.DATABASE))
    rows = connection.execute("SELECT gid, sku, quantity FROM reservation").fetchall()
    stock = dict(connection.execute("SELECT sku, initial - available FROM stock").fetchall())
    assert connection.pragma("integrity_check") == "ok"
    assert connection.execute("SELECT count(*) FROM outlast_lock").get == 0
    connection.close()
    reserved = {gid: sku for gid, sku, _ in rows}
    assert told.committed.items() <= reserved.items(), "a commit was lost"
    sold = Counter(sku for _, sku, _ in rows)
    assert {sku: gone for sku, gone in stock.items() if gone} == sold


async def test_a_second_process_is_told_who_has_the_database(tmp_path):
    participant = Participant(tmp_path)
    await participant.start()
    second = Participant(tmp_path)
    with pytest.raises(AssertionError, match=r"error: .*inventory\.db is in use by another resource manager") as told:
        await second.start()
    assert "Traceback" not in str(told.value)
    assert await second.process.wait() == 1
    code, errors = await participant.end(signal.SIGINT)
    assert code == 0, errors
