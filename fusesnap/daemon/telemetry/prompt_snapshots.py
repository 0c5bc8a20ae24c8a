"""Prompt answers, with what they took told to the node's telemetry behind the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

import trio

from fusesnap.daemon.telemetry.snapshots import ObservedSnapshots
from fusesnap.snapshots.interface import Info, Mount, PromptSnapshots

T = TypeVar("T")


class ObservedPrompt(PromptSnapshots):
    """``inner``; what it answers is told to ``observed``. To be made in trio, whose loop takes the notes.

    ``clock`` gives seconds since the epoch, ``monotonic`` seconds that nobody sets back.
    """

    def __init__(
        self,
        inner: PromptSnapshots,
        observed: ObservedSnapshots,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._inner = inner
        self._observed = observed
        self._clock = clock
        self._monotonic = monotonic
        self._token = trio.lowlevel.current_trio_token()

    def stat(self, key: str) -> Info | None:
        """See ``PromptSnapshots``."""
        return self._timed("stat", lambda: self._inner.stat(key))

    def mounts(self, key: str) -> Sequence[Mount] | None:
        """See ``PromptSnapshots``."""
        return self._timed("mounts", lambda: self._inner.mounts(key), snapshot=key)

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount] | None:
        """See ``PromptSnapshots``."""
        began = self._clock()
        mounts = self._timed(
            "prepare",
            lambda: self._inner.prepare(key, parent, labels),
            snapshot=key,
            parent=parent,
        )
        if mounts is not None:
            with suppress(trio.RunFinishedError):  # the last answers of a process that ends
                prepared = self._observed.prepared
                self._token.run_sync_soon(prepared, key, parent, mounts, began)
        return mounts

    def _timed(self, call: str, ask: Callable[[], T | None], **attributes: str) -> T | None:
        began = self._monotonic()
        with self._observed.span(call, **attributes):
            answer = ask()
        if answer is not None:
            self._observed.took(call, self._monotonic() - began)
        return answer
