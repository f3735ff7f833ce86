"""`python -m participants.shop`: serves one of the shop's participants, fills its databases, audits them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from participants.arguments import add_server_arguments, serve_or_explain
from participants.shop import SERVICES, audit, inventory, orders, payments


def seed_shop(data_dir: Path, *, skus: int, stock: int, accounts: int, balance_cents: int) -> None:
    """Fills a shop: SKUs `sku-0` ... with `stock` pieces each, accounts `account-0` ... with `balance_cents` each."""
    inventory.seed(data_dir, {f"sku-{i}": stock for i in range(skus)})
    payments.seed(data_dir, {f"account-{i}": balance_cents for i in range(accounts)})
    orders.seed(data_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; of an audit, 1 when something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m participants.shop", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, service in SERVICES.items():
        serving = commands.add_parser(name, help=service.__doc__)
        serving.add_argument("--data", type=Path, required=True, help="the folder of the databases")
        add_server_arguments(serving)
    seeding = commands.add_parser("seed", help="fills the databases")
    seeding.add_argument("--data", type=Path, required=True)
    seeding.add_argument("--skus", type=int, default=100)
    seeding.add_argument("--stock", type=int, default=1_000, help="pieces of each SKU")
    seeding.add_argument("--accounts", type=int, default=100)
    seeding.add_argument("--balance-cents", type=int, default=1_000_000, help="of each account")
    auditing = commands.add_parser("audit", help="compares the databases; exit status 1 if they disagree")
    auditing.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if arguments.command == "seed":
        seed_shop(
            arguments.data,
            skus=arguments.skus,
            stock=arguments.stock,
            accounts=arguments.accounts,
            balance_cents=arguments.balance_cents,
        )
        return 0
    if arguments.command == "audit":
        report = audit(arguments.data)
        print(json.dumps(report.to_plain(), indent=2))
        return 0 if report.ok else 1
    return serve_or_explain(SERVICES[arguments.command].manager(arguments.data), arguments)


if __name__ == "__main__":
    raise SystemExit(main())
