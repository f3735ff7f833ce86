"""A socket before a server's own, which breaks a connection when it sees some words."""

import asyncio
import contextlib
import shutil
from pathlib import Path

from cluster.databases.server import server_folder


class Breaking:
    """Whoever connects with `path` is connected with `server`. Listens while its context is open."""

    def __init__(self, server: Path) -> None:
        self._server = server
        self._folder = server_folder("outlast-br-")
        self.path = self._folder / server.name
        self._words, self._reaches, self.broke = None, False, False
        self._tasks = set()

    def at(self, words: bytes, *, reaches: bool) -> None:
        """The next message with `words` breaks its connection, before or after the server has done what it says."""
        self._words, self._reaches, self.broke = words, reaches, False

    async def __aenter__(self):
        self._listening = await asyncio.start_unix_server(self._accept, self.path)
        return self

    async def __aexit__(self, *_):
        self._listening.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        shutil.rmtree(self._folder)

    async def _accept(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        up_reader, up_writer = await asyncio.open_unix_connection(self._server)
        back = asyncio.create_task(self._pipe(up_reader, writer))
        self._tasks.add(back)
        try:
            while data := await reader.read(65536):
                if self._words is not None and self._words in data:
                    self._words, self.broke = None, True
                    if self._reaches:
                        # No answer comes back, but the server has heard it.
                        back.cancel()
                        await asyncio.wait([back])
                        up_writer.write(data)
                        await up_writer.drain()
                        await up_reader.read(1)
                    break
                up_writer.write(data)
                await up_writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass  # one end is gone, and so is the other; or the test is over
        finally:
            writer.close()
            up_writer.close()
            back.cancel()

    async def _pipe(self, reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
