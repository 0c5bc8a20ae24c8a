"""Run a module of ours as a program: ``python -m fusesnap.load MODULE ARGUMENT...``, then its ``main()``.

What is imported stays until the process ends. So nothing is collected while modules are imported, and what they hold is
never searched by a collection afterwards, in the middle of a request.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from importlib import import_module


def command_of(module: str, *arguments: str) -> list[str]:
    """How to start ``module`` as a program."""
    # -P: the working directory is no place to import from.
    return [sys.executable, "-P", "-m", "fusesnap.load", module, *arguments]


def loaded(module: str) -> Callable[[], None]:
    """Import ``module``, spare what there is now from garbage collection; returns its ``main``."""
    gc.disable()
    program: Callable[[], None] = import_module(module).main
    gc.freeze()
    gc.enable()
    return program


if __name__ == "__main__":
    loaded(sys.argv.pop(1))()
