"""Several processes at the same time, none of which outlives the call."""

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NoReturn


class EndedBadly(Exception):
    """One of them did; says which, and how."""


def outputs_of(commands: Sequence[Sequence[str]]) -> list[str]:
    """What each of them prints, once all have ended well. Raises `EndedBadly` as soon as one has not."""
    processes: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(len(commands)) as threads:
        try:
            processes += [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
            heard = {threads.submit(process.communicate): process for process in processes}
            for each in as_completed(heard):
                each.result()
                process = heard[each]
                if process.returncode:
                    raise EndedBadly(f"ended with {process.returncode}: {subprocess.list2cmdline(process.args)}")  # type: ignore[arg-type]
            return [each.result()[0] for each in heard]
        finally:
            for process in processes:
                process.kill()
                process.wait()


def leave(*_: object) -> NoReturn:
    """For a signal that would end this process at once: end it the long way, past every `finally`."""
    raise SystemExit(1)
