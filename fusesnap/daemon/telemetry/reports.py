"""Answers ``fusesnap start-report``: which starts there are, and how one of them went."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import trio
from pydantic import TypeAdapter

from fusesnap.daemon.telemetry.journal import KEPT_DAYS, Journal
from fusesnap.daemon.telemetry.keeper import Telemetry
from fusesnap.daemon.telemetry.records import StartRecord, WaitRecord
from fusesnap.daemon.telemetry.start import Start, bursts, span_of, start_of
from fusesnap.errors import InvalidArgument, NotFound

START: Final = TypeAdapter(Start)
SCHEME: Final = "containerd://"  # as Kubernetes writes the id of a container
SHORTEST_PREFIX: Final = 4
LISTED: Final = 10
STILL: Final = "it still waits"


class StartReports:
    """Reads the journal of a node.

    ``flush`` has the worker write what it knows and says what names it in records, if one answers; it must not raise.
    ``clock`` gives seconds since the epoch.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        flush: Callable[[], Awaitable[str | None]],
        clock: Callable[[], float],
    ) -> None:
        self._telemetry = telemetry
        self._flush = flush
        self._clock = clock

    async def starts(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Every start that is kept, the newest first."""
        await self._telemetry.flush()
        records = await trio.to_thread.run_sync(self._records)
        return {
            "starts": [
                {"key": each.key, "image": each.parent, "began": each.began, "fuse": each.fuse}
                for each in records
            ]
        }

    async def report(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The start that ``target`` and ``number`` name.

        Raises ``NotFound`` and ``InvalidArgument``, with what there is.
        """
        worker = await self._flush()
        await self._telemetry.flush()
        target, number = str(question.get("target", "")), int(question.get("number", 1))
        start, count = await trio.to_thread.run_sync(self._report, target, number, worker)
        return {"start": START.dump_python(start, mode="json"), "count": count}

    def _records(self) -> list[StartRecord]:
        return self._telemetry.journal.starts()

    def _report(self, target: str, number: int, worker: str | None) -> tuple[Start, int]:
        record = find(target, self._records())
        return report(self._telemetry.journal, record, number, worker, self._clock())


def report(
    journal: Journal, record: StartRecord, number: int, worker: str | None = None, now: float = 0.0
) -> tuple[Start, int]:
    """The ``number``-th start of a container, counted from 1, and how many there are.

    What has not ended in the session ``worker``, which lives, goes on until ``now``. Blocking. Raises
    ``InvalidArgument``, ``StorageFailure``.
    """
    waits = journal.waits(record.upper, record.began)
    found = bursts([until(wait, worker, now) for wait in waits]) or [[]]
    if not 1 <= number <= len(found):
        raise InvalidArgument(
            f"{record.key}: start {number} was asked for; it waited in {len(found)}, counted from 1"
        )
    waits = found[number - 1]
    later = sum(map(len, found[number:]))
    fetches = journal.fetches(*span_of(waits, record, first=number == 1))
    chain = journal.chain(record.parent)
    start = start_of(waits, fetches, record, chain, later=later, first=number == 1)
    return start, len(found)


def until(wait: WaitRecord, worker: str | None, now: float) -> WaitRecord:
    """``wait``, to ``now`` if it lasts."""
    if wait.ended is None and wait.session == worker:
        return replace(wait, ended=max(now, wait.began), error=STILL)
    return wait


def find(target: str, records: Sequence[StartRecord]) -> StartRecord:
    """The newest start that ``target`` names: a snapshot's key, a container's id, or how one of them begins.

    containerd's keys are ``<namespace>/<number>/<container>``. Raises ``NotFound``, and ``InvalidArgument`` where it
    could be several containers.
    """
    wanted = target.removeprefix(SCHEME)
    by_key: dict[str, StartRecord] = {}
    for record in records:  # the newest first
        by_key.setdefault(record.key, record)
    exact = [key for key in by_key if key == wanted or key.endswith(f"/{wanted}")]
    found = [wanted] if wanted in by_key else exact
    if not found and len(wanted) >= SHORTEST_PREFIX:
        found = [key for key in by_key if key.rpartition("/")[2].startswith(wanted)]
    if not wanted or not found:
        raise NotFound(
            f"{target!r}: no start of such a container or snapshot is known; {known(by_key)}"
        )
    if len(found) > 1:
        raise InvalidArgument(
            f"{target!r} could be any of {', '.join(sorted(found)[:LISTED])}: say which"
        )
    return by_key[found[0]]


def known(keys: Mapping[str, StartRecord]) -> str:
    """What there is, for a message."""
    if not keys:
        return f"none is: nothing was started with fusesnap within {KEPT_DAYS} days"
    shown = list(keys)[:LISTED]
    more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
    return f"known are, the newest first: {', '.join(shown)}{more}"
