"""Follows an application that does transactions of its own, and that may die: what it says goes into the history.

Whoever is told nothing asks again, and a dead application cannot. So somebody else does it in its place, as its
successor would in life: under the same key, `begin` finds the transaction that it names, until that is decided.
"""

import asyncio
import json
import random
from collections.abc import Mapping
from typing import Any, Final

from cluster.calls import Caller
from cluster.chaos.history import Recorder
from cluster.chaos.load import MOVE_TIMEOUT_S, asked
from cluster.process import Process

BOOK: Final = "application"
"""What the history calls its transactions."""

_LOOK_S: Final = 0.05
_AGAIN_S: Final = 0.25
_BODY: Final = "move"


class Applications:
    """The lives of one application. process: runs it. caller reaches the nodes, at `nodes`."""

    def __init__(
        self, process: Process, caller: Caller, nodes: Mapping[str, str], recorder: Recorder, seed: int
    ) -> None:
        self.lives = 0
        self._process, self._caller, self._nodes, self._recorder = process, caller, nodes, recorder
        self._rng = random.Random(f"applications {seed}")
        self._ops: dict[str, int] = {}
        """Under way, by key."""
        self._read = 0
        self._op = 0
        self._over = asyncio.Event()
        self._patience_s = float("inf")

    async def run(self) -> None:
        """Let it live, again and again, until `stop`; on return the outcome of whatever it began is known."""
        async with asyncio.TaskGroup() as asking:
            try:
                while not self._over.is_set():
                    if not self._process.alive:
                        self._bury(asking)
                        self.lives += 1
                        self._process.spawn(str(self.lives))
                        self._recorder.note("lived", life=self.lives)
                    self._listen(asking)
                    await asyncio.sleep(_LOOK_S)
            finally:
                await self._process.kill()
            self._bury(asking)

    def stop(self, *, patience_s: float) -> None:
        """No more lives. What is undecided may take so long."""
        self._patience_s = self._recorder.now_s + patience_s
        self._over.set()

    def _bury(self, asking: asyncio.TaskGroup) -> None:
        """It has said all that it will ever say."""
        self._listen(asking)
        for key in [*self._ops]:
            self._answer(asking, key, "unknown", None, "the application has died")

    def _listen(self, asking: asyncio.TaskGroup) -> None:
        log = self._process.program.log
        if not log.exists():
            return
        with log.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            said = _parsed(line)
            if "asked" in said:
                self._ops[said["asked"]] = self._ask(said["asked"])
            elif said.get("answered") in self._ops:
                self._answer(asking, said["answered"], said["outcome"], said["gid"], said["detail"])

    def _ask(self, key: str, node: str = "any") -> int:
        self._op += 1
        op = 10_000_000 + self._op  # apart from those of other clients
        self._recorder.note("asked", op=op, client="application", key=key, body=_BODY, node=node, of=BOOK)
        return op

    def _answer(self, asking: asyncio.TaskGroup, key: str, outcome: str, gid: str | None, detail: str | None) -> None:
        self._recorder.note("answered", op=self._ops.pop(key), outcome=outcome, gid=gid, detail=detail)
        if outcome == "unknown":
            asking.create_task(self._find_out(key))

    async def _find_out(self, key: str) -> None:
        """Ask under its key until there is a decision."""
        while self._recorder.now_s < self._patience_s:
            node = self._rng.choice([*self._nodes])
            op = self._ask(key, node)
            url, body = f"{self._nodes[node]}/v1/transactions/begin", {"timeout_s": MOVE_TIMEOUT_S}
            told = await asked(self._caller, self._recorder, op, url, key, body)
            if told.outcome not in ("undecided", "unknown"):
                return
            await asyncio.sleep(_AGAIN_S * self._rng.uniform(0.5, 2.0))


def _parsed(line: bytes) -> dict[str, Any]:
    """What it said; nothing, for a line that is none of its words."""
    if not line.startswith(b"{"):
        return {}
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
