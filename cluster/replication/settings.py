"""Times and limits of a `RaftLog`, and the relations between them."""

from dataclasses import dataclass

from cluster.replication.log import MAX_COMMAND_BYTES

_ENTRY_OVERHEAD_BYTES = 32
_MESSAGE_OVERHEAD_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RaftSettings:
    """Times and limits of a `RaftLog`; the same on every node of a cluster."""

    heartbeat_s: float = 0.05
    """How often a leader speaks to every follower at least."""
    election_min_s: float = 0.25
    """The first node (by id) campaigns when it has heard from no leader for this long, at least ..."""
    election_spread_s: float = 0.07
    """... and at most for this much longer, at random ..."""
    election_step_s: float = 0.1
    """... and each further node this much later than the one before it: windows do not overlap."""
    death_step_s: float = 0.05
    """When the leader's process is known to be dead, survivors campaign this far apart ..."""
    backlog_entries_max: int = 100
    """... but for those that have more entries than this to apply: they could not act before it is done, others can."""
    backlog_wait_s: float = 1.0
    """When no leader is heard of, these also wait so much longer than others before they campaign."""
    poll_s: float = 0.03
    """Before it campaigns a node asks the others, and waits so long for who is connected and does not answer."""
    leader_fallback_s: float = 1.0
    """A leader that has heard from no majority for this long no longer leads; what a follower leaves unanswered for
    this long is sent again."""
    tick_s: float = 0.01
    """How often time is looked at, and followers apply: about three of these after a commit, if their disk keeps up."""
    stall_s: float = 0.05
    """A turn that comes this late reads the sockets first."""
    proposal_timeout_s: float = 2.5
    """A proposal ends in `ProposalUnknown` after this."""
    transfer_timeout_s: float = 2.0
    max_command_bytes: int = MAX_COMMAND_BYTES
    proposals_max: int = 100_000
    """How many proposals may be open."""
    append_bytes_max: int = 1024 * 1024
    """A message to a follower takes no further entry once it holds this many bytes of commands."""
    append_entries_max: int = 4096
    snapshot_log_bytes: int = 32 * 1024 * 1024
    """A snapshot is taken when so many bytes have been applied since the last one (or as many as that one has) ..."""
    snapshot_log_entries: int = 100_000
    """... or so many entries. The log goes back to the snapshot before the last one."""
    snapshot_piece_bytes: int = 256 * 1024
    """Of a snapshot, in one message."""
    snapshot_retry_s: float = 5.0
    """When a snapshot could not be written, for lack of room, the next try is this much later."""
    unsynced_bytes_max: int = 16 * 1024 * 1024
    """No proposal is taken while so much waits for the disk."""
    apply_entries_max: int = 1000
    """How many entries are applied before the loop gets its turn ..."""
    apply_bytes_max: int = 64 * 1024
    """... or how many bytes of them, and the one that goes beyond: a command may hold thousands of things to do."""

    def __post_init__(self) -> None:
        assert 0 < self.tick_s < self.heartbeat_s < self.election_min_s / 3
        assert self.tick_s < self.stall_s < self.election_min_s
        assert 0 < self.election_spread_s < self.election_step_s
        assert 0 < self.death_step_s < self.election_step_s
        assert self.tick_s < self.poll_s < self.death_step_s
        assert self.leader_fallback_s > self.election_min_s
        assert self.backlog_wait_s >= 0
        assert self.proposal_timeout_s > self.leader_fallback_s
        assert self.transfer_timeout_s > 0
        assert min(self.max_command_bytes, self.proposals_max, self.append_bytes_max) >= 1
        assert min(self.append_entries_max, self.apply_entries_max, self.apply_bytes_max) >= 1
        assert min(self.unsynced_bytes_max, self.backlog_entries_max, self.snapshot_log_bytes) >= 1
        assert self.snapshot_log_entries >= 2
        assert 1 <= self.snapshot_piece_bytes <= self.append_bytes_max
        assert self.snapshot_retry_s > 0

    @property
    def message_bytes_max(self) -> int:
        """The largest message that these settings can lead to."""
        commands = self.append_bytes_max + self.max_command_bytes
        return commands + self.append_entries_max * _ENTRY_OVERHEAD_BYTES + _MESSAGE_OVERHEAD_BYTES
