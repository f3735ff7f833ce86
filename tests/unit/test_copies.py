"""A copy as a file: whole or refused, whatever happens to its bytes; and how a node streams one."""

import asyncio
import json
import random
from dataclasses import replace

import msgpack
import pytest
from msgspec import structs

from cluster.cli import main
from coordinator.config import Limits
from coordinator.copies import CopyBroken, CopyHeader, CopyReader, cut, written
from coordinator.ledger import Ledger
from coordinator.rendering import LAST_MS, date
from participants.null import NullManager
from participants.server import start
from tests.support.nodes import configs, running
from tests.support.waiting import turns

HEADER = CopyHeader(
    cluster="m",
    level=1,
    epoch=3,
    generation=1,
    made_at=1_700_000_000_000,
    transactions=2,
    undecided=1,
    newest="m-3-1",
)
PIECES = [b"first", b"second" * 50, b"3"]


def read(data: bytes, step: int = 7) -> tuple[CopyHeader, list[bytes]]:
    reader = CopyReader()
    found = []
    for at in range(0, len(data), step):
        found += reader.feed(data[at : at + step])
    header, trailer = reader.end()
    assert trailer.pieces == len(found)
    return header, found


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_it_is_read_as_it_was_written(step):
    assert read(b"".join(written(HEADER, PIECES)), step) == (HEADER, PIECES)


def test_what_is_cut_off_anywhere_is_refused():
    data = b"".join(written(HEADER, PIECES))
    for length in range(len(data)):
        with pytest.raises(CopyBroken, match=r"cut off after \d+ bytes"):
            read(data[:length], 50)


def test_a_flipped_bit_anywhere_is_refused():
    data = b"".join(written(HEADER, PIECES))
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << random.Random(at).randrange(8)
        with pytest.raises(CopyBroken):
            read(bytes(bad), 50)


def test_more_less_and_other_pieces_are_refused():
    whole = list(written(HEADER, PIECES))
    for wrong in (
        [*whole, b"x"],
        [*whole, whole[1]],
        whole[:1] + whole[2:],
        [whole[0], whole[2], whole[1], *whole[3:]],
        [whole[0], whole[1], *whole[1:]],
    ):
        with pytest.raises(CopyBroken):
            read(b"".join(wrong), 50)
    with pytest.raises(CopyBroken, match="no copy of a ledger"):
        read(b"PK\3\4 something else entirely")


def test_a_date_that_cannot_be_shown_is_none_of_a_copy():
    with pytest.raises(CopyBroken, match="made_at"):
        CopyHeader.of({**HEADER.to_plain(), "made_at": LAST_MS + 1})
    assert CopyHeader.of({**HEADER.to_plain(), "made_at": LAST_MS}).made_at == LAST_MS
    assert date(LAST_MS) == date(LAST_MS + 1) == "9999-12-31T23:59:59.999Z"


def test_lists_of_rows_are_cut_small_and_lose_nothing():
    rows = [[number, random.Random(number).randbytes(number % 700)] for number in range(1000)]
    pieces = [b"x" * 5000, msgpack.packb(rows[:400]), msgpack.packb({"m": b"y" * 5000}), msgpack.packb(rows[400:])]
    found = list(cut(pieces, 2000))
    assert found[0] == pieces[0], "the first piece is no list of rows"
    assert pieces[2] in found
    assert all(len(piece) <= 2010 for piece in found[1:] if piece != pieces[2])
    lists = [msgpack.unpackb(piece) for piece in found[1:] if piece != pieces[2]]
    assert [row for piece in lists for row in piece] == rows


# ------------------------------------------------------------------------------------------------ a node's


async def test_a_node_streams_all_that_it_has_told(node, null):
    await node.register("p", null.url, batch=True)
    told = [(await node.submit("p", key=f"k{i}")).json["gid"] for i in range(20)]
    reply = await node.call("GET", "/v1/backup")
    assert reply.status == 200
    header, pieces = read(reply.raw, 1000)
    assert (header.cluster, header.transactions, header.newest) == ("test", 20, told[-1])
    copy = Ledger("test")
    copy.restore(pieces)()
    for i, gid in enumerate(told):
        holder = copy.holder(f"k{i}")
        assert holder is not None
        assert holder.gid == gid
    assert set(copy.participants) == {"p"}


async def test_so_many_at_once_and_no_more():
    (config,) = configs()
    async with running(replace(config, limits=Limits(max_backups=1))) as node:
        participant = await start(NullManager())
        await node.register("p", participant.url)
        # As large as sockets do not swallow: whoever does not read keeps the stream under way.
        node.node.ledger.participants.update(
            {
                f"p{i}": structs.replace(node.node.ledger.participants["p"], name=f"p{i}" + "x" * 10_000)
                for i in range(2000)
            }
        )
        async with node.session.get(f"{node.url}/v1/backup") as slow:
            assert slow.status == 200
            refused = await node.call("GET", "/v1/backup")
            assert (refused.status, refused.code) == (429, "too_many_backups")
            assert (await node.call("GET", "/healthz")).status == 200
            read(await slow.read(), 1 << 20)
        await turns(50)  # its end was read here before its handler has ended
        assert (await node.call("GET", "/v1/backup")).status == 200
        await participant.stop()


async def test_the_command_keeps_only_what_is_whole(node, null, tmp_path, capsys):
    await node.register("p", null.url)
    assert (await node.submit("p")).status == 200
    file = tmp_path / "copy.outlast"
    assert await asyncio.to_thread(main, ["backup", str(file), "--url", node.url, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["transactions"], shown["undecided"], shown["bytes"]) == (1, 0, file.stat().st_size)
    assert file.stat().st_mode & 0o077 == 0
    assert await asyncio.to_thread(main, ["backup", str(file), "--url", node.url]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["backup", "--verify", str(file)]) == 0
    said = capsys.readouterr().out
    assert "a whole copy of the cluster test" in said
    assert "generation 1" in said
    broken = tmp_path / "broken"
    broken.write_bytes(file.read_bytes()[:-3])
    assert main(["backup", "--verify", str(broken)]) == 1
    assert "no whole copy: cut off" in capsys.readouterr().err
    nowhere = ["backup", str(tmp_path / "x"), "--url", "http://127.0.0.1:9"]
    assert await asyncio.to_thread(main, nowhere) == 1
    assert {each.name for each in tmp_path.iterdir()} == {"copy.outlast", "broken"}
