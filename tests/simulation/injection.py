"""Makes the faults of a plan happen, and undoes them."""

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.simulation.faults import BANKS, LEADER, NODES, Fault

if TYPE_CHECKING:
    from tests.simulation.world import World

_CRASH_PATIENCE_S = 1.5
"""A crash that waits for a certain write happens without it after this."""


class Injector:
    """All methods are the world's business: they run in no machine's life."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.healed = False
        self._undo: list[Callable[[], None]] = []

    def schedule(self, start_s: float) -> None:
        for fault in self.world.plan.faults:
            self.world.loop.call_at(start_s + fault.at_s, self._happen, fault)

    def heal(self) -> None:
        """No more of it."""
        self.healed = True
        undo, self._undo = self._undo, []
        for each in undo:
            each()

    # How.

    def _happen(self, fault: Fault) -> None:
        world = self.world
        who = self._resolved(fault.who)
        world.note("world", f"FAULT {fault.kind} {who or ''} {fault.other} {fault.for_s:.2f}s size {fault.size:.4g}")
        if who is None:
            world.net.count("fault with nobody to hit")
        elif world.is_down:
            world.net.count("fault while there is no cluster")
        else:
            self.inject(fault, who)
        world.hear("injected", fault)

    def _resolved(self, who: str) -> str | None:
        """Who it is, of those alive; None: nobody is."""
        world = self.world
        if who not in (LEADER, *NODES, *BANKS):
            return who
        group = BANKS if who in BANKS else NODES
        alive = [name for name in group if world.machines[name].life is not None]
        leader = world.leader()
        if who == LEADER and leader is not None:
            return leader
        if who in alive:
            return who
        return alive[0] if alive else None

    def _later(self, for_s: float, undo: Callable[[], None]) -> None:
        """Undo it after `for_s`, or when all is healed; once."""
        done = False

        def once() -> None:
            nonlocal done
            if not done:
                done = True
                undo()

        self._undo.append(once)
        self.world.loop.call_later(for_s, once)

    def inject(self, fault: Fault, who: str) -> None:
        world, net = self.world, self.world.net
        machine = world.machines.get(who)
        match fault.kind:
            case "kill" | "power cut":
                self._die(who, fault.for_s, power=fault.kind == "power cut")
            case "crash while writing" | "power cut while writing":
                disk = world.disks[who]
                disk.crash_at = disk.calls + int(fault.size)
                disk.crash_power = fault.kind.startswith("power")
                disk.down_s = fault.for_s
                life = world.machines[who].life

                def anyway() -> None:
                    if disk.crash_at is not None and world.machines[who].life is life:
                        disk.crash_at = None
                        self._die(who, fault.for_s, power=disk.crash_power)

                world.loop.call_later(_CRASH_PATIENCE_S, anyway)
            case "lost disk":
                world.end(who, power=True)
                world.disks[who].replaced()
                self.starts_later(who, fault.for_s)
            case "blackout":
                for name in NODES if fault.who == "nodes" else (*NODES, *BANKS):
                    if world.machines[name].life is not None:
                        self._die(name, fault.for_s * world.rng.uniform(0.5, 1.5), power=True)
            case "pause":
                assert machine is not None
                life = machine.life
                machine.pause()

                def go_on() -> None:
                    if machine.life is life and machine.paused:
                        machine.go_on()

                self._later(fault.for_s, go_on)
            case "cut" | "one-way cut" | "isolate" | "deposed":
                if fault.kind in ("isolate", "deposed"):
                    group = NODES if fault.kind == "deposed" else tuple(world.machines)
                    others = [name for name in group if name != who]
                    ways = [(who, other) for other in others] + [(other, who) for other in others]
                else:
                    ways = [(fault.who, fault.other)]
                    if fault.kind == "cut":
                        ways.append((fault.other, fault.who))
                for way in ways:
                    net.cut(*way)

                def mended() -> None:
                    for way in ways:
                        net.mend(*way)

                self._later(fault.for_s, mended)
            case "lossy network":
                before = net.lose
                net.lose = fault.size
                self._later(fault.for_s, lambda: setattr(net, "lose", before))
            case "unruly network":
                net.repeat = net.overtake = fault.size

                def tamed() -> None:
                    net.repeat = net.overtake = 0.0

                self._later(fault.for_s, tamed)
            case "slow network":
                net.delay_s = (0.001, fault.size)
                self._later(fault.for_s, lambda: setattr(net, "delay_s", (0.0002, 0.005)))
            case "slow disk":
                for name in NODES if who == "nodes" else (who,):
                    store = world.stores.get(name) or world.disks[name]
                    store.sync_s = (0.005, fault.size)
                    self._later(fault.for_s, lambda store=store: setattr(store, "sync_s", (0.0002, 0.005)))
            case "full disk":
                disk = world.disks[who]
                disk.room = (disk.sectors_used() + int(fault.size)) * 512
                self._later(fault.for_s, lambda: setattr(disk, "room", None))
            case "failing disk":
                if who in world.stores:
                    world.stores[who].fail_next += 1
                else:
                    disk = world.disks[who]
                    disk.fail_at[disk.calls + int(fault.size)] = errno.EIO
                    self._undo.append(disk.fail_at.clear)
            case "clock jump":
                assert machine is not None
                machine.wall_offset_ms += int(fault.size * 1000)
            case "clock drift":
                assert machine is not None
                machine.drift(fault.size)
            case "transfer leadership":
                world.transfer(who)
            case "restart":
                world.restart(who, fault.for_s)
            case "upgrade":
                world.upgrade(fault.who, fault.for_s, gracefully=fault.size < 0.5)
            case "snapshot":
                world.snapshot(who)
            case "refuses" | "mute" | "forgets work":
                mood = world.moods[who]
                name = fault.kind.replace(" ", "_")
                setattr(mood, name, fault.size)
                self._later(fault.for_s, lambda: setattr(mood, name, 0.0))
            case "client vanishes":
                world.vanish(who, fault.for_s)
            case _:
                raise ValueError(fault.kind)

    def _die(self, who: str, for_s: float, *, power: bool) -> None:
        self.world.end(who, power=power)
        self.starts_later(who, for_s)

    def starts_later(self, who: str, for_s: float) -> None:
        """What is down is started again."""
        machine = self.world.machines[who]
        lives = machine.lives

        def start() -> None:
            if machine.life is None and machine.lives == lives:
                self.world.start(who)

        self._later(for_s, start)
