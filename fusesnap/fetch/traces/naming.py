"""How a person says which trace is meant, and what a trace is called for people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from fusesnap.errors import InvalidArgument, InvalidData, NotFound
from fusesnap.fetch.traces.database import StoredTrace
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.quoting import quote
from fusesnap.nix.startup_trace import StartupTrace
from fusesnap.nix.store_path import StorePath

_DIGEST: Final = re.compile("[0-9a-f]{6,64}", re.ASCII)
SHORT: Final = 12  # digits of a digest that people are shown


def program(trace: StartupTrace) -> tuple[StorePath, bytes] | None:
    """The first file that was opened, as its path and its name in it: what the container ran."""
    if not trace.files:
        return None
    file = trace.files[0]
    return trace.paths[file.path].path, file.name


def chosen(stored: Sequence[StoredTrace], name: str) -> StoredTrace:
    """The best of those that ``name`` means: the first digits of a closure's digest, a store path or its base name that
    the start touches, or the name of the package that it ran, with or without its version.

    Raises ``NotFound``, and ``InvalidArgument`` where that could be several closures.
    """
    found = [each for each in stored if _means(each.trace, name)]
    closures = list(dict.fromkeys(each.trace.closure for each in found))
    if not closures:
        raise NotFound(
            f"{quote(name)}: no trace of a closure, a store path or a program of that name;"
            " `fusesnap trace list` shows those that there are"
        )
    if len(closures) > 1:
        said = ", ".join(_described(found, closure) for closure in closures[:8])
        raise InvalidArgument(f"{quote(name)} could be any of {said}: say which by its digest")
    return found[0]


def names(stored: Iterable[StoredTrace]) -> list[tuple[str, str]]:
    """What can be said for each closure, and what it is."""
    by_closure = {each.trace.closure: each for each in stored}
    return [(closure.hex[:SHORT], title(each.trace)) for closure, each in by_closure.items()]


def title(trace: StartupTrace) -> str:
    """What the start ran, for people."""
    ran = program(trace)
    if ran is None:
        return trace.paths[0].path.name if trace.paths else "nothing"
    inner = ran[1].decode(errors="backslashreplace")
    return f"{ran[0].name}/{inner}" if inner else ran[0].name


def _described(found: Sequence[StoredTrace], closure: ClosureDigest) -> str:
    first = next(each for each in found if each.trace.closure == closure)
    return f"{closure.hex[:SHORT]} ({title(first.trace)})"


def _means(trace: StartupTrace, name: str) -> bool:
    if _DIGEST.fullmatch(name) and trace.closure.hex.startswith(name):
        return True
    base_name = name.rpartition("/")[2]
    try:
        path = StorePath.parse_base_name(base_name)
    except InvalidData:
        ran = program(trace)
        return ran is not None and (ran[0].name == name or ran[0].name.startswith(f"{name}-"))
    return any(traced.path == path for traced in trace.paths)
