"""A whole cluster with its participants and clients, from one seed: it lives, is hurt, is healed, and is judged.

Real: pysyncobj behind `RaftLog`, the journal and the snapshots, `Node` with its ledger, driver, courier, connections,
API and relay, aiohttp on both sides, the participants' server, intake, resolver and automaton. Simulated: the event
loop and its clocks, TCP under it, the wire between nodes, disks, the store of the banks.
"""

import asyncio
import contextlib
import contextvars
import logging
import random
import secrets
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, TypeVar

from aiohttp import helpers, web_app
from pysyncobj import syncobj as stock

from cluster.replication import raft_log
from cluster.replication.guard import Guard
from cluster.replication.journal import DurableJournal, JournalSettings
from cluster.replication.log import CannotStart
from cluster.replication.raft_journal import RaftJournal
from cluster.replication.raft_log import RaftLog
from cluster.replication.segments import SegmentSettings
from cluster.replication.settings import RaftSettings
from coordinator import copying
from coordinator.config import Compatibility, NodeConfig, Peer, Timing
from coordinator.facts import Verdict
from coordinator.levels import NEWEST, OLDEST
from coordinator.node import Node
from coordinator.protocol.entries import Begun, Opened
from participants.server import Participant
from participants.settings import ServerSettings
from tests.simulation.applications import Application
from tests.simulation.bank import OPENING_BALANCE, Bank, Heard, Mood, Store
from tests.simulation.checkers import CHECKERS, Checker
from tests.simulation.clients import ACCOUNTS, API_PORT, Client
from tests.simulation.database import DATABASE_PORT, Session
from tests.simulation.faults import APPLICATIONS, BANKS, CLIENTS, NODES, Miss, Plan
from tests.simulation.http import NoAnswer, call
from tests.simulation.injection import Injector
from tests.simulation.internet import ConnectedLoop, Internet, Tcp
from tests.simulation.logs import Log, follows_from_faults
from tests.simulation.machines import Life, Machine
from tests.simulation.recovery import Recovery
from tests.simulation.watched import NodeDisk, Pump, watched_journal, watched_log, watched_node
from tests.simulation.wire import Wire, WireEnd

