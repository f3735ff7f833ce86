"""Where the databases of a shop are: SQLite files in its folder, or database servers that files there name.

A file `inventory.dsn` in the folder says that the stock is on a server, and where: one line such as
`postgresql://shop@db/stock`. It may hold a password, so only its owner may read it. Each service may be somewhere else.
"""

import os
from pathlib import Path

from participants.arguments import read_dsn


def dsn_of(data_dir: str | os.PathLike[str], service: str) -> str | None:
    """Where a service's database server is; None: its database is a file. Raises `SettingsError`, `OSError`."""
    file = _file(data_dir, service)
    return read_dsn(None, file) if file.exists() else None


def put_on_server(data_dir: str | os.PathLike[str], service: str, dsn: str) -> None:
    """From now on, this is where the service's database is. Raises `OSError`."""
    file = _file(data_dir, service)
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(dsn + "\n")


def _file(data_dir: str | os.PathLike[str], service: str) -> Path:
    return Path(data_dir) / f"{service}.dsn"
