"""What Prometheus reads. One registry per node, so that many nodes fit into one process."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from coordinator.protocol.transaction import Decision, Transaction

_LATENCY_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_ENTRIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters and gauges of one node."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.begun = Counter(
            "outlast_transactions_adopted",
            "Undecided transactions that this node began or took over",
            registry=self.registry,
        )
        self._decided = Counter(
            "outlast_transactions_decided",
            "Decisions applied while this node led",
            ["decision"],
            registry=self.registry,
        )
        self._decision_s = Histogram(
            "outlast_decision_seconds",
            "From a transaction's start to its decision",
            buckets=_LATENCY_S,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "outlast_transactions_in_flight", "Transactions that this leader drives", registry=self.registry
        )
        self.active = Gauge(
            "outlast_transactions_active",
            "Transactions of applications that have not asked for the commit yet, on the leader",
            registry=self.registry,
        )
        self.retained = Gauge("outlast_transactions_retained", "Transactions in the ledger", registry=self.registry)
        self.leader = Gauge("outlast_leader", "1 on the node that leads", registry=self.registry)
        self.command_entries = Histogram(
            "outlast_command_entries", "Entries in one log command", buckets=_ENTRIES, registry=self.registry
        )
        self._committed = self._decided.labels("commit")
        self._aborted = self._decided.labels("abort")

    def decided(self, txn: Transaction) -> None:
        """Count a decision."""
        (self._committed if txn.decision is Decision.COMMIT else self._aborted).inc()
        if txn.decided_at is not None:
            self._decision_s.observe(max(0, txn.decided_at - txn.started_at) / 1000)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