CLUSTER: Final = "sim"
Result = TypeVar("Result")
BANK_PORT: Final = 9000
START_WITHIN_S: Final = 15.0
_JOURNAL: Final = JournalSettings(
    segments=SegmentSettings(segment_bytes=6 * 1024, preallocate_bytes=0),
    unsynced_bytes_high=2**20,
    unsynced_bytes_max=2**24,
)
_NOBODY: Final = contextvars.Context()
"""Of no machine's life."""
REST_WITHIN_S: Final = 40.0
"""After all is healed: whatever was begun has ended, everywhere, and every client has had its way once more."""
_RESTART_WITHIN_S: Final = 8.0


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What a world is made of; known-bad variants put others in their places."""

    log: type[RaftLog] = RaftLog
    guard: type[Guard] = Guard
    journal: type[RaftJournal] = RaftJournal
    node: type[Node] = Node
    bank: type[Bank] = Bank
    injector: type[Injector] = Injector
    recovery: type[Recovery] = Recovery


@dataclass(kw_only=True)
class Report:
    """What a run came to."""

    seed: int
    complaints: list[str]
    virtual_s: float
    transactions: int
    committed: int
    leaders: int
    counts: dict[str, int]
    trace: list[str] = field(default_factory=list)


class World:
    """See the module's text."""

    def __init__(self, loop: ConnectedLoop, seed: int, plan: Plan, classes: Classes, *, tracing: bool) -> None:
        self.loop = loop
        self.seed = seed
        self.plan = plan
        self.classes = classes
        self.tracing = tracing
        self.trace: list[str] = []
        self.rng = self._stream("world")
        self.net = Internet(loop, self._stream("net"))
        if tracing:
            self.net.note = lambda who, what: self.note(who, what, fine=True)
        self.tcp = loop.tcp = Tcp(self.net)
        self.wire = Wire(self.net)
        self.machines: dict[str, Machine] = {}
        self.nodes: dict[str, Node] = {}
        self.disks: dict[str, NodeDisk] = {}
        self.stores: dict[str, Store] = {}
        self.moods: dict[str, Mood] = {}
        self.banks: dict[str, Participant] = {}
        self.clients: dict[str, Client] = {}
        self.checkers: list[Checker] = [make() for make in CHECKERS]
        self._heard: dict[str, list[Callable[..., None]]] = {}
        self.defects: list[str] = []
        self.closing = False
        self.injector = classes.injector(self)
        self.generation = 1
        self.is_down = False
        """There is no cluster, or not yet another one."""
        self.recovering = False
        """What was lost is not found out yet."""
        self.understands = {name: OLDEST if name in plan.old else NEWEST for name in NODES}
        """What the software of each node understands, when it runs next at the latest."""
        self._begun: set[str] = set()
        rng = self._stream("settings")
        for index, name in enumerate(NODES, start=1):
            self._add(Machine(loop, name, f"127.0.1.{index}"))
            self.disks[name] = NodeDisk(self, name, self._stream(f"disk {name}"))
        self._waits = {}
        for index, name in enumerate(BANKS, start=1):
            self._add(Machine(loop, name, f"127.0.2.{index}"))
            self.stores[name] = Store(self._stream(f"store {name}"), ACCOUNTS)
            self.moods[name] = Mood()
            self._waits[name] = rng.random() < 0.4
        for index, name in enumerate((*CLIENTS, "admin"), start=1):
            self._add(Machine(loop, name, f"127.0.3.{index}"))
        self._batch = {name: rng.random() < 0.6 for name in BANKS}
        self.money = OPENING_BALANCE * len(ACCOUNTS) * len(BANKS)
        self.journal_settings = _JOURNAL
        self.timing = Timing()
        self.peers = tuple(
            Peer(id=name, api=f"{self.machines[name].address}:{API_PORT}", raft=f"{self.machines[name].address}:7000")
            for name in NODES
        )
        self._raft = RaftSettings(
            snapshot_log_entries=rng.choice((8, 40, 100_000)), snapshot_piece_bytes=rng.choice((300, 5_000, 100_000))
        )
        self._bank_settings = ServerSettings(
            coordinators=tuple(peer.url for peer in self.peers), in_doubt_after_s=rng.choice((0.3, 1.0, 2.0))
        )
        self._log_type = watched_log(self, classes.log)

    def _stream(self, what: str) -> random.Random:
        return random.Random(f"{what} {self.seed}")

    def _add(self, machine: Machine) -> None:
        self.machines[machine.name] = machine
        self.net.add(machine)

    # What is said of it.

    def note(self, who: str, what: str, *, fine: bool = False) -> None:
        """A line of the trace."""
        if self.tracing:
            self.trace.append(f"{self.loop.now_s:9.4f} {'  ' if fine else ''}{who:<5} {what}")

    def hear(self, what: str, *about: Any) -> None:
        """Tell the checkers that listen."""
        listeners = self._heard.get(what)
        if listeners is None:
            deaf = getattr(Checker, what)
            listeners = [getattr(each, what) for each in self.checkers if getattr(type(each), what) is not deaf]
            self._heard[what] = listeners
        now_s = self.loop.now_s
        for checker in self.checkers:
            checker.now_s = now_s
        if what == "injected":
            fault, _, missed = about
            self.net.count(f"fault: {fault.kind}" if missed is None else f"missed, {missed.value}: {fault.kind}")
        elif what == "restored":
            self.net.count("states from a snapshot")
        for listener in listeners:
            listener(*about)
        if what == "applied" and isinstance(about[1].entry, Begun | Opened) and about[1].verdict is Verdict.APPLIED:
            self._begun.add(about[1].entry.gid)

    def defect(self, what: str) -> None:
        """What no fault explains."""
        if len(self.defects) < 5:
            self.defects.append(f"defect: {what} (at {self.loop.now_s:.3f})")
        self.note("world", f"DEFECT {what}")

    # Lives.

    def start(self, name: str) -> None:
        """A process starts on this machine."""
        machine = self.machines[name]
        life = machine.begin()
        self.note(name, f"starts, life {machine.lives}")
        work = self._run_node(name, life) if name in NODES else self._run_bank(name, life)
        self.loop.create_task(work, context=life.context)

    def end(self, name: str, *, power: bool) -> None:
        """It dies."""
        machine = self.machines[name]
        life = machine.life
        if life is None:
            return
        self.note(name, "has no power" if power else "is killed")
        machine.end(power=power)
        self.tcp.ended(life, power=power)
        if name in NODES:
            self.wire.detach(name, silent=power)
            disk = self.disks[name]
            if power:
                disk.lose_power()
            else:
                disk.kill()
            disk.crash_at = None
            disk.fail_at.clear()
            self.nodes.pop(name, None)
        elif name in BANKS:
            self.stores[name].crash()
            self.banks.pop(name, None)

    def dies_now(self, node: str, *, power: bool, down_s: float, doing: str) -> None:
        """In the middle of a call of its disk."""
        life = self.machines[node].life
        self.note(node, f"dies in a {doing} of its disk")
        if life is None:
            return
        life.dies()

        def buried() -> None:
            if self.machines[node].life is life:
                self.end(node, power=power)
                self.injector.starts_later(node, down_s)

        self.net.count(f"died in a {doing}")
        self.loop._ready.appendleft(asyncio.Handle(buried, (), self.loop, _NOBODY))

    async def _run_node(self, name: str, life: Life) -> None:
        machine, disk = self.machines[name], self.disks[name]
        rng = self._stream(f"{name} {machine.lives}")
        config = NodeConfig(
            cluster=CLUSTER,
            node=name,
            data=Path("/nowhere"),
            nodes=self.peers,
            secret="s" * 16,
            timing=self.timing,
            generation=self.generation,
            compatibility=Compatibility(highest_level=self.understands[name]),
        )
        journal_type = watched_journal(self, name, self.classes.journal)

        def journal() -> RaftJournal:
            durable = DurableJournal(disk, self.journal_settings, new_id=lambda: name.encode().ljust(16))
            return journal_type(disk, durable, lambda: Pump(self.loop, disk))

        def fatal(error: BaseException) -> None:
            self.note(name, f"must stop: {error!r}")
            if not follows_from_faults(error):
                self.defect(f"{name} stops: {error!r}")
            self._exits(name, life)

        log = self._log_type(
            node=name,
            peers=[other for other in NODES if other != name],
            transport=WireEnd(self.wire, name),
            journal=journal,
            settings=self._raft,
            clock=machine,
            guard=self.classes.guard(),
            rejoin=disk.was_lost and not disk._names,
            understands=config.compatibility.announced,
            on_fatal=fatal,
        )
        node = watched_node(self, name, self.classes.node)(config, log, machine, rng=rng)
        node.ledger.understands = config.compatibility.announced
        self.nodes[name] = node
        try:
            await node.start()
        except CannotStart as error:
            self.defect(f"{name} cannot start: {error}")
            self._exits(name, life)
        except OSError as error:
            self.note(name, f"cannot start: {error}")
            self._exits(name, life)

    def _exits(self, name: str, life: Life) -> None:
        """Its process ends by itself, and whoever watches over it starts it again."""
        life.dies()

        def gone() -> None:
            if self.machines[name].life is life:
                self.end(name, power=False)
                self.injector.starts_later(name, self.rng.uniform(0.2, 1.0))

        self.loop.call_soon(gone, context=_NOBODY)

    async def _run_bank(self, name: str, life: Life) -> None:
        machine = self.machines[name]
        rng = self._stream(f"{name} {machine.lives}")
        heard = Heard(
            decided=lambda gid, outcome, who: self.hear("saw", gid, outcome, f"{who} was told"),
            changed=lambda bank: self.hear("bank_changed", bank),
            counted=self.net.count,
        )
        bank = self.classes.bank(
            name, self.stores[name], machine, rng, self.moods[name], heard, waits=self._waits[name]
        )
        participant = Participant(bank, self._bank_settings, rng=rng)
        self.banks[name] = participant
        await participant.start(machine.address, BANK_PORT)
        await self.loop.create_server(lambda: Session(bank), machine.address, DATABASE_PORT)

    def _run_client(self, name: str) -> None:
        life = self.machines[name].begin()
        self.loop.create_task(self.clients[name].live(), context=life.context)

    # What may befall it, beside deaths.

    def leader(self) -> str | None:
        """Who leads the highest term, of those that live."""
        leading = []
        for name, node in sorted(self.nodes.items()):
            leadership = node.log.leadership()
            if leadership.is_leader and not self.machines[name].paused:
                leading.append((leadership.term, name))
        return max(leading)[1] if leading else None

    def transfer(self, name: str) -> bool:
        """Leadership is to be handed over; False: this node does not lead."""
        life, node = self.machines[name].life, self.nodes.get(name)
        if life is None or node is None:
            return False
        leads = self.leader() == name

        async def hand_over() -> None:
            self.note(name, f"leadership handed over: {await node.log.transfer()}")

        self.loop.create_task(hand_over(), context=life.context)
        return leads

    def restart(self, name: str, down_s: float) -> Miss | None:
        """A graceful stop, and a start later; or why there is nothing to be stopped."""
        life, node = self.machines[name].life, self.nodes.get(name)
        if life is None or node is None:
            return Miss.NOT_STARTED
        if life.stops:
            return Miss.STOPS  # a second SIGTERM changes nothing
        life.stops = True

        async def stop() -> None:
            await node.stop()
            self.note(name, "has stopped")
            self._exits(name, life)

        def too_slow() -> None:
            if self.machines[name].life is life:
                self.note(name, "does not stop, and is killed")
                self.end(name, power=False)
                self.injector.starts_later(name, down_s)

        self.note(name, "is asked to stop")
        self.loop.create_task(stop(), context=life.context)
        self.loop.call_later(_RESTART_WITHIN_S, too_slow)
        return None

    def upgrade(self, name: str, down_s: float, *, gracefully: bool) -> None:
        """It gets the newest software, with its next start, which is soon."""
        self.understands[name] = NEWEST
        if gracefully:
            self.restart(name, down_s)
        elif self.machines[name].life is not None:
            self.end(name, power=False)
            self.injector.starts_later(name, down_s)

    def replica(self, name: str) -> Any:
        """The node's, as it lives now; None: there is none (yet)."""
        node = self.nodes.get(name)
        log: Any = None if node is None else node.log
        return None if log is None else log._replica

    def snapshot(self, name: str) -> bool:
        """As if much had been applied since the last one; False: nothing can have been."""
        replica = self.replica(name)
        if replica is not None:
            replica.applied_bytes = 2**40
        return replica is not None

    def vanish(self, name: str, for_s: float) -> bool:
        """A client is gone in the middle of whatever it does; later it begins something else. False: it was gone."""
        machine = self.machines[name]
        if machine.life is None:
            return False
        life = machine.life
        machine.end(power=False)
        self.tcp.ended(life, power=False)
        self.loop.call_later(for_s, self._run_client, name)
        return True

    def dies_by_itself(self, client: str, for_s: float) -> None:
        """As `vanish`, from within its life."""
        self.loop.call_soon(self.vanish, client, for_s, context=_NOBODY)

    # Its course.

    async def run(self) -> None:
        """Start, be hurt, be healed, come to rest."""
        self.hear("starts", self)
        for name in (*NODES, *BANKS):
            self.start(name)
        self.machines["admin"].begin()
        registered = self.as_admin(self.register())
        await asyncio.wait([registered], timeout=START_WITHIN_S)
        if not registered.done():
            self.defect("the cluster does not start")
            return
        registered.result()
        for name in CLIENTS:
            kind = Application if name in APPLICATIONS else Client
            self.clients[name] = kind(self, name, self._stream(name))
            self._run_client(name)
        self.injector.schedule(self.loop.now_s)
        if self.plan.disaster is not None:
            self.loop.create_task(self.classes.recovery(self, self.plan.disaster, self.loop.now_s).run())
        await self._until(self.loop.now_s + self.plan.heal_s)
        self._heal()
        await self._rest()

    def as_admin(self, work: Coroutine[Any, Any, Result]) -> "asyncio.Task[Result]":
        """Who runs the cluster does this."""
        life = self.machines["admin"].life
        assert life is not None
        return self.loop.create_task(work, context=life.context)

    async def register(self) -> None:
        """Every bank is a participant."""
        for bank in BANKS:
            body = {"url": f"http://{self.machines[bank].address}:{BANK_PORT}", "batch": self._batch[bank]}
            while True:
                with contextlib.suppress(NoAnswer):
                    status, _ = await call(
                        self.machines["n1"].address,
                        API_PORT,
                        "PUT",
                        f"/v1/participants/{bank}",
                        body=body,
                        within_s=4.0,
                    )
                    if status == 200:
                        break
                await asyncio.sleep(0.1)

    async def _until(self, when_s: float) -> None:
        while self.loop.now_s < when_s:
            await asyncio.sleep(min(0.25, when_s - self.loop.now_s) + 1e-6)
            self.hear("look", self)

    def _heal(self) -> None:
        self.note("world", "HEAL")
        left_out = self.plan.left_out
        if left_out:
            self.end(left_out, power=True)
        for name in self.plan.old:
            if name != self.plan.stays_old and self.understands[name] < NEWEST:
                self.upgrade(name, 0.1, gracefully=False)
        self.injector.heal()
        self.net.heal()
        for name in (*NODES, *BANKS):
            machine = self.machines[name]
            if name in self.disks:
                disk = self.disks[name]
                disk.room = None
                disk.fail_at.clear()
                if disk.crash_at is not None:
                    disk.crash_at = None
            else:
                self.stores[name].fail_next = 0
                self.moods[name] = Mood()
                bank = self.banks.get(name)
                if bank is not None:
                    bank._manager._mood = self.moods[name]  # type: ignore[attr-defined]
            if machine.paused:
                machine.go_on()
            if machine.life is None and name != left_out:
                self.start(name)
        if left_out:
            self.end(left_out, power=True)
        self.closing = True

    async def _rest(self) -> None:
        """Whatever was begun comes to its end."""
        end_s = self.loop.now_s + REST_WITHIN_S
        while True:
            await asyncio.sleep(0.1)
            self.hear("look", self)
            why = self._unrest()
            if why is None:
                break
            if self.loop.now_s > end_s:
                self.defects.append(f"progress: {REST_WITHIN_S:.0f} s after all was healed: {why}")
                break
        self.note("world", "at rest" if why is None else f"no rest: {why}")
        self.hear("at_rest", self)

    def _unrest(self) -> str | None:
        """What there is still to do."""
        if self.loop.now_s > 0 and any(not client.done for client in self.clients.values()):
            return f"{[name for name, client in self.clients.items() if not client.done]} were not served"
        if self.recovering:
            return "what was lost is not found out"
        up = [name for name in NODES if name != self.plan.left_out]
        if any(name not in self.nodes for name in up):
            return "a node is down"
        for name in up:
            unfinished = self.nodes[name].ledger.unfinished
            if unfinished:
                return f"{len(unfinished)} transactions have not ended on {name}"
        replicas = [self.replica(name) for name in up]
        if None in replicas:
            return "a node has not started yet"
        applied = {replica.applied_index for replica in replicas}
        if len(applied) > 1:
            return f"nodes have applied up to {sorted(applied)}"
        for name, store in self.stores.items():
            if store.disk["since"] or store._writing:
                return f"{name} has branches in doubt"
        return None

    def is_calm(self, bank: str) -> bool:
        """Whether a majority of the nodes is well, and this bank, and they hear each other."""
        net = self.net
        if self.recovering:
            return False
        if net.lose or net.overtake or net.delay_s[1] > 0.01:
            return False
        store, mood = self.stores[bank], self.moods[bank]
        if store.sync_s[1] > 0.01 or store.fail_next or mood != Mood():
            return False
        well = [name for name in (*NODES, bank) if self.machines[name].life and not self.machines[name].paused]
        if bank not in well or len(well) < 3:
            return False
        if any(not net.passes(one, other) for one in well for other in well if one != other):
            return False
        return not any(
            disk.room is not None or disk.sync_s[1] > 0.01 for name, disk in self.disks.items() if name in well
        )


