"""What the `outlast` command does, one module per family of subcommands. `cluster/cli.py` says what it understands."""
