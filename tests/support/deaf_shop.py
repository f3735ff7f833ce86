"""A participant that is bad on purpose: `python -m tests.support.deaf_shop SERVICE ...` acknowledges every third commit
without carrying it out. For tests of those who must notice.
"""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

from coordinator.protocol.messages import Abort, Acked, Commit
from participants.manager import Envelope
from participants.shop.__main__ import main
from participants.sqlite import SqliteManager

_commits = itertools.count(1)
_honest = SqliteManager.handle


async def _handle(self: SqliteManager, envelopes: Sequence[Envelope]) -> Any:
    lied = {
        index: envelope.message
        for index, envelope in enumerate(envelopes)
        if isinstance(envelope.message, Commit) and next(_commits) % 3 == 0
    }
    turned: list[Envelope] = []
    for index, envelope in enumerate(envelopes):
        message = envelope.message
        abort = Abort(gid=message.gid, branch=message.branch)
        turned.append(Envelope(abort, envelope.stamp) if index in lied else envelope)
    answers = list(await _honest(self, turned))
    for index, message in lied.items():
        answers[index] = Acked(gid=message.gid, branch=message.branch)
    return answers


if __name__ == "__main__":
    SqliteManager.handle = _handle  # type: ignore[method-assign]
    sys.exit(main())
