"""Who of our processes gets a processor first when there are not enough.

A worker does little for each request, but every container of the node waits for it. A node that starts many containers
at once has hundreds of processes that want to run; as one of them the worker would be late for each byte, and leave the
link idle. What takes processors for long (to decompress, to hash) has no such claim.
"""

from __future__ import annotations

import logging
import os
from typing import Final

log = logging.getLogger(__name__)

# setpriority(2). About nine times the share of a process at 0 (sched(7)).
READERS_WAIT: Final = -10
# How much nicer than that loop is what unpacks. On two busy cores the median answer while a NAR of 300 MB is unpacked
# comes in 0.25 ms with it, in 1.4 to 3.5 ms without (scripts/bench latency).
BEHIND_READERS: Final = 5


def before_others() -> None:
    """Have this process run before others, unless somebody has chosen its niceness, or may not."""
    if os.getpriority(os.PRIO_PROCESS, 0) == 0:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, READERS_WAIT)
        except (
            PermissionError
        ) as error:  # without CAP_SYS_NICE, as an ordinary user or in a hardened unit
            log.debug("no better niceness: %s", error)


def behind_readers() -> None:
    """Have this process run after the loop that answers readers, whose niceness it has, and not before anybody else."""
    inherited = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(0, inherited + BEHIND_READERS))
