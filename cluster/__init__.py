"""Makes three nodes one: replication below, and the processes of a local cluster above."""
