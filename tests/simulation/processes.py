"""Several processes at the same time, none of which outlives the call."""

import contextlib
import subprocess
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import NoReturn


class EndedBadly(Exception):
    """One of them did; says which, and how."""


def outputs_of(commands: Sequence[Sequence[str]]) -> list[str]:
    """What each of them prints, once all have ended well. Raises `EndedBadly` as soon as one has not."""
    heard: dict[Future[tuple[str, str]], subprocess.Popen[str]] = {}
    with ThreadPoolExecutor(len(commands)) as threads, contextlib.ExitStack() as ends:
        for command in commands:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            ends.callback(_end, process)
            heard[threads.submit(process.communicate)] = process
        for each in as_completed(heard):
            each.result()
            if heard[each].returncode:
                raise EndedBadly(f"ended with {heard[each].returncode}: {heard[each].args}")
        return [each.result()[0] for each in heard]


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def leave(*_: object) -> NoReturn:
    """For a signal that would end this process at once: end it the long way, past every `finally`."""
    raise SystemExit(1)
