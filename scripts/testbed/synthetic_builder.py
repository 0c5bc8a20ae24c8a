"""Builder of the synthetic closure's paths: runs inside Nix builds, with Debian's own python3.

The same bytes come out of every build: contents are counted or hashed, never random.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

ATTRIBUTES = os.environ  # where a builder finds its derivation's attributes

PAGE = 4096
LARGE_SIZE = 5_000_000
WIDE = 1000
DEEP = 60

ODD_NAMES = (
    b" leading and trailing ",
    b"-dash",
    b"...",
    b".hidden",
    b"new\nline",
    b"tab\tand \x7f",
    b"back\\slash 'quotes\" $HOME `id` *",
    "\N{SNOWMAN} caf\u00e9 \U0001f600".encode(),
    b"not UTF-8 \xe9\xff",
    b".wh.looks-like-a-whiteout",
    b"x" * 255,
    # Order by bytes differs from order in most languages.
    b"a-b",
    b"a.b",
    b"aB",
    b"a_b",
    b"Z",
)
SIZES = (0, 1, PAGE - 1, PAGE, PAGE + 1, 32 * PAGE, 32 * PAGE + 1)


def main() -> None:
    os.environ["PATH"] = "/usr/bin:/bin"
    makers = {
        "busybox": make_busybox,
        "file": lambda out: out.write_text("a store path that is a file\n"),
        "script": make_script,
        "empty": lambda out: out.touch(),
        "tree": make_tree,
        "link": lambda out: out.symlink_to(Path(ATTRIBUTES["tree"], "wide")),
        "large": make_large,
        "unused": make_unused,
        "simple": make_root,
    }
    makers[ATTRIBUTES["name"]](Path(ATTRIBUTES["out"]))


def make_busybox(out: Path) -> None:
    subprocess.run(["dpkg-deb", "--extract", ATTRIBUTES["archive"], "unpacked"], check=True)
    programs = out / "bin"
    programs.mkdir(parents=True)
    busybox = programs / "busybox"
    busybox.write_bytes(Path("unpacked/bin/busybox").read_bytes())
    busybox.chmod(0o755)
    applets = subprocess.run([busybox, "--list"], check=True, stdout=subprocess.PIPE, text=True)
    for applet in set(applets.stdout.split()) - {"busybox"}:
        (programs / applet).symlink_to("busybox")


def make_script(out: Path) -> None:
    out.write_text(f"#!{ATTRIBUTES['busybox']}/bin/sh\necho hello from a store path\n")
    out.chmod(0o755)


def make_tree(out: Path) -> None:
    out.mkdir()
    (out / "self").write_text(f"this path is {out}\n")
    (out / "executable").write_bytes(contents("executable", 100))
    (out / "executable").chmod(0o755)
    (out / "empty-directory").mkdir()
    (out / "sizes").mkdir()
    for size in SIZES:
        (out / "sizes" / str(size)).write_bytes(contents(f"size {size}", size))
    (out / "zeros").write_bytes(bytes(3_000_000))
    (out / "odd").mkdir()
    for name in ODD_NAMES:
        Path(os.fsdecode(bytes(out / "odd") + b"/" + name)).write_bytes(name)
    (out / "wide").mkdir()
    for number in range(WIDE):
        (out / "wide" / f"file-{number}").write_text(f"{number}\n")
    make_deep(out / "deep")
    make_links(out / "links", out)


def make_deep(directory: Path) -> None:
    for level in range(DEEP):
        directory.mkdir()
        (directory / "level").write_text(f"{level}\n")
        directory /= "down"


def make_links(links: Path, out: Path) -> None:
    links.mkdir()
    targets = {
        "to-file": "../self",
        "to-directory": "../wide",
        "to-store-path": ATTRIBUTES["file"],
        "absolute": str(out / "self"),
        "dangling": "no/such/file",
        "itself": "itself",
        "long": "/".join(["directory"] * 400),
        "odd": "new\nline",
    }
    for name, target in targets.items():
        (links / name).symlink_to(target)
    # Nix stores the two names as two files.
    (links / "hard").hardlink_to(out / "executable")


def make_large(out: Path) -> None:
    out.mkdir()
    (out / "data").write_bytes(contents("large", LARGE_SIZE))


def make_unused(out: Path) -> None:
    out.mkdir()
    (out / "data").write_bytes(contents("unused", 100_000))


def make_root(out: Path) -> None:
    programs = out / "bin"
    programs.mkdir(parents=True)
    for program in Path(ATTRIBUTES["busybox"], "bin").iterdir():
        (programs / program.name).symlink_to(program)
    for member in ATTRIBUTES["members"].split():
        (out / member).symlink_to(ATTRIBUTES[member])


def contents(seed: str, size: int) -> bytes:
    """``size`` bytes that no compression makes smaller."""
    return hashlib.shake_256(seed.encode()).digest(size)


if __name__ == "__main__":
    main()