@contextlib.contextmanager
def _libraries_live_in(loop: ConnectedLoop, seed: int) -> Iterator[None]:
    """pysyncobj's time and chance, names of empty nodes, and the date that aiohttp puts on its answers."""
    before = stock.monotonicTime, stock.random, stock.PIPE_NOTIFIER_ENABLED, helpers.time
    stock.monotonicTime, stock.random, stock.PIPE_NOTIFIER_ENABLED = loop.time, random.Random(f"raft {seed}"), False
    raft_log.secrets = SimpleNamespace(token_bytes=random.Random(f"nonces {seed}").randbytes)  # type: ignore[attr-defined]
    names = random.Random(f"names {seed}")
    copying.uuid = SimpleNamespace(uuid4=lambda: uuid.UUID(int=names.getrandbits(128)))  # type: ignore[attr-defined]
    helpers.time = SimpleNamespace(**{**vars(time), "time": lambda: 1_700_000_000 + loop.now_s})  # type: ignore[attr-defined]
    try:
        yield
    finally:
        stock.monotonicTime, stock.random, stock.PIPE_NOTIFIER_ENABLED, helpers.time = before  # type: ignore[attr-defined]
        raft_log.secrets, copying.uuid = secrets, uuid  # type: ignore[attr-defined]
        # It remembers the handlers of a thousand applications, and so all of their worlds.
        web_app._cached_build_middleware.cache_clear()


