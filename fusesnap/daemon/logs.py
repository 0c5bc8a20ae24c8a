"""Where log lines go, and how a process of ours says why it cannot go on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fusesnap.errors import FusesnapError
from fusesnap.exit_codes import exit_code


def log_to_stderr(level: int = logging.INFO) -> None:
    """One line an event, for the journal or a terminal."""
    logging.basicConfig(
        stream=sys.stderr, level=level, format="fusesnap %(name)s: %(message)s", force=True
    )
    for noisy in ("httpx", "httpcore", "hpack", "h2"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """End the process with a line and the error's exit code, where an error is one that a person can be told about."""
    try:
        yield
    except FusesnapError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"fusesnap {name}: {line}\n")
        raise SystemExit(exit_code(error)) from error
