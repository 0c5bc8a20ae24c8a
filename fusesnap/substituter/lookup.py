"""What several caches said of one store path, and which error that makes."""

from __future__ import annotations

from collections.abc import Iterable

import trio

from fusesnap.errors import (
    DeadlineExceeded,
    FusesnapError,
    InvalidData,
    PathNotFound,
    Unavailable,
    UntrustedPath,
)
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath


class Lookup:
    """The search for ``path``: the newest answer of each cache, and the time that is left.

    ``seconds`` is what the whole search may take. ``urls`` are the caches in the order in which a
    message is to name them.
    """

    def __init__(
        self,
        path: StorePath | HashPart,
        store_dir: StoreDir,
        seconds: float,
        urls: Iterable[str],
    ) -> None:
        self.path = path
        self._urls = tuple(urls)
        self._name = store_dir.format(path)
        self._ends_at = trio.current_time() + seconds
        self._answers: dict[str, FusesnapError] = {}

    def remaining(self) -> float:
        """Seconds until the search must end."""
        return max(0.0, self._ends_at - trio.current_time())

    def share(self, caches: int) -> float:
        """Seconds that the next of ``caches`` may take, so that there is time for all of them."""
        return self.remaining() / caches

    def note(self, url: str, error: FusesnapError) -> None:
        """Keep what the cache ``url`` had to say instead of an offer."""
        self._answers[url] = error

    def said(self, url: str) -> FusesnapError | None:
        """What the cache ``url`` said last, if it was asked."""
        return self._answers.get(url)

    def failure(self) -> FusesnapError:
        """The one error that stands for all answers.

        A cache that could not answer may have the path: Unavailable, whatever the others said
        (DeadlineExceeded where all that is wrong is lateness). A cache that offers it without
        trust could be trusted: UntrustedPath. Otherwise PathNotFound.
        """
        failed = [a for a in self._answers.values() if isinstance(a, Unavailable | InvalidData)]
        if failed:
            late = all(isinstance(answer, DeadlineExceeded) for answer in failed)
            kind = DeadlineExceeded if late else Unavailable
            return kind(self._message("no substituter has it"))
        if any(isinstance(answer, UntrustedPath) for answer in self._answers.values()):
            return UntrustedPath(self._message("no substituter offers it so that it is trusted"))
        return PathNotFound(self._message("no substituter has it"))

    def _message(self, verdict: str) -> str:
        said = [self._with_url(url, str(self._answers[url])) for url in self._urls]
        return f"{self._name}: {verdict}: {'; '.join(said) or 'no substituter is configured'}"

    def _with_url(self, url: str, text: str) -> str:
        """Name the cache in front, and the path once only."""
        if text.startswith(f"{url}: "):
            return text
        return f"{url}: {text.removeprefix(self._name).removeprefix(':').strip()}"
