"""A reader of a drill: a process whose root is a container's, and which checks every byte that it reads.

``python -m testbed.drill_reader TASK`` where TASK is a :class:`Task` as JSON. What it notices goes into its report, a
JSON object a line: ``{"what", "path", "start", "end", "error"}`` for each access that took longer than ``SLOW`` seconds
or failed. Times are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import IO, Any

from testbed import drill_builder
from testbed.drill_builder import FILES, LARGE, PROGRAM, SMALL, greeting

SLOW = 0.002
# Seconds between two accesses of committed paths: readers must not starve what they test. The longer where each access
# takes its time: programs, and paths as a whole.
PAUSE, LONG_PAUSE = 0.002, 0.03
PAGE = mmap.PAGESIZE
# What is expected is made once.
large_file, small_files = cache(drill_builder.large_file), cache(drill_builder.small_files)

# The shared board: one byte that says "stop", then a slot a reader.
SLOT = struct.Struct(
    "<Qdd"
)  # accesses so far, start of the one in flight (0: none), 1 when through
FIRST_SLOT = 64


class Role(StrEnum):
    """How a reader reads; all but FIRST read committed paths again and again, past the page cache.

    OPEN     a file that it opened once
    MAP      pages of a file that it mapped once
    LIST     directories, and the attributes of what they hold
    EXECUTE  programs
    FIRST    paths that nobody has read yet, each in one of these four manners, then all of it
    """

    OPEN = "open"
    MAP = "map"
    LIST = "list"
    EXECUTE = "execute"
    FIRST = "first"


# Those whose accesses take well below a millisecond when nothing is wrong, so that an interruption shows.
PROBES = (Role.OPEN, Role.MAP, Role.LIST)


@dataclass(frozen=True, slots=True)
class Task:
    """What one reader does; ``paths`` are pairs of an output's name and its store path."""

    role: Role
    slot: int
    seed: int
    root: str
    board: str
    report: str
    size: int
    paths: Sequence[Sequence[str]]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Different(Exception):
    """What was read is not what was written."""


