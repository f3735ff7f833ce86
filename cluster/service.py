"""A participant as a process of its own: started, killed and started again on its data."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from cluster.calls import Caller, Unreachable
from cluster.certificates import Kind
from cluster.ports import HOST, require_free
from cluster.process import TERM_GRACE_S, Identity, Process, ProcessTrouble, Program, arguments

READY_S: Final = 30.0
"""Until a process that was started counts as one that never will listen. It may share a small machine with many."""

_LOOK_S: Final = 0.02


class Service:
    """One participant: `python -m MODULE ARGUMENTS...`, listening at `url`.

    name: under which it is registered, and which messages use.
    folder: of its log; made when it is missing.
    ca: who issued its certificate, if its URL is https.
    tether: the process it must not outlive, this one unless told otherwise; None: it outlives all.
    """

    def __init__(
        self,
        name: str,
        *,
        module: str,
        arguments: Sequence[str],
        url: str,
        folder: Path,
        ca: Path | None = None,
        tether: Identity | None = None,
        tethered: bool = True,
    ) -> None:
        self.name = name
        self.url = url.rstrip("/")
        self.ca = ca
        program = Program(module=module, arguments=tuple(arguments), log=folder / "log.txt")
        self.process = Process(name, program, tether=(tether or Identity.mine()) if tethered else None)

    @classmethod
    def shop(
        cls,
        name: str,
        *,
        data: Path,
        port: int,
        coordinators: Sequence[str],
        folder: Path | None = None,
        tls: Path | None = None,
        tethered: bool = True,
    ) -> "Service":
        """One of the worked example's services: inventory, payments or orders. Their databases lie in `data`.

        tls: the folder with its certificate, the authority and the tokens, as `layout.py` makes them.
        """
        words = arguments(name, "--data", data.absolute(), "--port", port)
        for url in coordinators:
            words += ("--coordinator", url)
        if tls is not None:
            stem = Kind.PARTICIPANT.file(name)
            words += arguments("--certificate", tls / f"{stem}.pem", "--key", tls / f"{stem}.key")
            words += arguments("--coordinator-ca", tls / "ca.pem", "--coordinator-token-file", tls / "token")
            words += arguments("--caller-token-file", tls / "participant-token")
        return cls(
            name,
            module="participants.shop",
            arguments=words,
            url=f"http{'' if tls is None else 's'}://{HOST}:{port}",
            folder=folder or data / name,
            ca=None if tls is None else tls / "ca.pem",
            tethered=tethered,
        )

    @property
    def alive(self) -> bool:
        """Whether its process runs; a paused one does."""
        return self.process.alive

    @property
    def pid(self) -> int | None:
        """Of its process."""
        return self.process.pid

    @property
    def port(self) -> int:
        """Where it listens on loopback."""
        port = urlsplit(self.url).port
        assert port is not None, "local services have ports of their own"
        return port

    def spawn(self) -> None:
        """Start the process and do not wait. Raises `ProcessTrouble`, for a port in use too."""
        if not self.alive:
            require_free(self.port, self.name)
        self.process.spawn()

    async def start(self, *, within_s: float = READY_S) -> None:
        """Start it; on return it listens. Raises `ProcessTrouble`."""
        self.spawn()
        await self.ready(within_s=within_s)

    async def ready(self, *, within_s: float = READY_S) -> None:
        """Return once it listens. Raises `ProcessTrouble`."""
        await listening(self.process, f"{self.url}/healthz", within_s=within_s, ca=self.ca)

    async def stop(self, *, grace_s: float = TERM_GRACE_S) -> bool:
        """SIGTERM, then kill -9. True when it ended by itself in time."""
        return await self.process.stop(grace_s=grace_s)

    async def kill(self) -> bool:
        """SIGKILL. True when it was running."""
        return await self.process.kill()

    def pause(self) -> bool:
        """SIGSTOP. False when it is not running."""
        return self.process.pause()

    def resume(self) -> bool:
        """SIGCONT. False when it is not running."""
        return self.process.resume()

    async def register(
        self,
        nodes: Sequence[str],
        *,
        url: str | None = None,
        batch: bool = True,
        within_s: float = 10.0,
        token: str | None = None,
        ca: Path | None = None,
    ) -> None:
        """Tell the cluster of it. `url`: where else the nodes shall find it, such as a tap. Raises `ProcessTrouble`."""
        await register(nodes, self.name, url or self.url, batch=batch, within_s=within_s, token=token, ca=ca)


async def register(
    nodes: Sequence[str],
    name: str,
    url: str,
    *,
    batch: bool,
    within_s: float = 10.0,
    token: str | None = None,
    ca: Path | None = None,
) -> None:
    """Make `name` known to the cluster at `nodes`. `token`, `ca`: see `Caller`. Raises `ProcessTrouble`."""
    async with Caller(nodes, token=token, ca=ca) as caller:
        body: dict[str, Any] = {"url": url, "batch": batch}
        try:
            answer = await caller.anywhere("PUT", f"/v1/participants/{name}", body=body, within_s=within_s)
        except Unreachable as error:
            raise ProcessTrouble(f"{name} could not be registered: {error}") from error
    if answer.status not in (200, 201, 204):
        raise ProcessTrouble(f"{name} could not be registered: {answer.trouble}")


async def listening(process: Process, url: str, *, within_s: float, ca: Path | None = None) -> None:
    """Return once `process` answers HTTP at `url`. Raises `ProcessTrouble`, at once when the process has ended."""
    deadline_s = time.monotonic() + within_s
    async with Caller(ca=ca) as caller:
        while True:
            try:
                answer = await caller.once("GET", url, within_s=1.0)
            except Unreachable:
                pass
            else:
                if process.alive and answer.status < 500:
                    return
            if not process.alive:
                said = process.last_words() or "nothing"
                raise ProcessTrouble(f"{process.name} ended before it listened: {said} (see {process.program.log})")
            if time.monotonic() > deadline_s:
                raise ProcessTrouble(
                    f"{process.name} does not listen after {within_s:g} s; its log is {process.program.log}"
                )
            await asyncio.sleep(_LOOK_S)
