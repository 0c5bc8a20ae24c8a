"""All starts that are being recorded, and for which of them it counts what reaches us.

All containers of a node share the lazy layer's files, so a read does not say whose it is. What belongs to a closure
that is just being started counts for it, unless the process that opened the file is known to be in another container.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import trio

from fusesnap.fetch.traces.recording import RecordedFile, Recording
from fusesnap.nix.startup_trace import Ending
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.tree import Tree

# A container that was created and never started stays among those that may start, but not for ever.
MAX_RECORDINGS: Final = 256
_NO_PATH: Final = StorePath("0" * 32, "none")


@dataclass(frozen=True, slots=True)
class Bounds:
    """When a start is over: ``idle`` seconds after it last read something new, nobody waiting; at the latest
    ``seconds`` after its first access, or when it has read so many ``blocks``.
    """

    idle: float = 10.0
    seconds: float = 600.0
    blocks: int = 16_384


@dataclass(frozen=True, slots=True)
class _Concerned:
    """The path behind an ordinal, and the recordings to whose closures it belongs."""

    path: StorePath
    recordings: tuple[Recording, ...]


class Recorder:
    """Takes what reaches us. Its methods are called for every request of the mount: they must be quick.

    ``path_of`` is asked once for an ordinal; ``clock`` is monotonic, in seconds.
    """

    def __init__(
        self,
        path_of: Callable[[int], StorePath | None],
        clock: Callable[[], float],
        bounds: Bounds,
    ) -> None:
        self._path_of = path_of
        self._clock = clock
        self._bounds = bounds
        self._recordings: dict[str, Recording] = {}
        self._concerned: dict[int, _Concerned] = {}
        # Of every file that was opened since something is recorded: for whom it counts.
        self._files: dict[tuple[int, int], tuple[RecordedFile, ...]] = {}
        # The upper directories of the containers that threads are in.
        self._owners: dict[int, str] = {}
        self._unknown: set[int] = set()
        self._somebody = trio.Event()
        self._shown: set[int] = set()
        self._newly_shown: list[int] = []

    # ------------------------------------------------------------- recordings

    def __contains__(self, key: str) -> bool:
        return key in self._recordings

    def add(self, recording: Recording) -> Recording | None:
        """Record it from now on. Returns one that makes room for it, if that has to be."""
        self._recordings[recording.start.key] = recording
        self._concerned.clear()
        if len(self._recordings) <= MAX_RECORDINGS:
            return None
        unused = (each for each in self._recordings.values() if each.began is None)
        return self.remove(next(unused, next(iter(self._recordings.values()))).start.key)

    def remove(self, key: str) -> Recording | None:
        """End the recording of ``key``, if there is one."""
        recording = self._recordings.pop(key, None)
        self._concerned.clear()
        if self._recordings:
            self._forget_files(lambda file: file.recording is not recording)
        else:
            self._files.clear()
            self._owners.clear()
            self._unknown.clear()
        return recording

    def recordings(self) -> Iterator[Recording]:
        """All of them."""
        return iter(tuple(self._recordings.values()))

    def over(self, awaited: Collection[StorePath]) -> list[tuple[Recording, Ending]]:
        """The starts that are over; ``awaited`` are the paths that somebody waits for."""
        now = self._clock()
        return [
            (recording, ending)
            for recording in self._recordings.values()
            if (ending := self._ending(recording, awaited, now)) is not None
        ]

    def _ending(
        self, recording: Recording, awaited: Collection[StorePath], now: float
    ) -> Ending | None:
        if recording.began is None:
            return None
        if recording.blocks >= self._bounds.blocks:
            return Ending.SIZE
        if now - recording.began >= self._bounds.seconds:
            return Ending.TIME
        if now - recording.newest < self._bounds.idle:
            return None
        waits = any(path in recording.start.paths for path in awaited)
        return None if waits else Ending.IDLE

    # ------------------------------------------------------------ what was shown

    def shown(self, ordinals: Iterable[int]) -> None:
        """These were shown before, by another process."""
        self._shown.update(ordinals)

    def shown_before(self) -> set[int]:
        """Ordinals of which the kernel may have something in its caches."""
        return self._shown

    def take_newly_shown(self) -> list[int]:
        """What was shown since the last call."""
        taken, self._newly_shown = self._newly_shown, []
        return taken

    # ---------------------------------------------------------------- requests

    def accessed(self, ordinal: int, pid: int | None) -> None:
        """Something of the path behind ``ordinal`` is asked for."""
        if ordinal not in self._shown:
            self._shown.add(ordinal)
            self._newly_shown.append(ordinal)
        if self._recordings:
            concerned = self._who(ordinal)
            for recording in concerned.recordings:
                if self._counts(recording, pid, concerned):
                    recording.accessed(concerned.path, ordinal, pid)

    def opened(self, ordinal: int, tree: Tree, entry: int, pid: int | None) -> None:
        """A file is opened."""
        if not self._recordings:
            return
        concerned = self._who(ordinal)
        files = dict.fromkeys(self._files.get((ordinal, entry), ()))
        for recording in concerned.recordings:
            if self._counts(recording, pid, concerned):
                file = recording.opened(concerned.path, ordinal, tree, entry, pid)
                files |= {file: None} if file is not None else {}
        self._files[ordinal, entry] = tuple(files)

    def read(self, ordinal: int, entry: int, offset: int, size: int) -> None:
        """A file is read: by whoever opened it, as far as we know."""
        if self._recordings:
            files = self._files.get((ordinal, entry))
            if files is None:
                files = self._opened_before(ordinal, entry)
            for file in files:
                file.read(offset, size)

    def _opened_before(self, ordinal: int, entry: int) -> tuple[RecordedFile, ...]:
        """A file was open before anything was recorded: it is another's, unless a start goes on that began before."""
        concerned = self._who(ordinal)
        files = []
        for recording in concerned.recordings:
            if recording.continued or recording.start.upper is None:
                file = recording.opened(concerned.path, ordinal, None, entry, None)
                files += [file] if file is not None else []
            else:
                recording.share()
        self._files[ordinal, entry] = tuple(files)
        return tuple(files)

    def _who(self, ordinal: int) -> _Concerned:
        known = self._concerned.get(ordinal)
        if known is None:
            path = self._path_of(ordinal)
            found = (each for each in self._recordings.values() if path in each.start.paths)
            known = self._concerned[ordinal] = _Concerned(path or _NO_PATH, tuple(found))
        return known

    def _forget_files(self, remains: Callable[[RecordedFile], bool]) -> None:
        self._files = {
            key: tuple(file for file in files if remains(file))
            for key, files in self._files.items()
        }

    # ------------------------------------------------------------------ readers

    def _counts(self, recording: Recording, pid: int | None, concerned: _Concerned) -> bool:
        """Whether what ``pid`` does is of this start, as far as is known now."""
        upper = recording.start.upper
        if upper is None:
            return True
        owner = self._owner(pid)
        if owner is None:
            if pid and len(concerned.recordings) > 1:
                recording.doubt(pid)
            return True
        if owner == upper:
            recording.own(pid or 0)
            return True
        recording.share()
        return False

    def _owner(self, pid: int | None) -> str | None:
        if not pid:
            return None
        owner = self._owners.get(pid)
        if owner is None:
            self._unknown.add(pid)
            self._somebody.set()
        return owner

    def knows(self, pid: int) -> bool:
        """Whether it is known in which container ``pid`` is."""
        return pid in self._owners

    async def unknown(self) -> set[int]:
        """Wait for threads of which it is not known where they are, and return them.

        Those that were in no container come again when they do something: runc is in none until it has set one up.
        """
        await self._somebody.wait()
        self._somebody = trio.Event()
        taken, self._unknown = self._unknown, set()
        return taken

    def found(self, owners: Mapping[int, str | None]) -> None:
        """``owners``: for threads the upper directory of the container that they are in, ``None`` if in none."""
        for pid, upper in owners.items():
            if upper is not None:
                self._owners[pid] = upper
                for recording in self._recordings.values():
                    if recording.start.upper == upper:
                        recording.own(pid)
                    elif recording.start.upper is not None and recording.knows(pid):
                        recording.disown(pid)
        self._forget_files(lambda file: file.recording.has_file(file))
