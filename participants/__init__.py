"""What takes part in a transaction: resource managers, and the server that speaks for them.

    resource        the rules, pure: one branch, one automaton
    manager         what a resource manager promises: messages in batches, answers that are true and durable
    operations      named operations, which are all that a payload can ask for
    server          HTTP in front of a manager;  settings  its limits
      intake          what waits becomes the next batch; repeats join what runs
      resolver        asks the coordinators about branches in doubt
    sqlite          an SQLite database as a resource manager
      sqlite_store    a batch is a transaction;  sqlite_work  an operation's changes;  sqlite_locks, sqlite_tables
    prepared        databases that know prepared transactions: the rules that they share
    postgres        a PostgreSQL database as a resource manager
      postgres_database  its statements;  postgres_checks, postgres_errors, postgres_names, postgres_pool
      postgres_branch    what an operation is given
    mariadb         a MariaDB database as a resource manager
      mariadb_database   its statements;  mariadb_session, mariadb_owners  its connections, and whose a branch is
      mariadb_checks, mariadb_errors, mariadb_names;  mariadb_branch  what an operation is given
    per_branch      a resource manager of your own, from three coroutines;  record_file  its records
    records         the tables that remember branches
    null            holds nothing; for benchmarks
    shop            the worked example: inventory, payments, orders, and an audit of all three
    arguments       the command line that they share

Of the coordinator only its vocabulary is known here: messages, and how they look on the wire.
"""
