"""Operations that a participant's process can be told to serve."""

from participants.operations import Operations
from participants.postgres import PostgresBranch

operations = Operations()


@operations.operation("pay")
async def pay(branch: PostgresBranch, account: str, amount: int) -> None:
    await branch.execute("UPDATE account SET balance = balance - $2 WHERE name = $1", account, amount)


@operations.operation("linger")
async def linger(branch: PostgresBranch) -> None:
    """Takes ann's row, and then works on for longer than anybody waits."""
    await branch.execute("UPDATE account SET balance = 0 WHERE name = 'ann'")
    await branch.execute("SELECT pg_sleep(60)")
