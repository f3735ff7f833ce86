"""Database servers of one's own: for tests, and for a demo on a machine that has none.

    server      what all of them have in common: a folder, a process, an unprivileged user
    postgres    PostgreSQL;  mariadb  MariaDB
    watch       ends a server when whoever started it is gone

Such a server listens on a socket in its own folder only, which nobody else can enter, so it needs no password.
"""
