from __future__ import annotations

import os
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import pytest

from fusesnap.nix.chunk_table import ChunkTable
from fusesnap.nix.nar import NarEnd, nar_bytes
from fusesnap.nix.tree import Tree, TreeBuilder
from fusesnap.store.partial_nars import PartialNars
from fusesnap.store.seeds import CommittedSeed, PartialSeed, Seed
from fusesnap.store.state_database import Pin

from .conftest import MadePath, make_path, tree_events
from .conftest import Tree as Files

DATA = random.Random(5).randbytes(10_000)  # noqa: S311 - not for secrets
FILES: Files = {"bin": {"tool": (DATA,), "to": "tool"}, "small": b"hello", "empty": b""}


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    location = tmp_path / "package"
    (location / "bin").mkdir(parents=True)
    (location / "bin/tool").write_bytes(DATA)
    (location / "bin/to").symlink_to("tool")
    (location / "small").write_bytes(b"hello")
    (location / "empty").touch()
    return location


@pytest.fixture(params=["committed", "partial"])
def seed(request: pytest.FixtureRequest, committed: Path, tmp_path: Path) -> Iterator[Seed]:
    """Both kinds must pass the same tests."""
    made = make_path("package", FILES)
    seed = CommittedSeed(committed) if request.param == "committed" else whole(tmp_path, made)
    yield seed
    seed.rest()


def whole(state: Path, made: MadePath) -> Seed:
    return partial_seed(state, made, range(2))


def partial_seed(state: Path, made: MadePath, there: range) -> Seed:
    """The first and the second half of a NAR are its chunks."""
    info, events = made
    nar = b"".join(nar_bytes([*tree_events(FILES), NarEnd()]))
    edges = (0, len(nar) // 2, len(nar))
    sizes = [end - start for start, end in pairwise(edges)]
    chunks = ChunkTable(sizes, sizes, bytes(64))
    partials = PartialNars.in_state(state, UUID(int=1))
    partial = partials.open(Pin(1, info), b"index", chunks)
    for number in there:
        partial.write(chunks[number], nar[edges[number] : edges[number + 1]])
    partial.close()
    builder = TreeBuilder()
    for event in events:
        builder.receive(event)
    tree: Tree = builder.tree()
    glance = partials.look(info.store_path, b"index", chunks)
    assert glance is not None
    return PartialSeed(tree, glance)


def test_bytes_of_files_are_read(seed: Seed) -> None:
    for _ in range(2):
        assert seed.read([b"bin", b"tool"], len(DATA), 100, 50) == DATA[100:150]
        assert seed.read([b"small"], 5, 0, 5) == b"hello"
        seed.rest()


@pytest.mark.parametrize(
    ("names", "size"),
    [
        ([b"small"], 6),  # another size
        ([b"nothing"], 5),
        ([b"bin", b"to"], len(DATA)),  # a link
        ([b"bin"], 0),  # a directory
        ([b"small", b"below"], 5),
        ([], 5),
    ],
)
def test_what_is_no_file_of_that_size_gives_nothing(
    seed: Seed, names: list[bytes], size: int
) -> None:
    assert seed.read(names, size, 0, max(size, 1)) is None


def test_no_link_is_followed(committed: Path) -> None:
    (committed / "bin").rename(committed.parent / "moved")
    (committed / "bin").symlink_to(committed.parent / "moved")
    assert CommittedSeed(committed).read([b"bin", b"tool"], len(DATA), 0, 5) is None


def test_no_pipe_is_waited_for(committed: Path) -> None:
    (committed / "small").unlink()
    os.mkfifo(committed / "small")
    assert CommittedSeed(committed).read([b"small"], 5, 0, 5) is None


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello")
    assert CommittedSeed(tmp_path / "file").read([], 5, 1, 3) == b"ell"


def test_a_path_that_is_gone_and_a_file_that_is_cut_give_nothing(committed: Path) -> None:
    seed = CommittedSeed(committed)
    assert seed.read([b"small"], 5, 0, 5) == b"hello"
    os.truncate(committed / "small", 2)
    assert seed.read([b"small"], 5, 0, 5) is None
    seed.rest()
    committed.rename(committed.parent / "away")
    assert seed.read([b"small"], 5, 0, 5) is None


def test_of_a_partial_nar_only_what_is_there(tmp_path: Path) -> None:
    seed = partial_seed(tmp_path, make_path("package", FILES), range(1))
    assert seed.read([b"bin", b"tool"], len(DATA), 0, 100) == DATA[:100]
    assert seed.read([b"bin", b"tool"], len(DATA), 0, len(DATA)) is None
    assert seed.read([b"small"], 5, 0, 5) is None
    (tmp_path / "partial").rename(tmp_path / "away")
    seed.rest()
    assert seed.read([b"bin", b"tool"], len(DATA), 0, 100) is None


def test_parts_by_another_index_or_none_are_no_seed(tmp_path: Path) -> None:
    info, _ = made = make_path("package", FILES)
    partials = PartialNars.in_state(tmp_path, UUID(int=1))
    chunks = ChunkTable([8], [8], bytes(32))
    assert partials.look(info.store_path, b"index", chunks) is None
    partial_seed(tmp_path, made, range(0, 1))
    two = ChunkTable([8, 8], [8, 8], bytes(64))
    assert partials.look(info.store_path, b"another", two) is None
    assert partials.look(info.store_path, b"index", two) is not None
