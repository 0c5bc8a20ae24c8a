"""A Nix store of the test bed's own, in which real Nix builds."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from testbed.processes import run

STORE_DIR = "/nix/store"
# Runs a command where a directory's ``nix`` is /nix.
PRIVATE_NIX = Path(__file__).with_name("with-private-nix.sh")
CONFIGURATION = {
    "NIX_REMOTE": "local",
    "NIX_CONFIG": "\n".join(
        (
            "sandbox = false",
            "build-users-group =",
            "substituters =",
            "experimental-features = nix-command",
        )
    ),
}


@dataclass(frozen=True, slots=True)
class Closure:
    """A store path with everything it refers to.

    ``root`` and ``paths`` (``root`` among them, sorted) are full store paths; ``nar_size`` is the sum of the paths'
    NARs in bytes.
    """

    root: str
    paths: tuple[str, ...]
    nar_size: int


class NixStore:
    """A Nix store below ``directory`` whose store directory is ``/nix/store`` all the same.

    Builds see it at ``/nix/store`` in a mount namespace of their own; the host's ``/nix`` is neither needed nor
    touched. Outside of builds the files are at :meth:`real`, and ``uri`` is the store for other Nix commands.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory.resolve()
        nix = self.directory / "nix"
        self.uri = (
            f"local?store={STORE_DIR}&real={nix}/store&state={nix}/var/nix&log={nix}/var/log/nix"
        )

    def build(self, expression: str, *, timeout: float = 900) -> str:
        """Build a Nix expression and return its output's store path."""
        build = ["nix-build", "--no-out-link", "--quiet", "--no-build-output", "-"]
        output = run(
            [PRIVATE_NIX, self.directory, *build],
            env=CONFIGURATION,
            cwd=Path("/"),
            stdin=expression,
            timeout=timeout,
        )
        return output.strip()

    def add(self, *files: Path) -> list[str]:
        """Add files as they are, under their own names; returns their store paths, addresses of their content."""
        return run(["nix-store", "--store", self.uri, "--add", *files], env=CONFIGURATION).split()

    def query(self, what: str, *paths: str) -> list[str]:
        """Run ``nix-store --query`` on this store and return the lines that it prints."""
        command = ["nix-store", "--store", self.uri, "--query", f"--{what}", *paths]
        return run(command, env=CONFIGURATION).splitlines()

    def closure(self, root: str) -> Closure:
        """The closure of a path that is in this store."""
        paths = tuple(sorted(self.query("requisites", root)))
        return Closure(root, paths, sum(int(size) for size in self.query("size", *paths)))

    def has(self, path: str) -> bool:
        """Whether the store holds that path."""
        return os.path.lexists(self.real(path))

    def real(self, path: str) -> Path:
        """Where a store path, or a file below one, lies on the host."""
        return self.directory / "nix/store" / PurePosixPath(path).relative_to(STORE_DIR)

    def is_directory(self, path: str) -> bool:
        """Whether a path is a directory after following links, those into the store included."""
        real = self.real(path)
        if not real.is_symlink():
            return stat.S_ISDIR(real.stat().st_mode)
        target = PurePosixPath(path).parent / real.readlink()
        return target.is_relative_to(STORE_DIR) and self.is_directory(str(target))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold off other processes that would prepare the same things at the same time."""
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def nix_string(text: str) -> str:
    """A Nix string literal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    return f'"{escaped}"'


def nix_list(items: Sequence[str]) -> str:
    """A Nix list of expressions, each in parentheses."""
    return "[ " + " ".join(f"({item})" for item in items) + " ]"


def store_paths_list(store: NixStore, closure: Closure) -> str:
    """Build a store path whose file ``store-paths`` names the closure, a path a line.

    It is what nixpkgs' ``closureInfo`` makes and the label ``containerd.io/snapshot/nix-closure`` names. It refers to
    every path it lists, and does not list itself.
    """
    return store.build(
        f"""
        derivation {{
          name = "closure-info";
          system = builtins.currentSystem;
          builder = "/bin/sh";
          args = [ "-c" ''
            PATH=/usr/bin:/bin
            mkdir $out
            grep ^{STORE_DIR}/ graph | sort -u > $out/store-paths
          '' ];
          exportReferencesGraph = [ "graph" (builtins.storePath {nix_string(closure.root)}) ];
        }}
        """
    )


def image_path(store: NixStore, archive: Path, root: str) -> str:
    """Build a store path that is the image ``archive``, and refers to what it names of the closure of ``root``.

    So nix-snapshotter's ``buildImage`` leaves it.
    """
    # cp closes its output before it ends, and a builder that has done so is killed: the shell must outlive it.
    expression = f"""
        derivation {{
          name = {nix_string(archive.name)};
          system = builtins.currentSystem;
          builder = "/bin/sh";
          args = [ "-c" "/bin/cp $archive $out; exit $?" ];
          archive = builtins.path {{ path = {nix_string(str(archive))}; name = "archive"; }};
          closure = builtins.storePath {nix_string(root)};
        }}
        """
    with store.locked():
        return store.build(expression)
