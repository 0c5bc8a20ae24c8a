"""Builder of the drills' store paths: runs inside a Nix build, with Debian's own python3.

What a path holds follows from its name alone, so that a reader knows every byte without the store.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

ATTRIBUTES = os.environ  # where a builder finds its derivation's attributes

ROOT = "out"  # the output that refers to all others
FILES = 12
LARGE = "data"
SMALL = "few"
PROGRAM = "bin/hello"
LIST = "paths"


def contents(seed: str, size: int) -> bytes:
    """``size`` bytes that no compression makes smaller."""
    return hashlib.shake_256(seed.encode()).digest(size)


def large_file(name: str, size: int) -> bytes:
    """The bytes of ``data`` in the path that was built as output ``name``, about ``size`` of them."""
    number = int(hashlib.sha256(name.encode()).hexdigest()[:4], 16)
    return contents(f"{name} data", size + number % (size // 2 + 1))


def small_files(name: str) -> dict[str, bytes]:
    """The files of ``few/``, by name."""
    return {
        f"file-{number:02}": contents(f"{name} {number}", 50 + 300 * number)
        for number in range(FILES)
    }


def greeting(name: str) -> str:
    """What ``bin/hello`` prints."""
    return f"hello from {name}\n"


def main() -> None:
    outputs = ATTRIBUTES["outputs"].split()
    size, busybox = int(ATTRIBUTES["size"]), ATTRIBUTES["busybox"]
    before = ""
    for name in outputs:
        if name != ROOT:
            make_path(name, Path(ATTRIBUTES[name]), size, busybox, before)
            before = ATTRIBUTES[name]
    make_root(Path(ATTRIBUTES[ROOT]), busybox, [name for name in outputs if name != ROOT])


def make_path(name: str, out: Path, size: int, busybox: str, before: str) -> None:
    """A path that refers to the shell and to the path built before it."""
    (out / SMALL).mkdir(parents=True)
    (out / LARGE).write_bytes(large_file(name, size))
    for file, data in small_files(name).items():
        (out / SMALL / file).write_bytes(data)
    program = out / PROGRAM
    program.parent.mkdir()
    program.write_text(f"#!{busybox}/bin/sh\n# after {before}\necho {greeting(name).rstrip()}\n")
    program.chmod(0o755)


def make_root(out: Path, busybox: str, names: list[str]) -> None:
    programs = out / "bin"
    programs.mkdir(parents=True)
    for program in Path(busybox, "bin").iterdir():
        (programs / program.name).symlink_to(program)
    (out / LIST).write_text("".join(f"{name} {ATTRIBUTES[name]}\n" for name in names))


if __name__ == "__main__":
    main()
