"""Which pages of a closure a start touches: the least that anybody can fetch for it.

``python -m benchmarks.touched_pages`` runs in a mount namespace of its own: it copies the closure to a file system of
its own on a loop device, without readahead, runs the command there with cold caches, and asks the kernel (mincore(2))
which pages it has read.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import zstandard
from testbed.processes import run

from benchmarks.coldstart_workloads import Built

PAGE = mmap.PAGESIZE
FILE_LEVEL = 9  # of zstd: what an image that can be read lazily is usually written with
LEVEL, WINDOW_LOG = 19, 27  # of zstd: as small as it makes one stream
SPARE = 256 << 20  # bytes of the file system beside the files


@dataclass(frozen=True, slots=True)
class Request:
    """What to run: ``command`` with store paths from ``store``, on a file system in ``directory``."""

    store: str
    paths: list[str]
    command: list[str]
    environment: dict[str, str]
    links: dict[str, str]
    directory: str


@dataclass(frozen=True, slots=True)
class Touched:
    """The pages of one start. Sizes in bytes, compressed as one stream; ``rounding`` is what extents are rounded to."""

    rounding: int
    plain: int
    compressed: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one start touched.

    ``files``: bytes of the files of which it has read a page, each compressed whole by itself. ``paths``: the store
    paths that have them.
    """

    pages: list[Touched]
    files: int
    paths: frozenset[str]


def touched(built: Built, directory: Path, roundings: Sequence[int]) -> Footprint:
    """Run the workload once, and compress what it has touched, once for each rounding (bytes)."""
    request = Request(
        str(built.store.directory / "nix/store"),
        list(built.closure.paths),
        list(built.workload.command),
        built.environment,
        built.links,
        str(directory),
    )
    module = [sys.executable, "-m", "benchmarks.touched_pages", json.dumps(asdict(request))]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    answer = run(["unshare", "--mount", "--pid", "--fork", *module], env=environment, timeout=600)
    extents = json.loads(answer)
    compressor = zstandard.ZstdCompressor(level=FILE_LEVEL)
    files = [(built.store.directory / name).read_bytes() for name in extents]
    return Footprint(
        [_compressed(built, extents, rounding) for rounding in roundings],
        sum(len(compressor.compress(data)) for data in files),
        frozenset(f"/{'/'.join(Path(name).parts[:3])}" for name in extents),
    )


def _compressed(built: Built, pages: dict[str, list[int]], rounding: int) -> Touched:
    data = bytearray()
    for name, numbers in pages.items():
        with (built.store.directory / name).open("rb") as file:
            for start in sorted({number * PAGE // rounding * rounding for number in numbers}):
                file.seek(start)
                data += file.read(rounding)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, window_log=WINDOW_LOG, enable_ldm=True
    )
    stream = zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(data))
    return Touched(rounding, len(data), len(stream))


def main() -> None:
    """In the mount namespace: run, and print the pages of each file as JSON."""
    request = Request(**json.loads(sys.argv[1]))
    root = Path(request.directory) / "touched"
    disk = root.with_suffix(".ext4")
    _make_file_system(request, disk, root)
    try:
        _run(request, root)
        pages = {
            str(file.relative_to(root)): numbers
            for file in _files(root / "nix/store")
            if (numbers := _resident(file))
        }
        print(json.dumps(pages))
    finally:
        run(["umount", "--recursive", root])
        disk.unlink()
        root.rmdir()


def _make_file_system(request: Request, disk: Path, root: Path) -> None:
    sources = [Path(request.store) / Path(path).name for path in request.paths]
    size = sum(int(run(["du", "-sb", source]).split()[0]) for source in sources) * 2 + SPARE
    root.mkdir(parents=True)
    with disk.open("wb") as file:
        file.truncate(size)
    run(["mkfs.ext4", "-q", "-N", "200000", disk])
    run(["mount", "--make-rprivate", "/"])
    run(["mount", "-o", "loop", disk, root])
    (root / "nix/store").mkdir(parents=True)
    for source in sources:
        run(["cp", "--archive", source, root / "nix/store"], timeout=600)
    for directory in ("tmp", "proc", "dev"):
        (root / directory).mkdir()
    for name, target in request.links.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)
    run(["umount", root])  # its files leave the page cache
    run(["mount", "-o", "loop,noatime", disk, root])
    device = root.stat().st_dev
    backing = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    backing.write_text("0")


def _run(request: Request, root: Path) -> None:
    run(["mount", "-t", "proc", "proc", root / "proc"])
    run(["mount", "--rbind", "/dev", root / "dev"])
    chroot = shutil.which("chroot", path="/usr/sbin:/sbin:/usr/bin:/bin") or "chroot"
    subprocess.run(
        [chroot, root, *request.command],
        env=request.environment,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=120,
    )


def _files(directory: Path) -> Iterator[Path]:
    for place, _, names in os.walk(directory):
        for name in sorted(names):
            file = Path(place) / name
            if not file.is_symlink() and file.stat().st_size:
                yield file


def _resident(path: Path) -> list[int]:
    """Numbers of the file's pages that are in the page cache (mincore(2))."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        count = (len(mapped) + PAGE - 1) // PAGE
        vector = (ctypes.c_ubyte * count)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), vector) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
        return [index for index, byte in enumerate(vector) if byte & 1]


if __name__ == "__main__":
    main()