class Reader:
    """Reads until the board says stop."""

    def __init__(self, task: Task, board: mmap.mmap, report: IO[str]) -> None:
        self._task = task
        self._board = board
        self._report = report
        self._random = random.Random(task.seed)  # noqa: S311
        self._count = 0
        self._through = 0.0

    @property
    def stopped(self) -> bool:
        return self._board[0] != 0

    def run(self) -> None:
        loops: dict[Role, Callable[[], None]] = {
            Role.OPEN: self._read_open_file,
            Role.MAP: self._read_mapping,
            Role.LIST: lambda: self._repeat(self._list),
            Role.EXECUTE: lambda: self._repeat(self._execute, LONG_PAUSE),
            Role.FIRST: self._read_first,
        }
        loops[self._task.role]()

    def _repeat(self, access: Callable[[str, Path], None], pause: float = PAUSE) -> None:
        while not self.stopped:
            name, path = self._random.choice(self._task.paths)
            self._timed(access, name, Path(path))
            time.sleep(pause)

    def _timed(self, access: Callable[[str, Path], None], name: str, path: Path) -> None:
        start = time.monotonic()
        self._post(start)
        error = ""
        try:
            access(name, path)
        except (OSError, Different, subprocess.SubprocessError) as failure:
            error = repr(failure)
        end = time.monotonic()
        if error or end - start > SLOW:
            self._note(access.__name__.lstrip("_"), path, start, end, error)
        self._count += 1
        self._post(0)

    def _post(self, in_flight: float) -> None:
        offset = FIRST_SLOT + self._task.slot * SLOT.size
        SLOT.pack_into(self._board, offset, self._count, in_flight, self._through)

    def _note(self, what: str, path: Path, start: float, end: float, error: str) -> None:
        record = {"what": what, "path": str(path), "start": start, "end": end, "error": error}
        self._report.write(json.dumps(record) + "\n")
        self._report.flush()

    # -------------------------------------------------------------- committed paths, past the page cache

    def _read_open_file(self) -> None:
        name, path = self._task.paths[0]
        expected = large_file(name, self._task.size)
        with Path(path, LARGE).open("rb", buffering=0) as file:

            def read(_name: str, _path: Path) -> None:
                size = self._random.choice((1, PAGE, 5 * PAGE, 20 * PAGE))
                offset = self._random.randrange(len(expected))
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                self._compare(os.pread(file.fileno(), size, offset), expected, offset, size)

            while not self.stopped:
                self._timed(read, name, Path(path))
                time.sleep(PAUSE)

    def _read_mapping(self) -> None:
        name, path = self._task.paths[1]
        expected = large_file(name, self._task.size)
        with (
            Path(path, LARGE).open("rb", buffering=0) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages,
        ):

            def touch(_name: str, _path: Path) -> None:
                pages.madvise(mmap.MADV_DONTNEED)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                offset = self._random.randrange(len(expected))
                self._compare(pages[offset : offset + PAGE], expected, offset, PAGE)

            while not self.stopped:
                self._timed(touch, name, Path(path))
                time.sleep(PAUSE)

    def _list(self, name: str, path: Path) -> None:
        expected = small_files(name)
        with os.scandir(path / SMALL) as entries:
            found = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
        if found != {file: len(data) for file, data in expected.items()}:
            raise Different(f"{path}/{SMALL} holds {found}")

    def _execute(self, name: str, path: Path) -> None:
        said = subprocess.run([path / PROGRAM], capture_output=True, check=False)
        if said.returncode != 0 or said.stdout.decode() != greeting(name):
            raise Different(f"{path}/{PROGRAM} ended with {said.returncode} and said {said!r}")

    # -------------------------------------------------------------------------------- first accesses

    def _read_first(self) -> None:
        manners = (self._list, self._execute, self._read_large, self._map_large)
        for number, (name, path) in enumerate(self._task.paths):
            if self.stopped:
                return
            self._timed(self._first(manners[number % len(manners)]), name, Path(path))
            self._timed(self._read_all, name, Path(path))
        self._through = 1.0
        self._repeat(self._read_all, LONG_PAUSE)

    @staticmethod
    def _first(manner: Callable[[str, Path], None]) -> Callable[[str, Path], None]:
        def first(name: str, path: Path) -> None:
            manner(name, path)

        return first

    def _read_large(self, name: str, path: Path) -> None:
        if (path / LARGE).read_bytes() != large_file(name, self._task.size):
            raise Different(f"{path}/{LARGE}")

    def _map_large(self, name: str, path: Path) -> None:
        with (
            (path / LARGE).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages,
        ):
            if pages[:] != large_file(name, self._task.size):
                raise Different(f"{path}/{LARGE}, mapped")

    def _read_all(self, name: str, path: Path) -> None:
        self._read_large(name, path)
        self._list(name, path)
        for file, data in small_files(name).items():
            if (path / SMALL / file).read_bytes() != data:
                raise Different(f"{path}/{SMALL}/{file}")
        if len(os.listdir(path / SMALL)) != FILES:
            raise Different(f"{path}/{SMALL}")

    @staticmethod
    def _compare(found: bytes, expected: bytes, offset: int, size: int) -> None:
        if found != expected[offset : offset + size]:
            raise Different(f"{size} bytes at {offset}")


@contextmanager
def opened_board(path: Path) -> Any:
    """The board, mapped for reading and writing."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as board:
        yield board


def main() -> None:
    values = json.loads(sys.argv[1])
    task = Task(**{**values, "role": Role(values["role"])})
    with opened_board(Path(task.board)) as board, Path(task.report).open("w") as report:
        # subprocess imports some of itself when first used, which is not there in a container.
        subprocess.run(["/bin/true"], check=True)
        os.chroot(task.root)
        os.chdir("/")
        Reader(task, board, report).run()


if __name__ == "__main__":
    main()
