"""Traces as people and scripts see them."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from fusesnap.cli.status import size, table
from fusesnap.fetch.traces.database import StoredTrace
from fusesnap.fetch.traces.naming import SHORT, title
from fusesnap.nix.startup_trace import Circumstances, Flaw, Lack, StartupTrace

_FLAWS = {
    Flaw.INTERRUPTED: "the worker died in the middle of it",
    Flaw.SHARED: "others read the same paths at the same time",
}


def summary(stored: StoredTrace) -> dict[str, Any]:
    """A trace of the node in a list, as JSON values. Sizes in bytes, times in seconds since 1970."""
    return {"origin": stored.origin, "used": stored.used, **_head(stored.trace)}


def trace_json(trace: StartupTrace) -> dict[str, Any]:
    """All of a trace, as JSON values; names of files as ``os.fsdecode`` has them."""
    return {
        **_head(trace),
        "signed_by": [signature.key_name for signature in trace.signatures],
        "paths": [
            {"path": str(traced.path), "nar_hash": str(traced.nar_hash)} for traced in trace.paths
        ],
        "files": [
            {
                "path": file.path,
                "entry": file.entry,
                "size": file.size,
                "name": os.fsdecode(file.name),
            }
            for file in trace.files
        ],
        "extents": [
            {"file": extent.file, "offset": extent.offset, "length": extent.length}
            for extent in trace.extents
        ],
    }


def _head(trace: StartupTrace) -> dict[str, Any]:
    said = trace.circumstances
    return {
        "closure": trace.closure.hex,
        "program": title(trace),
        "recorded": said.recorded,
        "version": said.version,
        "starts": said.starts,
        "readahead": said.readahead,
        "ended": said.ended,
        "complete": said.complete,
        "flaws": sorted(said.flaws),
        "lacks": [{"path": str(path), "why": lack} for path, lack in said.lacks],
        "path_count": len(trace.paths),
        "file_count": len(trace.files),
        "extent_count": len(trace.extents),
        "size": trace.size,
    }


def listed(stored: Sequence[StoredTrace]) -> list[str]:
    """The traces of a node, a line each."""
    if not stored:
        return ["no start was recorded here yet"]
    headings = ("closure", "from", "recorded", "starts", "reads", "files", "paths", "", "ran")
    rows = [[click.style(word.upper(), dim=True) for word in headings]]
    rows += [
        [
            each.trace.closure.hex[:SHORT],
            each.origin,
            _when(each.trace.circumstances.recorded),
            str(each.trace.circumstances.starts),
            size(each.trace.size),
            str(len(each.trace.files)),
            str(len(each.trace.paths)),
            _state(each.trace.circumstances),
            title(each.trace),
        ]
        for each in stored
    ]
    return table(rows)


def shown(trace: StartupTrace, *, extents: bool) -> list[str]:
    """One trace: what it is, and a table of its paths and files in order of first use."""
    return [*head(trace), "", *table(_pieces(trace) if extents else _files(trace))]


def head(trace: StartupTrace) -> list[str]:
    """What a trace is, without what is in it."""
    said = trace.circumstances
    starts = "one start" if said.starts == 1 else f"{said.starts} starts"
    return [
        f"closure    {trace.closure}",
        f"ran        {title(trace)}",
        f"recorded   {_when(said.recorded)} by fusesnap {said.version}: {starts}, the last one ended by {said.ended}",
        f"reads      {size(trace.size)} in {len(trace.extents)} pieces of {len(trace.files)} files"
        f" in {len(trace.paths)} paths; the kernel's readahead was {size(said.readahead)}",
        f"state      {_state(said)}{_reasons(said)}",
        *(f"signed by  {signature.key_name}" for signature in trace.signatures),
    ]


def _files(trace: StartupTrace) -> list[list[str]]:
    """The paths in order of first access, below each the files that were opened."""
    read, pieces = Counter[int](), Counter[int]()
    for extent in trace.extents:
        read[extent.file] += extent.length
        pieces[extent.file] += 1
    rows = [[click.style(word, dim=True) for word in ("READ", "OF", "PIECES", "PATH AND FILE")]]
    for number, traced in enumerate(trace.paths):
        rows.append(["", "", "", click.style(str(traced.path), bold=True)])
        rows += [
            [size(read[index]), size(file.size), str(pieces[index]), f"  {_name(file.name)}"]
            for index, file in enumerate(trace.files)
            if file.path == number
        ]
    return rows


def _pieces(trace: StartupTrace) -> list[list[str]]:
    rows = [[click.style(word, dim=True) for word in ("OFFSET", "LENGTH", "FILE")]]
    for extent in trace.extents:
        file = trace.files[extent.file]
        path = trace.paths[file.path].path
        rows.append([str(extent.offset), str(extent.length), f"{path}/{_name(file.name)}"])
    return rows


def _name(name: bytes) -> str:
    return name.decode(errors="backslashreplace") or "."


def _when(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _state(said: Circumstances) -> str:
    return "complete" if said.complete else click.style("partial", fg="yellow")


def _reasons(said: Circumstances) -> str:
    counts = Counter(lack for _, lack in said.lacks)
    reasons = [
        *(
            [f"{counts[Lack.COMMITTED]} paths were in the store already"]
            if counts[Lack.COMMITTED]
            else []
        ),
        *(
            [f"the kernel may have had parts of {counts[Lack.CACHED]} paths"]
            if counts[Lack.CACHED]
            else []
        ),
        *(_FLAWS[flaw] for flaw in sorted(said.flaws)),
    ]
    return f": {'; '.join(reasons)}" if reasons else ""
