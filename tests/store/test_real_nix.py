"""Real Nix builds a closure, copies it to a binary cache, and judges the store that it is put into."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fusesnap.nix.nar import NarEvent
from fusesnap.nix.narinfo import NarInfo, parse_narinfo
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.store.local_store import LocalStore

Commit = Callable[..., StorePath]
Nix = Callable[..., tuple[int, str, str]]

EXPRESSION = """
let
  make = name: attributes: script: derivation ({
    inherit name;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-c" "export PATH=/bin:/usr/bin; ${script}" ];
  } // attributes);
  leaf = make "leaf" { } ''
    mkdir -p $out/bin $out/empty $out/share
    printf '#!/bin/sh\\n' > $out/bin/leaf; chmod +x $out/bin/leaf
    ln -s bin/leaf $out/link; ln -s /no/where $out/dangling
    : > $out/share/none; printf 12345678 > $out/share/eight
    dd if=/dev/zero of=$out/share/large bs=100000 count=7 2> /dev/null
  '';
  text = builtins.toFile "text" "see ${builtins.toFile "other" "other text"}";
  plain = make "plain" { } "echo ${leaf} > $out";
  link = make "link" { } "ln -s ${leaf}/bin $out";
  own = make "own" { } "mkdir $out; echo $out ${plain} > $out/own";
  many = make "many" { outputs = [ "out" "dev" ]; } ''
    mkdir $out $dev; echo ${text} > $out/text; echo $out > $dev/out
  '';
in make "top" { } ''
  mkdir -p $out/a/b/c
  echo ${own} ${link} ${many.dev} $out > $out/a/b/c/names
''
"""


@dataclass(frozen=True)
class Source:
    """A store that real Nix made at ``store_dir``, and the cache that it copied it to."""

    directory: Path
    store_dir: StoreDir
    top: str
    derivation: str
    paths: dict[StorePath, tuple[NarInfo, list[NarEvent]]]

    def run(self, *command: str) -> str:
        """Run a command of Nix's on the source store."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "NIX_REMOTE": "local",
            "NIX_CONF_DIR": str(self.directory),
            "NIX_STORE_DIR": str(self.directory / "store"),
            "NIX_STATE_DIR": str(self.directory / "state"),
            "NIX_LOG_DIR": str(self.directory / "log"),
            "NIX_CONFIG": (self.directory / "config").read_text(),
        }
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=60, check=False, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


NIX_CONFIG = """
sandbox = false
build-users-group =
substituters =
experimental-features = nix-command
"""


@pytest.fixture(scope="module")
def source(
    tmp_path_factory: pytest.TempPathFactory, parse: Callable[[bytes], list[NarEvent]]
) -> Source:
    directory = tmp_path_factory.mktemp("source").resolve()
    (directory / "config").write_text(NIX_CONFIG)
    store_dir = StoreDir(str(directory / "store"))
    bare = Source(directory, store_dir, "", "", {})
    derivation = bare.run("nix-instantiate", "--expr", EXPRESSION)
    top = bare.run("nix-store", "--realise", derivation)
    secret, public = directory / "secret", directory / "public"
    bare.run("nix-store", "--generate-binary-cache-key", "k-1", str(secret), str(public))
    cache = directory / "cache"
    url = f"file://{cache}?compression=none&secret-key={secret}"
    bare.run("nix", "copy", "--to", url, top)
    bare.run("nix", "copy", "--derivation", "--to", url, derivation)
    paths = {}
    for file in sorted(cache.glob("*.narinfo")):
        info = parse_narinfo(file.read_bytes(), store_dir)
        paths[info.store_path] = (info, parse((cache / info.url).read_bytes()))
    return Source(directory, store_dir, top, derivation, paths)


@pytest.fixture
def target(source: Source, tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path / "state", source.store_dir, clock=lambda: 1.5) as store:
        yield store


def closure_order(source: Source) -> list[StorePath]:
    """References before referrers."""
    ordered: dict[StorePath, None] = {}

    def visit(path: StorePath) -> None:
        for reference in source.paths[path][0].references:
            if reference != path and reference not in ordered:
                visit(reference)
        ordered[path] = None

    for path in source.paths:
        visit(path)
    return list(ordered)


def arrange(source: Source, order: str) -> list[StorePath]:
    paths = closure_order(source)
    if order == "root first":
        paths.reverse()
    elif order != "leaf first":
        random.Random(order).shuffle(paths)  # noqa: S311
    return paths


def queries(source: Source, run: Callable[..., str]) -> dict[str, list[str]]:
    """Ask a store everything about every path."""
    paths = [source.store_dir.format(path) for path in sorted(source.paths)]
    answers = {
        f"{query} {path}": sorted(run("nix-store", "--query", query, path).splitlines())
        for query in ("--references", "--requisites", "--deriver")
        for path in paths
    }
    for query in ("--hash", "--size"):
        answers[query] = run("nix-store", "--query", query, *paths).splitlines()
    return answers


@pytest.fixture(scope="module")
def expected(source: Source) -> dict[str, list[str]]:
    return queries(source, source.run)


