"""One node, put together around a replicated log: ledger, driver, courier, API. Any log will do."""

import asyncio
import logging
import random

from aiohttp import web

from cluster.replication.clock import Clock
from cluster.replication.log import ReplicatedLog
from coordinator.api import Api
from coordinator.config import NodeConfig, split_address
from coordinator.courier import Courier
from coordinator.driver import Driver
from coordinator.inquiry import Inquiry
from coordinator.ledger import Ledger
from coordinator.listening import listen
from coordinator.metrics import Metrics
from coordinator.tls import Tls

_log = logging.getLogger(__name__)


class Node:
    """Life of a node: `start`, then `stop`, which hands over, answers who waits, and only then goes.

    tls: opened from the configuration when it is left out, which raises `ConfigError`. rng: where chance comes from.
    """

    _ledger_type = Ledger
    _driver_type = Driver

    def __init__(
        self,
        config: NodeConfig,
        log: ReplicatedLog,
        clock: Clock,
        *,
        tls: Tls | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.config = config
        self._tls = tls = tls if tls is not None else Tls.load(config)
        self._rng = rng if rng is not None else random.SystemRandom()
        self.ledger = self._ledger_type(config.cluster)
        self.log = log
        self._clock = clock
        self._metrics = Metrics()
        self.driver = self._driver_type(
            config=config,
            ledger=self.ledger,
            log=log,
            clock=clock,
            metrics=self._metrics,
            courier=lambda stamp, heard: Courier(
                clock=clock,
                limits=config.limits,
                timing=config.timing,
                stamp=stamp,
                on_answers=heard,
                token=config.participant_token,
                tls=tls.participants,
                rng=self._rng,
            ),
        )
        self._inquiry = Inquiry(config=config, driver=self.driver, ledger=self.ledger, tls=tls.participants)
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen, and take part. Raises OSError when the port is taken, or what the log raises when it cannot start."""
        api = Api(
            config=self.config,
            driver=self.driver,
            ledger=self.ledger,
            log=self.log,
            clock=self._clock,
            metrics=self._metrics,
            inquiry=self._inquiry,
            tls=self._tls.api_client,
            rng=self._rng,
        )
        host, port = split_address(self.config.me.api, "api")
        # aiohttp waits so long twice: for requests that are whole, and then for all, bodies that never come included.
        self._runner = web.AppRunner(
            api.application(), access_log=None, shutdown_timeout=self.config.timing.stop_grace_s / 2
        )
        await self._runner.setup()
        await listen(
            self._runner, host, port, self._tls.api_server, limits=self.config.limits, timing=self.config.timing
        )
        await self.driver.start()
        self._inquiry.start()
        _log.info("node %s of cluster %s listens on %s", self.config.node, self.config.cluster, self.config.me.url)

    async def abandon(self) -> None:
        """Let go of everything after `start` has failed: nothing was promised yet."""
        if self._runner is not None:
            await self._runner.cleanup()
        await self._inquiry.stop()
        await self.driver.stop()

    async def stop(self) -> None:
        """Hand leadership over, let those who wait have their answers, and close. Nothing is lost: all is logged."""
        try:
            async with asyncio.timeout(self.config.timing.stop_grace_s):
                await self.driver.drain()
        except TimeoutError:
            _log.warning("leadership could not be handed over in time; another node will take it")
        if self._runner is not None:
            # Requests under way are waited for: the new leader's decisions reach this node's ledger and answer them.
            await self._runner.cleanup()
        await self._inquiry.stop()
        await self.driver.stop()
