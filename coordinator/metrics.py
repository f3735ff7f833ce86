"""What Prometheus reads. One registry per node, so that many nodes fit into one process."""

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from coordinator.protocol.transaction import Decision, Heuristic, Transaction
from coordinator.survey import Survey

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
        self.ready = Gauge(
            "outlast_ready", "1 where the node knows a leader and has caught up with it", registry=self.registry
        )
        self._in_doubt = Gauge(
            "outlast_branches_in_doubt",
            "Branches that are, or may be, prepared and have not answered the decision, on the leader",
            ["participant"],
            registry=self.registry,
        )
        self._in_doubt_s = Gauge(
            "outlast_branch_in_doubt_oldest_seconds",
            "Since the transaction of the oldest such branch began, on the leader; 0 where there is none",
            ["participant"],
            registry=self.registry,
        )
        self._down_s = Gauge(
            "outlast_participant_down_seconds",
            "For how long the leader has not reached a participant; 0 while it does",
            ["participant"],
            registry=self.registry,
        )
        self._owed = Gauge(
            "outlast_participant_owed",
            "Messages that a participant has not answered, on the leader",
            ["participant"],
            registry=self.registry,
        )
        self._oldest_s = Gauge(
            "outlast_transaction_oldest_seconds",
            "Age of the oldest transaction in flight, on the leader; 0 where there is none",
            registry=self.registry,
        )
        self._heuristics = Gauge(
            "outlast_heuristic_transactions",
            "Transactions that an operator has to see to, on the leader",
            ["kind"],
            registry=self.registry,
        )
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

    def surveyed(self, survey: Survey | None, participants: Collection[str], now_ms: int) -> None:
        """Show what a leader has found; on a follower nothing, which has nothing to say of it."""
        for gauge in (self._in_doubt, self._in_doubt_s, self._down_s, self._owed, self._heuristics):
            gauge.clear()
        if survey is None:
            self._oldest_s.set(0)
            return

        def age_s(since: int | None) -> float:
            return 0.0 if since is None else max(0, now_ms - since) / 1000

        for name in participants:
            lane = survey.lanes.get(name)
            self._in_doubt.labels(name).set(survey.in_doubt[name])
            self._in_doubt_s.labels(name).set(age_s(survey.in_doubt_since.get(name)))
            self._down_s.labels(name).set(age_s(None if lane is None else lane.down_since))
            self._owed.labels(name).set(0 if lane is None else lane.owed)
        for kind in Heuristic:
            self._heuristics.labels(kind.value).set(survey.heuristics[kind])
        self._oldest_s.set(age_s(survey.oldest_started))

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