@pytest.mark.parametrize("order", ["leaf first", "root first", "random 1", "random 2"])
def test_nix_takes_the_store_for_its_own(
    source: Source,
    target: LocalStore,
    commit: Commit,
    nix: Nix,
    content: Callable[..., None],
    expected: dict[str, list[str]],
    tmp_path: Path,
    order: str,
) -> None:
    for path in arrange(source, order):
        commit(target, source.paths[path])
    assert target.counts().valid == len(source.paths)
    content(target.nix_url, tmp_path)

    def run(command: str, *arguments: str) -> str:
        code, printed, said = nix(command, "--store", target.nix_url, *arguments, home=tmp_path)
        assert code == 0, said
        return printed.strip()

    assert queries(source, run) == expected
    assert run("nix-store", "--query", "--outputs", source.derivation) == source.top
    content(target.nix_url, tmp_path)


def test_what_nix_says_of_the_paths_is_what_the_cache_said(
    source: Source, target: LocalStore, commit: Commit, nix: Nix, tmp_path: Path
) -> None:
    for path in closure_order(source):
        commit(target, source.paths[path])
    command = ("nix", "path-info", "--store", target.nix_url, "--json", "--all")
    code, printed, said = nix(*command, home=tmp_path)
    assert code == 0, said
    infos: dict[str, Any] = {info["path"]: info for info in json.loads(printed)}
    assert len(infos) == len(source.paths)
    for path, (made, _) in source.paths.items():
        info = infos[source.store_dir.format(path)]
        assert info["registrationTime"] == 1
        assert info["signatures"] == [str(signature) for signature in made.signatures]
        assert info.get("ca") == made.ca
        assert info["narHash"] == made.nar_hash.sri()
        ours = target.valid_path_info(path)
        assert ours is not None
        assert ours.deriver == made.deriver
        assert ours.references == made.references
        assert ours.signatures == made.signatures
    assert sum(made.ca is not None for made, _ in source.paths.values()) >= 1


def test_nix_verifies_clean_while_the_closure_is_incomplete(
    source: Source,
    target: LocalStore,
    commit: Commit,
    content: Callable[..., None],
    tmp_path: Path,
) -> None:
    paths = arrange(source, "random 3")
    for number, path in enumerate(paths):
        commit(target, source.paths[path])
        if number % 5 == 0:
            content(target.nix_url, tmp_path)
    assert target.counts().committed == len(paths)


def test_nix_finds_a_byte_that_changed(
    source: Source, target: LocalStore, commit: Commit, nix: Nix, tmp_path: Path
) -> None:
    """The check that the other tests rely on can fail."""
    for path in closure_order(source):
        commit(target, source.paths[path])
    leaf = next(path for path in source.paths if path.name == "leaf")
    file = target.location(leaf) / "share" / "eight"
    file.chmod(0o644)
    file.write_bytes(b"12345670")
    verify = ("nix-store", "--store", target.nix_url, "--verify", "--check-contents")
    code, _, said = nix(*verify, home=tmp_path)
    assert code != 0
    assert "was modified" in said


def test_files_are_as_nix_restores_them(
    source: Source, target: LocalStore, commit: Commit, tmp_path: Path
) -> None:
    for path in closure_order(source):
        commit(target, source.paths[path])
        assert describe(target.location(path)) == describe(source.directory / "store" / str(path))


def describe(location: Path) -> list[tuple[str, int, int, int, bytes]]:
    """Names, modes, times in whole seconds, which Nix looks at, owners and contents of a tree."""
    described = []
    for path in [location, *sorted(location.rglob("*"))]:
        status = path.lstat()
        data = os.fsencode(path.readlink()) if path.is_symlink() else b""
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
        name = str(path.relative_to(location))
        described.append((name, status.st_mode, int(status.st_mtime), status.st_uid, data))
    return described


def test_nix_and_we_have_the_store_open_at_once(
    source: Source,
    target: LocalStore,
    commit: Commit,
    nix: Nix,
    content: Callable[..., None],
    tmp_path: Path,
) -> None:
    paths = closure_order(source)
    for path in paths[::2]:
        commit(target, source.paths[path])
    cache = f"file://{source.directory}/cache?store={source.store_dir}"
    copy = ("nix", "copy", "--no-check-sigs", "--from", cache, "--to", target.nix_url)
    code, _, said = nix(*copy, source.top, home=tmp_path)
    assert code == 0, said
    assert target.committed_among(target.valid_closure(store_path(source, source.top))) == set(
        target.valid_closure(store_path(source, source.top))
    )
    # Also those that Nix brought have an ordinal, and what it knows of them.
    for path in target.valid_closure(store_path(source, source.top)):
        pin = target.pinned(path)
        assert pin is not None
        assert pin.info.nar_hash == source.paths[path][0].nar_hash
        assert pin.info.references == source.paths[path][0].references
    for path in paths:
        commit(target, source.paths[path])
        assert target.is_committed(path)
    assert target.counts().valid == len(paths)
    content(target.nix_url, tmp_path)


def store_path(source: Source, text: str) -> StorePath:
    return source.store_dir.parse(text)


def test_nix_makes_a_store_that_we_can_open(
    source: Source, commit: Commit, nix: Nix, content: Callable[..., None], tmp_path: Path
) -> None:
    layout = LocalStore.open(tmp_path / "state", source.store_dir, clock=lambda: 1)
    url = layout.nix_url
    layout.close()
    shutil.rmtree(tmp_path / "state" / "nix")
    code, _, said = nix("nix-store", "--store", url, "--init", home=tmp_path)
    assert code == 0, said
    with LocalStore.open(tmp_path / "state", source.store_dir, clock=lambda: 1) as store:
        for path in arrange(source, "random 4"):
            commit(store, source.paths[path])
        content(url, tmp_path)
        assert store.counts().valid == len(source.paths)
