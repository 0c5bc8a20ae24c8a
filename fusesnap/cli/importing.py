"""What a command imports, without the garbage collector's looking through all of it again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def for_good() -> Iterator[None]:
    """What is made in this block stays, and is never looked through: an eighth of the time that imports take."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
