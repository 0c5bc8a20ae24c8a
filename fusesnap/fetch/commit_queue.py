"""Commits what is verified, in a thread: what comes while the disk is waited for is committed together next.

So nothing waits for a group to become large: it is as large as what came meanwhile. Where no reader is, as in
``fusesnap prefetch``, the queue may linger for a moment after the first one, which makes the groups larger; but only as
long as others come, for the last ones would wait for nobody.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

from fusesnap.errors import FusesnapError
from fusesnap.store.local_store import LocalStore, StagedPath

log = logging.getLogger(__name__)

# Each path of a group has its staging directory open. On a busy disk a barrier may take a second, however many paths
# there are; 1,000 small ones took 14 to 23 s in groups of up to 64.
MOST_TOGETHER: Final = 512
# How often a queue that lingers looks whether anything came since it last looked.
LOOKS: Final = 5

Answer = Callable[[int, FusesnapError | None], None]


class CommitQueue:
    """Takes staged paths, each with a number, and tells ``answer``, in its thread, how their commits ended.

    ``linger``: seconds for which the first of a group waits for others at most. A context manager: what was put in is
    committed before it is left.
    """

    def __init__(self, store: LocalStore, answer: Answer, linger: float = 0.0) -> None:
        self._store = store
        self._linger = linger
        self._answer = answer
        self._waiting: list[tuple[int, StagedPath]] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="commit")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def put(self, number: int, staged: StagedPath) -> None:
        """Have a path committed that is verified, and removed from staging."""
        with self._changed:
            self._waiting.append((number, staged))
            self._changed.notify()

    def _work(self) -> None:
        while group := self._next_group():
            outcomes = commit_group(self._store, [staged for _, staged in group])
            for (number, _), outcome in zip(group, outcomes, strict=True):
                self._answer(number, outcome)

    def _next_group(self) -> list[tuple[int, StagedPath]]:
        """What waits by now; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._linger:
                self._wait_for_more()
            group, self._waiting = (
                self._waiting[:MOST_TOGETHER],
                self._waiting[MOST_TOGETHER:],
            )
        return group

    def _wait_for_more(self) -> None:
        """As long as more comes, and not for long."""
        for _ in range(LOOKS):
            before = len(self._waiting)
            full = self._changed.wait_for(self._is_full, self._linger / LOOKS)
            if full or len(self._waiting) == before:
                return

    def _is_full(self) -> bool:
        return self._closed or len(self._waiting) >= MOST_TOGETHER


def commit_group(store: LocalStore, staged: Sequence[StagedPath]) -> list[FusesnapError | None]:
    """Commit paths and leave their staging directories; return for each why it is not committed, if it is not."""
    try:
        return store.commit(staged)
    except Exception as error:
        log.exception("committing failed in a way that it should not")
        unexpected = FusesnapError(f"unexpected {type(error).__name__}: {error}")
        return [unexpected] * len(staged)
    finally:
        for path in staged:
            path.__exit__(None, None, None)
