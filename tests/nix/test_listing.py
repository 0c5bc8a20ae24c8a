from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusesnap.errors import InvalidData
from fusesnap.nix.listing import write_listing
from fusesnap.nix.nar import NarEvent, nar_bytes
from fusesnap.nix.tree import Tree, TreeBuilder

from .conftest import RealNix


def tree_of(events: Iterator[NarEvent]) -> Tree:
    builder = TreeBuilder()
    from fusesnap.nix.nar import NarParser, NeedData  # noqa: PLC0415

    parser = NarParser()
    parser.receive_data(b"".join(nar_bytes(events)))
    while not isinstance(event := parser.next_event(), NeedData):
        builder.receive(event)
    return builder.tree()


def test_real_nix_writes_the_same(
    nix: RealNix, package: Path, walk: Callable[[Path], Iterator[NarEvent]], tmp_path: Path
) -> None:
    next(package.glob("not-utf8*")).unlink()  # Nix's own listing cannot say it either
    path = nix.text("nix", "store", "add-path", package)
    cache = tmp_path / "cache"
    nix.run("nix", "copy", "--to", f"file://{cache}?write-nar-listing=true", path)
    (file,) = cache.glob("*.ls")
    assert json.loads(write_listing(tree_of(walk(package)))) == json.loads(file.read_bytes())


def test_a_name_that_json_cannot_say_is_refused(
    package: Path, walk: Callable[[Path], Iterator[NarEvent]]
) -> None:
    with pytest.raises(InvalidData, match="is not UTF-8"):
        write_listing(tree_of(walk(package)))
