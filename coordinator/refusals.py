"""What a request asks for, held against the transaction as it is: done already, yet to do, or refused, and why.

Each refusal says what is the case, that nothing was done, and what to do.
"""

from coordinator.errors import Conflict, NotFound, NotKnownYet, Unprocessable
from coordinator.protocol.transaction import Branch, Decision, Tally, Transaction
from coordinator.protocol.two_phase import is_owed


def is_enlisted(txn: Transaction, name: str, participant: str) -> bool:
    """Whether the branch is enlisted. Raises `Conflict` when it is not, and cannot be any more."""
    for branch in txn.branches:
        if branch.name == name:
            if branch.participant != participant:
                raise Conflict(
                    f"branch {name} of {txn.gid} is {branch.participant}'s; {participant} was not enlisted, give it "
                    "another `branch`",
                    code="branch_taken",
                )
            return True
    if not txn.active:
        raise Conflict(
            f"{txn.gid} is {txn.state}, and takes no more branches; {name} was not enlisted", code="not_active"
        )
    return False


def is_resolved(txn: Transaction, name: str, outcome: Decision, tally: Tally) -> bool:
    """Whether the branch is resolved so already. Raises `NotFound`, and `Conflict` when it cannot be resolved so."""
    branch = next((branch for branch in txn.branches if branch.name == name), None)
    if branch is None:
        names = ", ".join(branch.name for branch in txn.branches) or "none"
        raise NotFound(f"{txn.gid} has no branch {name[:100]!r}; there are: {names}")
    if branch.resolved is outcome:
        return True
    nothing = "; nothing was done"
    if branch.resolved is not None:
        raise Conflict(
            f"branch {name} of {txn.gid} has been resolved already: {branch.resolved}{nothing}", code="already_resolved"
        )
    if txn.decision is None:
        raise Conflict(
            f"{txn.gid} is {txn.state}: a branch is resolved once there is a decision, so ask for the abort first "
            f"(outlast tx abort {txn.gid}){nothing}",
            code="not_decided",
        )
    why = _not_owed(txn, branch, tally)
    if why is not None:
        raise Conflict(f"nothing is owed to branch {name} of {txn.gid}: {why}{nothing}", code="nothing_owed")
    return False


def _not_owed(txn: Transaction, branch: Branch, tally: Tally) -> str | None:
    """Why there is nothing to resolve; None if there is."""
    if txn.ended_at is not None:
        return f"it is {txn.state}, everywhere"
    if not is_owed(branch):
        return f"its vote was {branch.vote}"
    if branch.name in tally.acked:
        return f"{branch.participant} has acknowledged the {txn.decision}"
    return None


def other_branches(txn: Transaction) -> Conflict:
    """The branches that were asked about are not the transaction's."""
    names = ", ".join(branch.name for branch in txn.branches) or "none"
    done = "nothing was done: enlist what is missing, or abort" if txn.active else f"it is {txn.state}"
    return Conflict(f"the branches of {txn.gid} are: {names}; {done}", code="branches_differ")


def being_found_out(gid: str) -> NotKnownYet:
    """It is of the lost range, see `lost.py`."""
    return NotKnownYet(
        f"{gid} may have begun after the copy was made that this cluster was restored from; what became of it is being "
        "found out from the participants, see GET /v1/reconciliation"
    )


def unknown_participant(name: str) -> Unprocessable:
    """Nobody has registered it."""
    return Unprocessable(
        f"participant {name!r} is not registered; nothing was begun. Register it with PUT /v1/participants/{name}",
        code="unknown_participant",
    )
