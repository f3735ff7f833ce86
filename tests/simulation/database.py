"""A bank's database as applications see it: sessions on connections of their own, beside the participant's server.

A session works (it takes the lock of an account, for as long as the connection lasts) and prepares. What it was asked
for it does to its end, also when nobody waits for it any more, as database servers do; so a prepare may come after the
abort, from an application that is dead. The record that the abort has left behind then keeps it out.

    {"do": "work", "gid": ..., "branch": ..., "account": ..., "amount": ...}     one object a line, and so the answers:
    {"do": "prepare"}                                                            {"ok": true} or {"error": "..."}
"""

import asyncio
import json
from collections import deque
from typing import Any

from participants.manager import BranchId, Unavailable
from tests.simulation.bank import Bank, Denied

DATABASE_PORT = 5432


class Session(asyncio.Protocol):
    """One connection, in the bank's life."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._transport: Any = None
        self._unread = b""
        self._asked: deque[dict[str, Any]] = deque()
        self._busy = False
        self._lost = False
        self._work: tuple[BranchId, str, int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._unread = (self._unread + data).split(b"\n")
        self._asked.extend(json.loads(line) for line in lines)
        if self._asked and not self._busy:
            self._busy = True
            asyncio.get_running_loop().create_task(self._go_on())

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if not self._busy:
            self._bank.roll_back(self)

    async def _go_on(self) -> None:
        while self._asked:
            asked = self._asked.popleft()
            try:
                answer = await self._do(asked)
            except Denied as error:
                self._bank.roll_back(self)
                answer = {"error": str(error)}
            except Unavailable:
                self._transport.abort()
                break
            if not self._lost:
                self._transport.write(json.dumps(answer).encode() + b"\n")
        self._busy = False
        if self._lost:
            self._bank.roll_back(self)

    async def _do(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["do"] == "work":
            key, account, amount = BranchId(asked["gid"], asked["branch"]), asked["account"], asked["amount"]
            await self._bank.work_for(self, account, amount)
            self._work = (key, account, amount)
        elif self._work is None:
            raise Denied("there is nothing to prepare")
        else:
            await self._bank.prepare_for(self, *self._work)
            self._work = None
        return {"ok": True}


class Lost(Exception):
    """The connection broke, or nothing came in time: what was asked for may be done, or may be done yet."""


class Connection(asyncio.Protocol):
    """An application's end."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._unread = b""
        self._answer: asyncio.Future[dict[str, Any]] | None = None
        self._lost = False

    @classmethod
    async def open(cls, address: str, *, within_s: float) -> "Connection":
        """Raises `Lost`."""
        try:
            async with asyncio.timeout(within_s):
                _, connection = await asyncio.get_running_loop().create_connection(cls, address, DATABASE_PORT)
        except (TimeoutError, OSError) as error:
            raise Lost(str(error)) from error
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._unread += data
        if self._unread.endswith(b"\n") and self._answer is not None and not self._answer.done():
            self._answer.set_result(json.loads(self._unread))
            self._unread = b""

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Lost("the connection broke"))

    async def ask(self, *, within_s: float, **asked: Any) -> None:
        """Raises `Denied`: it was not done and is rolled back; `Lost`."""
        if self._lost:
            raise Lost("the connection broke")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(json.dumps(asked).encode() + b"\n")
        try:
            async with asyncio.timeout(within_s):
                answer = await self._answer
        except TimeoutError as error:
            raise Lost(f"no answer within {within_s:.2f} s") from error
        finally:
            self._answer = None
        if "error" in answer:
            raise Denied(answer["error"])

    def close(self) -> None:
        self._transport.close()
