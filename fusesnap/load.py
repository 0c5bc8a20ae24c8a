"""Run a module of ours as a program: ``python -m fusesnap.load MODULE ARGUMENT...``, then its ``main()``.

What is imported stays until the process ends. So nothing is collected while modules are imported, and what they hold is
never searched by a collection afterwards, in the middle of a request; and what nobody calls is not imported.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Final

# httpx imports its command line where that can be imported, with rich, pygments and click: 4.5 MiB in each process, and
# a twentieth of its start. It does without if it has to.
_NOT_WANTED: Final = "httpx._main"


def command_of(module: str, *arguments: str) -> list[str]:
    """How to start ``module`` as a program."""
    # -P: the working directory is no place to import from.
    return [sys.executable, "-P", "-m", "fusesnap.load", module, *arguments]


@contextmanager
def for_good() -> Iterator[None]:
    """What is made in this block stays, and is never looked through: an eighth of the time that imports take."""
    sys.modules.setdefault(_NOT_WANTED, None)  # type: ignore[arg-type] # to import it is an ImportError
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def loaded(module: str) -> Callable[[], None]:
    """Import ``module``, spare what there is then from garbage collection; returns its ``main``."""
    with for_good():
        program: Callable[[], None] = import_module(module).main
    return program


if __name__ == "__main__":
    loaded(sys.argv.pop(1))()
