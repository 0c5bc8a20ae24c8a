"""A closure of many paths of known bytes, so that first accesses can be in flight all through a drill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from testbed import drill_builder
from testbed.nix_store import Closure, NixStore, nix_string
from testbed.synthetic import simple_closure

BUILDER = Path(drill_builder.__file__)


@dataclass(frozen=True, slots=True)
class DrillClosure:
    """``paths`` are full store paths by the names of the outputs that they were built as, without the root.

    ``size`` is about how many bytes the large file of each has.
    """

    closure: Closure
    paths: Mapping[str, str]
    size: int


def drill_closure(store: NixStore, name: str, *, count: int, size: int) -> DrillClosure:
    """Build a closure of ``count`` paths of about ``size`` bytes each, or find it again."""
    busybox = simple_closure(store).busybox
    expression = _expression(name, busybox, count, size)
    memory = store.directory / f"{name}.closure.json"
    made_from = hashlib.sha256(BUILDER.read_bytes() + expression.encode()).hexdigest()
    with store.locked():
        known = json.loads(memory.read_text()) if memory.exists() else {}
        if known.get("made_from") != made_from or not store.has(known["root"]):
            known = {"made_from": made_from, "root": store.build(expression)}
            memory.write_text(json.dumps(known))
    root = known["root"]
    lines = (store.real(root) / drill_builder.LIST).read_text().splitlines()
    return DrillClosure(store.closure(root), dict(line.split() for line in lines), size)


def _expression(name: str, busybox: str, count: int, size: int) -> str:
    outputs = " ".join(f'"p{number:03}"' for number in range(count))
    return f"""
    let
      builder = builtins.path {{ path = {nix_string(str(BUILDER))}; name = "{BUILDER.name}"; }};
    in
    derivation {{
      name = {nix_string(name)};
      system = builtins.currentSystem;
      builder = "/usr/bin/python3";
      args = [ builder ];
      outputs = [ "{drill_builder.ROOT}" {outputs} ];
      size = "{size}";
      busybox = builtins.storePath {nix_string(busybox)};
    }}
    """
