"""The core: pure rules that decide transactions. It does no I/O, reads no clock, draws no random number.

Theory of operation
===================

A *protocol* is three functions over data (`base.py`):

    decide(txn, tally, expired) -> Entry | None    what a leader now wants logged
    evolve(txn, entry, header)  -> Transaction     one committed entry, applied: every replica, live and replay
    owed(txn)                   -> effects         what this state still owes the world

*Hard state* is a `Transaction`: replicated, changed by `evolve` alone. *Soft state* is a `Tally`: what the leader has
heard from participants, in sets keyed by sender, gone when it goes. A new leader rebuilds it by asking again.

    client --> Begun ---apply---> owed: Prepare ...           votes --> Tally --> decide: Decided
                                                                                     |
               Ended <--decide-- Tally <-- acks <-- owed: Commit or Abort <---apply--+

A transaction that an application does itself, on connections of its own, takes a way of its own to the same votes:

    application --> Opened --> Enlisted, before it works there --> ... --> Sealed ---apply---> owed: Prepare ...

**A proposal is a wish; the first committed decision is the truth.** `decide` only expresses wishes. Everything that is
told to a participant in phase two, and every "committed" told to a client, comes out of `owed`, over *applied* state.
A leader that was deposed without knowing it can therefore only repeat true decisions, and `evolve` lets no second
decision change the first.

**Recovery is the normal path.** A new leader calls `owed` for every unfinished transaction: that is all there is to it.

**Presumed abort** (Mohan, Lindsay & Obermarck, "Transaction management in the R* distributed database management
system", 1986). Nothing is logged before `Begun`, so a transaction that is not in the log has aborted; but only once its
epoch is over, because until then its `Begun` may still be on its way. `coordinator.ledger` keeps that rule.

| file | idea |
|---|---|
| `messages.py` | the vocabulary of coordinator and participant |
| `transaction.py` | hard state and soft state |
| `entries.py` | all that the log holds |
| `effects.py` | what a state owes the world |
| `base.py` | the shape of a protocol |
| `registry.py` | protocols by name |
| `two_phase.py` | two-phase commit |
| `invariants.py` | what is true of every transaction, and of every step |

Where our words differ from the literature's:

| Gray & Lamport 2006 | here |
|---|---|
| TM | the driver of the leading node, and its log |
| RM | participant; one of its pieces of work is a branch |
| working, prepared, committed, aborted | the same, of a branch |
| TM log record | entry |
"""
