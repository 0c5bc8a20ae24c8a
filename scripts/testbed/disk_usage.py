"""What a state directory takes of its disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOOK_EVERY = 0.003  # seconds


def taken_by_store(state: Path) -> int:
    """The bytes on disk of everything in the store of ``state``, or on its way there."""
    found = 0
    for directory in (state / "layer", state / "staging"):
        for top, _, files in os.walk(directory):
            for name in files:
                try:
                    found += os.lstat(os.path.join(top, name)).st_blocks * 512  # noqa: PTH118
                except FileNotFoundError:
                    continue
    return found


class Most:
    """The most bytes that the store took at any look."""

    def __init__(self) -> None:
        self.size = 0


@contextmanager
def store_watched(state: Path) -> Iterator[Most]:
    """Look at the store of ``state`` again and again, for the time of the context."""
    most, over = Most(), threading.Event()

    def look() -> None:
        while not over.is_set():
            most.size = max(most.size, taken_by_store(state))
            time.sleep(LOOK_EVERY)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()
