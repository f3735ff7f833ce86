"""The worked example: a shop whose orders touch three databases, which must never disagree.

    inventory   stock per SKU;             operation reserve {sku, quantity}
    payments    balances per account;      operation charge {account, amount_cents}
    orders      the orders themselves;     operation place {order_id, account, sku, quantity, amount_cents}

One transaction with a branch in each places an order. Every movement leaves a row in its own database under the
transaction's gid and the order's id (`order_id` may be given to all three; it is the gid where it is left out), so that
`audit` can compare the databases row by row: no order without its reservation and charge, none twice, no goods and no
cent lost.

Two orders for the same SKU, or the same account, cannot be prepared at the same time: the second is refused as locked,
and succeeds when it is tried again a moment later; on a database server it waits for a while first.

    python -m participants.shop seed --data DIR
    python -m participants.shop inventory --data DIR --port 7411 --coordinator http://127.0.0.1:7401
    python -m participants.shop audit --data DIR

The databases are SQLite files in the folder, unless a file there (`inventory.dsn`) says that one is on a server: see
`places`, and `on_server` for the operations there.
"""

from participants.shop import inventory, orders, payments
from participants.shop.audit import Report, audit

SERVICES = {"inventory": inventory, "payments": payments, "orders": orders}
"""Each has `DATABASE` (a file name), `SCHEMA`, `operations`, `manager(data_dir)` and, but for orders, `seed(...)`."""

__all__ = ["SERVICES", "Report", "audit", "inventory", "orders", "payments"]
