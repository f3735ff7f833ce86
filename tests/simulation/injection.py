"""Makes the faults of a plan happen, and undoes them."""

import errno
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from tests.simulation.bank import USUAL_SYNC_S
from tests.simulation.faults import BANKS, LEADER, NODES, Fault, Miss
from tests.simulation.internet import USUAL_DELAY_S
from tests.simulation.machines import Machine

if TYPE_CHECKING:
    from tests.simulation.world import World

_CRASH_PATIENCE_S = 1.5
"""A crash that waits for a certain write happens without it after this."""


class Injector:
    """All methods are the world's business: they run in no machine's life."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.healed = False
        self.start_s = 0.0
        self._undo: list[Callable[[], None]] = []
        self._suffered: dict[tuple[str, ...], dict[object, Any]] = {}
        """What faults that last have done to a value, by what it is of."""

    def schedule(self, start_s: float) -> None:
        self.start_s = start_s
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
        tell = self._teller(fault, who or fault.who)
        if who is None:
            tell(Miss.NOBODY)
        elif world.is_down:
            tell(Miss.NO_CLUSTER)
        else:
            self.inject(fault, who, tell)

    def _teller(self, fault: Fault, who: str) -> "Tell":
        """What became of it, for the checkers; the first word counts."""
        told = False

        def tell(missed: Miss | None = None) -> None:
            nonlocal told
            if not told:
                told = True
                if missed is not None:
                    self.world.note("world", f"missed {who or fault.kind}: {missed.value}")
                self.world.hear("injected", fault, who, missed)

        return tell

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

    def _lasts(
        self,
        fault: Fault,
        of: tuple[str, ...],
        put: Callable[[Any], None],
        *,
        usual: Any,
        value: Any = None,
        worst: Callable[[Iterable[Any]], Any] = max,
    ) -> None:
        """The value is so (None: `fault.size`) as long as the fault lasts; where several do, the worst of them."""
        suffered = self._suffered.setdefault(of, {})
        mark = object()
        suffered[mark] = fault.size if value is None else value

        def over() -> None:
            del suffered[mark]
            put(worst(suffered.values()) if suffered else usual)

        put(worst(suffered.values()))
        self._later(fault.for_s, over)

    def inject(self, fault: Fault, who: str, tell: "Tell") -> None:
        """Let it happen, and tell whether it hit: now, or when that is known."""
        world, net = self.world, self.world.net
        machine = world.machines.get(who)
        missed: Miss | None = None
        match fault.kind:
            case "kill" | "power cut":
                self._die(who, fault.for_s, power=fault.kind == "power cut")
            case "crash while writing" | "power cut while writing":
                disk = world.disks[who]
                disk.crash_at = disk.calls + int(fault.size)
                disk.crash_power = fault.kind.startswith("power")
                disk.down_s = fault.for_s
                disk.strikes[disk.crash_at] = tell
                assert machine is not None
                life, nothing = machine.life, self._nothing(machine, tell)

                def anyway() -> None:
                    if disk.crash_at is not None and world.machines[who].life is life:
                        disk.crash_at = None
                        self._die(who, fault.for_s, power=disk.crash_power)
                        tell()
                    nothing()

                world.loop.call_later(_CRASH_PATIENCE_S, anyway)
                return
            case "lost disk":
                world.end(who, power=True)
                world.disks[who].replaced()
                self.starts_later(who, fault.for_s)
            case "blackout":
                everybody = NODES if fault.who == "nodes" else (*NODES, *BANKS)
                alive = [name for name in everybody if world.machines[name].life is not None]
                for name in alive:
                    self._die(name, fault.for_s * world.rng.uniform(0.5, 1.5), power=True)
                missed = None if alive else Miss.NOBODY
            case "pause":
                assert machine is not None
                life = machine.life

                def stand_still(still: bool) -> None:
                    if machine.life is life:
                        if still:
                            machine.pause()
                        elif machine.paused:
                            machine.go_on()

                of = ("pause", who, str(machine.lives))
                self._lasts(fault, of, stand_still, usual=False, value=True)
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
                if fault.kind == "deposed" and who != world.leader():
                    missed = Miss.NO_LEADER
            case "lossy network":
                self._lasts(fault, ("lose",), _putting(net, "lose"), usual=0.0)
            case "unruly network":
                self._lasts(fault, ("repeat",), _putting(net, "repeat"), usual=0.0)
                self._lasts(fault, ("overtake",), _putting(net, "overtake"), usual=0.0)
            case "slow network":
                slow = (0.001, fault.size)
                self._lasts(fault, ("delay",), _putting(net, "delay_s"), usual=USUAL_DELAY_S, value=slow)
            case "slow disk":
                slow = (0.005, fault.size)
                for name in NODES if who == "nodes" else (who,):
                    put = _putting(world.stores.get(name) or world.disks[name], "sync_s")
                    self._lasts(fault, ("sync", name), put, usual=USUAL_SYNC_S, value=slow)
            case "full disk":
                disk = world.disks[who]
                room = (disk.sectors_used() + int(fault.size)) * 512
                self._lasts(fault, ("room", who), _putting(disk, "room"), usual=None, value=room, worst=min)
            case "failing disk":
                assert machine is not None
                if who in world.stores:
                    world.stores[who].fail_next += 1
                    world.stores[who].strikes.append(tell)
                else:
                    disk = world.disks[who]
                    fails_at = disk.calls + int(fault.size)
                    disk.fail_at[fails_at] = errno.EIO
                    disk.strikes[fails_at] = tell
                    self._undo.append(disk.fail_at.clear)
                self._nothing(machine, tell)
                return
            case "clock jump":
                assert machine is not None
                machine.wall_offset_ms += int(fault.size * 1000)
            case "clock drift":
                assert machine is not None
                machine.drift(fault.size)
            case "transfer leadership":
                missed = None if world.transfer(who) else Miss.NO_LEADER
            case "restart":
                missed = world.restart(who, fault.for_s)
            case "upgrade":
                world.upgrade(fault.who, fault.for_s, gracefully=fault.size < 0.5)
            case "snapshot":
                missed = None if world.snapshot(who) else Miss.NOT_STARTED
            case "refuses" | "mute" | "forgets work":
                name = fault.kind.replace(" ", "_")
                self._lasts(fault, (name, who), _putting(world.moods[who], name), usual=0.0)
            case "client vanishes":
                missed = None if world.vanish(who, fault.for_s) else Miss.GONE
            case _:
                raise ValueError(fault.kind)
        tell(missed)

    def _nothing(self, machine: Machine, tell: "Tell") -> Callable[[], None]:
        """What waits for a certain call came to nothing: when this is called, and when all is healed."""
        life = machine.life

        def nothing() -> None:
            tell(Miss.HEALED if machine.life is life else Miss.DIED_BEFORE)

        self._undo.append(nothing)
        return nothing

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


def _putting(thing: object, name: str) -> Callable[[Any], None]:
    return lambda value: setattr(thing, name, value)


Tell = Callable[..., None]
"""Called with nothing when a fault hits, and with a `Miss` when it does not."""
