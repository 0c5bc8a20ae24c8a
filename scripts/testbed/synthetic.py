"""A small closure for fast tests: a runnable busybox, and every shape that a store path and its files can have."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from testbed.closure import fetch_archives
from testbed.nix_store import Closure, NixStore, nix_string

BUILDER = Path(__file__).with_name("synthetic_builder.py")


@dataclass(frozen=True, slots=True)
class SimpleClosure:
    """Store paths by what they are; all are full store paths and belong to ``closure``, whose root is ``root``.

    ``root``     a directory whose ``bin/`` links to busybox's applets (sh, cat, find, ls, stat, sha256sum ...) and
                 which has a link to every other path, by the names of these fields
    ``busybox``  a directory: the static program and its applets
    ``tree``     a directory with the hard cases: odd names, sizes around pages, depth, width, every kind of link
    ``file``     a single file
    ``script``   a single executable file, which prints "hello from a store path"
    ``empty``    a single empty file
    ``text``     a single file that is content-addressed (``builtins.toFile``)
    ``link``     a symbolic link to a directory of ``tree``
    ``large``    a directory with one file of 5,000,000 bytes that do not compress
    ``unused``   a directory to which nothing but ``root`` refers, for tests that something is not fetched
    """

    closure: Closure
    root: str
    busybox: str
    tree: str
    file: str
    script: str
    empty: str
    text: str
    link: str
    large: str
    unused: str


def simple_closure(store: NixStore, generation: str = "") -> SimpleClosure:
    """Build the closure, or find it again.

    In another ``generation`` ``busybox`` and ``file`` were built anew, with the same contents: they and what refers to
    them have other hash parts, and nothing else differs.
    """
    memory = store.directory / f"simple{generation}.closure.json"
    made_from = hashlib.sha256(BUILDER.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    with store.locked():
        known = json.loads(memory.read_text()) if memory.exists() else {}
        if known.get("made_from") != made_from or not store.has(known["root"]):
            archives = fetch_archives(["busybox-static"], store.directory / "archives")
            root = store.build(_expression(archives["busybox-static"], generation))
            known = {"made_from": made_from, "root": root}
            memory.write_text(json.dumps(known))
    return describe(store, known["root"])


def describe(store: NixStore, root: str) -> SimpleClosure:
    """Read back from the closure's root which path is which."""
    links = [file for file in store.real(root).iterdir() if file.is_symlink()]
    return SimpleClosure(
        store.closure(root), root, **{link.name: str(link.readlink()) for link in links}
    )


def _expression(busybox: Path, generation: str) -> str:
    anew = f"generation = {nix_string(generation)};" if generation else ""
    return f"""
    let
      builder = builtins.path {{ path = {nix_string(str(BUILDER))}; name = "{BUILDER.name}"; }};
      make = name: attributes: derivation ({{
        inherit name;
        system = builtins.currentSystem;
        builder = "/usr/bin/python3";
        args = [ builder ];
      }} // attributes);
      paths = rec {{
        busybox = make "busybox" {{
          archive = builtins.path {{ path = {nix_string(str(busybox))}; name = "archive.deb"; }};
          {anew}
        }};
        file = make "file" {{ {anew} }};
        script = make "script" {{ inherit busybox; }};
        empty = make "empty" {{ }};
        text = builtins.toFile "text" "a text that is its own address\\n";
        tree = make "tree" {{ inherit file; }};
        link = make "link" {{ inherit tree; }};
        large = make "large" {{ }};
        unused = make "unused" {{ }};
      }};
    in
    make "simple" (paths // {{ members = builtins.attrNames paths; }})
    """
