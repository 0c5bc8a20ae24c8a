"""Startup traces to test with."""

from __future__ import annotations

from hypothesis import strategies as st

from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.hash import NIX32_ALPHABET, Hash, HashAlgorithm
from fusesnap.nix.startup_trace import (
    BLOCK,
    Circumstances,
    Ending,
    Flaw,
    Lack,
    StartupTrace,
    TraceBuilder,
)
from fusesnap.nix.store_path import StorePath

HELLO = StorePath("0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx", "hello")
GLIBC = StorePath("1" * 32, "glibc-2.39")
DATA = StorePath("z" * 32, "data.json")
CLOSURE = ClosureDigest("5" * 64)
NAR = Hash(HashAlgorithm.SHA256, bytes(range(32)))
WELL = Circumstances(1_790_000_000, "0.1.0", 1, 0, Ending.IDLE)


def example() -> StartupTrace:
    """A start that goes from one path to another and back."""
    builder = TraceBuilder()
    hello = builder.path(HELLO, NAR)
    program = builder.file(hello, 2, 100_000, b"bin/hello")
    builder.read(program, 0, 20_000, 100_000)
    glibc = builder.path(GLIBC, NAR)
    libc = builder.file(glibc, 7, 2_000_000, b"lib/libc.so.6")
    builder.read(libc, 0, 1, 2_000_000)
    builder.read(program, 99_000, 4096, 100_000)
    builder.path(DATA, NAR)
    return builder.trace(CLOSURE, WELL)


paths = st.builds(
    StorePath,
    st.text(alphabet=NIX32_ALPHABET, min_size=32, max_size=32),
    st.from_regex(r"[0-9A-Za-z+_?=][0-9A-Za-z+\-._?=]{0,9}", fullmatch=True),
)
hashes = st.builds(Hash, st.just(HashAlgorithm.SHA256), st.binary(min_size=32, max_size=32))
names = st.lists(
    st.binary(min_size=1, max_size=6)
    .map(lambda name: name.replace(b"/", b"-").replace(b"\0", b"-"))
    .filter(lambda name: name not in (b".", b"..")),
    min_size=1,
    max_size=3,
).map(b"/".join)
circumstances = st.builds(
    Circumstances,
    recorded=st.integers(0, 1 << 40),
    version=st.from_regex(r"[0-9a-z.+]{1,12}", fullmatch=True),
    starts=st.integers(1, 100),
    readahead=st.integers(0, 1 << 20),
    ended=st.sampled_from(Ending),
    flaws=st.frozensets(st.sampled_from(Flaw)),
    lacks=st.dictionaries(paths, st.sampled_from(Lack), max_size=3).map(
        lambda found: tuple(sorted(found.items()))
    ),
)


@st.composite
def traces(draw: st.DrawFn, closure: ClosureDigest = CLOSURE) -> StartupTrace:
    """Any trace."""
    builder = TraceBuilder()
    for path, nar_hash in draw(st.dictionaries(paths, hashes, max_size=3)).items():
        builder.path(path, nar_hash)
    entries: dict[tuple[int, int], tuple[int, bytes]] = {}
    number_of_paths = len(builder.trace(closure, WELL).paths)
    for _ in range(draw(st.integers(0, 8)) if number_of_paths else 0):
        path_number = draw(st.integers(0, number_of_paths - 1))
        entry = draw(st.integers(0, 3))
        size, name = entries.setdefault(
            (path_number, entry), (draw(st.integers(0, 5 * BLOCK)), draw(names) if entry else b"")
        )
        file = builder.file(path_number, entry, size, name)
        builder.read(file, draw(st.integers(0, 5 * BLOCK)), draw(st.integers(0, 2 * BLOCK)), size)
    return builder.trace(closure, draw(circumstances))