def simulate(seed: int, plan: Plan, classes: Classes | None = None, *, tracing: bool = False) -> Report:
    """One run."""
    loop = ConnectedLoop(random.Random(f"loop {seed}"))
    world = World(loop, seed, plan, classes or Classes(), tracing=tracing)
    with _libraries_live_in(loop, seed), Log(world):
        try:
            loop.run_until_complete(world.run())
        except Exception as error:  # whatever ends a run is what it found
            logging.getLogger(__name__).debug("the run ended", exc_info=error)
            world.defects.append(f"defect: the run ended: {error!r}")
        lives = [machine.life for machine in world.machines.values() if machine.life is not None]
        virtual_s = loop.now_s
        for life in (None, *lives):
            loop.judge(life)
        complaints = [*world.defects, *[f"defect: {error}" for error in loop.errors[:5]]]
        complaints += [one for checker in world.checkers for one in checker.complaints]
        loop.finish(lives)
    outcomes = next(checker.first for checker in world.checkers if checker.name == "outcomes")  # type: ignore[attr-defined]
    elections = next(checker.leaders for checker in world.checkers if checker.name == "election safety")  # type: ignore[attr-defined]
    counts = dict(world.net.counts)
    counts["torn writes"] = sum(disk.torn for disk in world.disks.values())
    counts["unsynced batches of banks lost"] = sum(store.lost for store in world.stores.values())
    counts["failed syncs of banks"] = sum(store.failed for store in world.stores.values())
    return Report(
        seed=seed,
        complaints=complaints,
        virtual_s=virtual_s,
        transactions=len(world._begun),
        committed=sum(outcome == "committed" for outcome, _ in outcomes.values()),
        leaders=len(elections),
        counts=counts,
        trace=world.trace,
    )
