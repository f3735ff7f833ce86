"""Wires carry everything in order, nothing while they are cut, and in one direction where only the other is."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cluster.chaos.sockets import owner
from cluster.chaos.wires import Junction, Wire
from cluster.ports import HOST, free_ports


@asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """A server that sends back what it gets, until it is told that this was all; its port."""

    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            while part := await reader.read(65536):
                writer.write(part)
                await writer.drain()
            writer.write(b"end")
            writer.close()
            await writer.wait_closed()
        except (OSError, asyncio.CancelledError):
            pass  # broken on the far side, or the test is over
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving)
        await asyncio.sleep(0)  # what was aborted is closed in the loop's next round


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def test_everything_is_carried_in_order_and_ends_are_passed_on():
    async with echo() as port, Wire("a", "b", port) as wire, connected(wire.port) as (reader, writer):
        sent = bytes(range(256)) * 4096
        writer.write(sent)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 20) == sent + b"end"
        assert wire.carried == 2 * len(sent) + 3


async def test_a_cut_wire_says_nothing_and_carries_on_where_it_stopped():
    async with echo() as port, Wire("a", "b", port) as wire, connected(wire.port) as (reader, writer):
        writer.write(b"one")
        assert await asyncio.wait_for(reader.readexactly(3), 20) == b"one"
        wire.cut("fault")
        writer.write(b"two")
        waiting = asyncio.ensure_future(reader.readexactly(3))
        carried = wire.carried
        done, _ = await asyncio.wait({waiting}, timeout=0.1)
        assert (done, wire.carried) == (set(), carried)
        # Who connects now seems to get through, and hears nothing.
        async with connected(wire.port) as (other, more):
            more.write(b"new")
            late = asyncio.ensure_future(other.readexactly(3))
            done, _ = await asyncio.wait({late}, timeout=0.1)
            assert not done
            wire.heal("fault")
            assert await asyncio.wait_for(late, 20) == b"new"
        assert await asyncio.wait_for(waiting, 20) == b"two"


async def test_one_direction_can_be_cut_alone():
    async with echo() as port, Wire("a", "b", port) as wire, connected(wire.port) as (reader, writer):
        writer.write(b"one")
        await asyncio.wait_for(reader.readexactly(3), 20)
        wire.cut("fault", there=False)
        carried = wire.carried
        writer.write(b"two")
        async with asyncio.timeout(20):
            while wire.carried < carried + 3:  # noqa: ASYNC110  # carrying is nothing that one could wait for
                await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(reader.readexactly(3))
        done, _ = await asyncio.wait({waiting}, timeout=0.1)
        assert not done
        wire.heal_all()
        assert await asyncio.wait_for(waiting, 20) == b"two"


async def test_faults_overlap():
    async with echo() as port, Wire("a", "b", port) as wire, connected(wire.port) as (reader, writer):
        wire.cut(1)
        wire.cut(2)
        wire.slow(3, 0.01)
        wire.heal(1)
        writer.write(b"one")
        waiting = asyncio.ensure_future(reader.readexactly(3))
        done, _ = await asyncio.wait({waiting}, timeout=0.1)
        assert not done
        wire.heal(2)
        assert await asyncio.wait_for(waiting, 20) == b"one"


async def test_a_slow_wire_keeps_the_order_and_takes_its_time():
    async with echo() as port, Wire("a", "b", port) as wire, connected(wire.port) as (reader, writer):
        wire.slow("fault", 0.05)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        for number in range(10):
            writer.write(bytes([number]) * 100)
            await asyncio.sleep(0.001)
        got = await asyncio.wait_for(reader.readexactly(1000), 20)
        assert got == b"".join(bytes([number]) * 100 for number in range(10))
        assert loop.time() - began_s >= 0.1  # it cannot have been faster


async def test_who_is_not_there_hangs_up_and_who_breaks_is_broken():
    (port,) = free_ports(1)
    async with Wire("a", "b", port) as wire, connected(wire.port) as (reader, _):
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 20)
    broken = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(3)
        writer.transport.abort()
        broken.set()

    server = await asyncio.start_server(serve, HOST, 0)
    async with Wire("a", "b", server.sockets[0].getsockname()[1]) as wire, connected(wire.port) as (reader, writer):
        writer.write(b"one")
        await asyncio.wait_for(broken.wait(), 20)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 20)
    server.close()


async def test_a_junction_cuts_off_one_of_those_who_share_it():
    names: dict[int, str | None] = {}
    async with echo() as port:
        wires = {name: Wire(name, "service", port) for name in ("n1", "n2")}
        async with Junction(wires, lambda source, _: names[source]) as junction:

            async def connect(name: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
                with socket.socket() as probe:
                    probe.bind((HOST, 0))
                    source = probe.getsockname()
                names[source[1]] = name
                return await asyncio.open_connection(HOST, junction.port, local_addr=source)

            (one, to_one), (two, to_two), (stranger, to_none) = [await connect(name) for name in ("n1", "n2", None)]
            wires["n1"].cut("fault")
            to_one.write(b"one")
            to_two.write(b"two")
            assert await asyncio.wait_for(two.readexactly(3), 20) == b"two"
            assert (wires["n1"].carried, wires["n2"].carried) == (0, 6)
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(stranger.readexactly(1), 20)
            wires["n1"].heal("fault")
            assert await asyncio.wait_for(one.readexactly(3), 20) == b"one"
            for writer in (to_one, to_two, to_none):
                writer.transport.abort()


async def test_whose_a_connection_is():
    async with echo() as port, connected(port) as (_, writer):
        mine, far = (writer.get_extra_info(name)[1] for name in ("sockname", "peername"))
        other = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
        try:
            assert owner({"other": other.pid, "none": None, "me": os.getpid()}, mine, far) == "me"
            assert owner({"other": other.pid}, mine, far) is None
        finally:
            other.kill()
            await other.wait()
        assert owner({"gone": other.pid}, mine, far) is None
        (unused,) = free_ports(1)
        assert owner({"me": os.getpid()}, unused, far) is None
