"""The startup traces that bundles are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from fusesnap.errors import InvalidData, StorageFailure
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.startup_trace import Circumstances, StartupTrace, merge_traces
from fusesnap.nix.startup_trace_text import MAX_TRACE_SIZE, parse_trace

_NAMED: Final = 5  # paths in a message


def read_traces(files: Iterable[Path]) -> dict[ClosureDigest, StartupTrace]:
    """What the starts in ``files`` read, those of a closure merged. Raises InvalidData and StorageFailure."""
    found: dict[ClosureDigest, list[StartupTrace]] = {}
    for file in files:
        trace = _read(file)
        found.setdefault(trace.closure, []).append(trace)
    return {closure: merge_traces(traces) for closure, traces in found.items()}


def check_complete(trace: StartupTrace) -> None:
    """Raise :class:`InvalidData`, saying what is missing, for a trace that does not have all that its start read."""
    if not trace.circumstances.complete:
        raise InvalidData(
            f"startup trace of closure {trace.closure}: {lacks_of(trace.circumstances)}: record it with"
            " `fusesnap trace record`, or on a node that has nothing of it, or take it as it is with --allow-partial"
        )


def check_closures(
    traces: Mapping[ClosureDigest, StartupTrace], closures: Iterable[ClosureDigest]
) -> None:
    """Raise :class:`InvalidData` where a trace is of none of ``closures``."""
    known = set(closures)
    for digest in traces:
        if digest not in known:
            published = ", ".join(sorted(each.hex for each in known))
            raise InvalidData(
                f"startup trace of closure {digest}: the given paths have the closures {published}"
            )


def lacks_of(said: Circumstances) -> str:
    """What a partial trace lacks, for people."""
    why = [
        f"what was read of {len(paths)} paths is missing ({lack}: {_listed(paths)})"
        for lack in sorted({lack for _, lack in said.lacks})
        if (paths := [path.base_name for path, each in said.lacks if each is lack])
    ]
    if said.flaws:
        why.append(f"its recording was {' and '.join(sorted(said.flaws))}")
    return "; ".join(why)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _read(file: Path) -> StartupTrace:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_TRACE_SIZE + 1)
    except OSError as error:
        raise StorageFailure(f"{file}: {error.strerror}", error.errno or 0) from error
    try:
        return parse_trace(data)
    except InvalidData as error:
        raise InvalidData(f"{file}: {error}") from None
