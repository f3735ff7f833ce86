"""Which database driver a pool or connection belongs to, and the module that makes a branch of it.

The one place in `coordinator` that names modules of `participants`: they know under which name, and with which marker,
a participant's server looks for a branch. One is imported only when a pool of its driver is enlisted, so the SDK needs
no driver; and applications need not register anything, which could be forgotten.
"""

from typing import Any


def source_of(pool: Any) -> Any:
    """An `Enlistable` around a pool or connection. Raises TypeError for what is neither."""
    drivers = {kind.__module__.partition(".")[0] for kind in type(pool).__mro__}
    if "asyncpg" in drivers:
        from participants.postgres_application import Postgres

        return Postgres(pool)
    if "asyncmy" in drivers:
        from participants.mariadb_application import MariaDb

        return MariaDb(pool)
    raise TypeError(
        f"{type(pool).__module__}.{type(pool).__qualname__} cannot be enlisted: give a pool or a connection of "
        "asyncpg or asyncmy, or an object with `outlast_begin`"
    )
