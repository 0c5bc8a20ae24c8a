"""Where log lines go."""

from __future__ import annotations

import logging
import sys


def log_to_stderr(level: int = logging.INFO) -> None:
    """One line an event, for the journal or a terminal."""
    logging.basicConfig(
        stream=sys.stderr, level=level, format="fusesnap %(name)s: %(message)s", force=True
    )
    for noisy in ("httpx", "httpcore", "hpack", "h2"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
