"""Bundles of what is published: written to each sort of destination, read, written again, and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fusesnap.errors import ContentMismatch, InvalidData
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.index_reference import IndexReference
from fusesnap.nix.nar import NarEnd, nar_bytes
from fusesnap.nix.narinfo import NarInfo, parse_narinfo
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.startup_bundle import (
    MAX_EXTENT_SIZE,
    BundleHeader,
    BundleParser,
    ReadyExtent,
    file_name,
    root_file_name,
    write_bundle,
)
from fusesnap.nix.startup_trace import (
    BLOCK,
    Circumstances,
    Ending,
    Flaw,
    Lack,
    StartupTrace,
    TraceBuilder,
    merge_traces,
)
from fusesnap.nix.startup_trace_text import format_trace, sign_trace
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import EntryKind, Tree, TreeBuilder
from fusesnap.publish.bundles import Bundler, PublishedBundle
from fusesnap.publish.check_bundles import BundleChecker, CheckedBundle
from fusesnap.publish.closures import closures_of
from fusesnap.publish.destination import Destination, DirectoryDestination
from fusesnap.publish.extents import Part, contents_of, parts_of
from fusesnap.publish.publisher import Publisher
from fusesnap.publish.source import StoreSource, closure_of
from fusesnap.publish.traces import read_traces
from fusesnap.store.tree_reader import nar_events

from ..store.conftest import tree_events
from ..substituter.samples import KEY, TRUSTED, secret_key
from .conftest import LARGE, LEAF, LIBRARY, TOP, trees
from .test_publisher import Watched, files_of

WELL = Circumstances(1_790_000_000, "0.1.0", 1, 0, Ending.IDLE)
DIGEST = ClosureDigest.of([LEAF, LIBRARY, TOP], StoreDir())
NAMES = [file_name(DIGEST), root_file_name(TOP)]


def tree_of(path: StorePath) -> Tree:
    builder = TreeBuilder()
    for event in [*tree_events(trees()[path.name][0]), NarEnd()]:
        builder.receive(event)
    return builder.tree()


def nar_of(path: StorePath, state: Path) -> bytes:
    return b"".join(nar_bytes(nar_events(state / "layer/.fusesnap-store" / path.base_name)))


class Cache:
    """A cache that the closure was published to."""

    def __init__(
        self, source: StoreSource, destination: Destination, infos: Sequence[NarInfo]
    ) -> None:
        self.source = source
        self.destination = destination
        self.infos = {info.store_path: info for info in infos}

    def trace(
        self, *reads: tuple[StorePath, bytes, int, int], said: Circumstances = WELL
    ) -> StartupTrace:
        builder = TraceBuilder()
        for path, name, offset, length in reads:
            entries = tree_of(path).entries
            entry = next(
                n for n, each in enumerate(entries) if each.name == name.rpartition(b"/")[2]
            )
            number = builder.path(path, self.infos[path].nar_hash)
            file = builder.file(number, entry, entries[entry].size, name)
            builder.read(file, offset, length, entries[entry].size)
        return builder.trace(DIGEST, said)

    async def bundle(
        self,
        *traces: StartupTrace,
        allow_partial: bool = False,
        destination: Destination | None = None,
    ) -> PublishedBundle:
        bundler = Bundler(
            self.source,
            destination or self.destination,
            KEY,
            TrustedKeys(()),
            StoreDir(),
            allow_partial=allow_partial,
        )
        given = {DIGEST: merge_traces(traces)} if traces else {}
        closures = closures_of([TOP], self.infos, given, StoreDir())
        bundler.check(given, closures)
        (result,) = await bundler.write(closures, given)
        return result

    async def read(self, name: str) -> tuple[BundleHeader, list[ReadyExtent]]:
        parser = BundleParser(TRUSTED, StoreDir())
        data = b"".join([piece async for piece in self.destination.read(name)])
        header, *extents = parser.feed(data)
        parser.finish()
        assert isinstance(header, BundleHeader)
        return header, [each for each in extents if isinstance(each, ReadyExtent)]

    async def check(self, keys: TrustedKeys = TRUSTED) -> list[CheckedBundle]:
        return await BundleChecker(self.destination, keys, StoreDir()).check(NAMES)


Make = Callable[[Destination], Publisher]


async def published(source: StoreSource, make_publisher: Make, destination: Destination) -> Cache:
    results = await make_publisher(destination).publish(await closure_of(source, [TOP]))
    return Cache(source, destination, [result.narinfo for result in results])


@pytest.fixture
async def cache(
    source: StoreSource, make_publisher: Make, destination: DirectoryDestination
) -> Cache:
    return await published(source, make_publisher, destination)


SHARED = (LIBRARY, b"lib/a.so", 0, 1)
PROGRAM = (TOP, b"bin/run", 0, 1)


async def test_a_closure_has_its_narinfos_and_indexes_in_one_file(
    source: StoreSource, make_publisher: Make, each: Destination
) -> None:
    """To a directory, to a server that takes PUT, and to a bucket."""
    cache = await published(source, make_publisher, each)
    result = await cache.bundle()
    assert not result.kept
    assert (result.paths, result.indexes, result.extents) == (3, 3, 0)
    for name in NAMES:
        header, extents = await cache.read(name)
        assert header.closure == DIGEST
        assert {info.store_path: info for info in header.narinfos} == cache.infos
        assert not extents
        for path, data in header.indexes:
            reference = IndexReference.of(cache.infos[path])
            assert reference is not None
            assert data == b"".join([piece async for piece in each.read(reference.url)])
    assert not any(checked.faults for checked in await cache.check())
    assert await BundleChecker(each, TRUSTED, StoreDir()).names_of([TOP, LEAF]) == NAMES[::-1]


async def test_several_starts_are_merged_and_their_bytes_are_the_nars(
    source: StoreSource, make_publisher: Make, each: Destination, state: Path
) -> None:
    cache = await published(source, make_publisher, each)
    first, second = (
        cache.trace(PROGRAM, SHARED),
        cache.trace((LIBRARY, b"lib/a.so", BLOCK, 1), PROGRAM),
    )
    result = await cache.bundle(first, second)
    assert result.uploaded == 2 * result.size
    header, extents = await cache.read(NAMES[0])
    assert [each.path for each in header.extents] == [TOP, LIBRARY]
    for extent, ready in zip(header.extents, extents, strict=True):
        assert ready.data == nar_of(extent.path, state)[extent.offset : extent.end]
    assert extents[1].data == LARGE[: 2 * BLOCK]
    assert [checked.extents for checked in await cache.check()] == [2, 2]
    assert not any(checked.faults for checked in await cache.check())
    assert (await cache.bundle(first, second)).kept


async def test_an_image_is_carried_before_what_the_start_of_what_it_shows_reads(
    cache: Cache, state: Path, directory: Path
) -> None:
    """Its own closure's bundle: whoever knows only the image asks for that."""
    shown = ClosureDigest.of([LEAF, LIBRARY], StoreDir())
    trace = replace(cache.trace(SHARED), closure=shown)
    bundler = Bundler(
        cache.source,
        cache.destination,
        KEY,
        TrustedKeys(()),
        StoreDir(),
        allow_partial=False,
    )
    closures = closures_of([TOP], cache.infos, {shown: trace}, StoreDir())
    bundler.check({shown: trace}, closures)
    await bundler.write(closures, {shown: trace})
    header, extents = await cache.read(root_file_name(TOP))
    assert header.closure == DIGEST
    assert [extent.path for extent in header.extents] == [TOP, LIBRARY]
    assert extents[0].data == nar_of(TOP, state)
    assert extents[1].data == LARGE[:BLOCK]
    header, extents = await cache.read(file_name(shown))
    assert [extent.path for extent in header.extents] == [LIBRARY]
    assert not any(checked.faults for checked in await cache.check())
    # Also by the trace that is in the cache.
    for name in NAMES:
        (directory / name).unlink()
    (directory / "trace").mkdir()
    (directory / f"trace/{shown}").write_bytes(format_trace(sign_trace(trace, KEY)))
    await bundler.write(closures_of([TOP], cache.infos, {}, StoreDir()), {})
    header, _ = await cache.read(root_file_name(TOP))
    assert [extent.path for extent in header.extents] == [TOP, LIBRARY]


async def test_what_is_the_same_is_not_written_again(cache: Cache, directory: Path) -> None:
    await cache.bundle(cache.trace(PROGRAM))
    watched = Watched(DirectoryDestination(directory), directory)
    before = files_of(directory)
    assert (await cache.bundle(cache.trace(PROGRAM), destination=watched)).kept
    assert (await cache.bundle(destination=watched)).kept  # without a trace it keeps what it has
    assert watched.put_names == []
    (directory / NAMES[1]).unlink()
    assert not (await cache.bundle(destination=watched)).kept
    assert files_of(directory) == before
    assert not (await cache.bundle(cache.trace(SHARED), destination=watched)).kept
    header, _ = await cache.read(NAMES[1])
    assert [extent.path for extent in header.extents] == [LIBRARY]


async def test_what_is_no_bundle_is_replaced(
    cache: Cache, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await cache.bundle()
    (directory / NAMES[0]).write_bytes(b"<html>")
    (directory / NAMES[1]).write_bytes((directory / NAMES[1]).read_bytes()[:100])
    assert not (await cache.bundle()).kept
    assert "expected 'STARTUP-BUNDLE'; written anew" in caplog.text
    assert "cut short" in caplog.text
    assert not any(checked.faults for checked in await cache.check())


async def test_a_partial_trace_is_refused_and_says_what_it_lacks(cache: Cache) -> None:
    said = replace(WELL, lacks=((LIBRARY, Lack.COMMITTED),), flaws=frozenset({Flaw.SHARED}))
    with pytest.raises(InvalidData) as caught:
        await cache.bundle(cache.trace(PROGRAM, said=said))
    assert f"what was read of 1 paths is missing (committed: {LIBRARY})" in str(caught.value)
    assert "its recording was shared" in str(caught.value)
    assert "--allow-partial" in str(caught.value)
    assert (await cache.bundle(cache.trace(PROGRAM, said=said), allow_partial=True)).extents == 1


async def test_a_trace_of_another_closure_or_of_another_nar_is_refused(cache: Cache) -> None:
    other = replace(cache.trace(PROGRAM), closure=ClosureDigest("5" * 64))
    closures = closures_of([TOP], cache.infos, {}, StoreDir())
    bundler = Bundler(
        cache.source, cache.destination, KEY, TrustedKeys(()), StoreDir(), allow_partial=False
    )
    with pytest.raises(InvalidData, match=f"the given paths have the closures {DIGEST}"):
        bundler.check({other.closure: other}, closures)
    trace = cache.trace(PROGRAM)
    wrong = replace(trace.paths[0], nar_hash=Hash(HashAlgorithm.SHA256, bytes(32)))
    with pytest.raises(InvalidData, match="record the start of what is published"):
        await cache.bundle(replace(trace, paths=(wrong,)))
    file = replace(trace.files[0], size=1 << 20)
    with pytest.raises(InvalidData, match="is no file of 1048576 bytes in its NAR"):
        await cache.bundle(replace(trace, files=(file,), extents=()))


@pytest.mark.parametrize(
    ("change", "extents", "said"),
    [
        (lambda trace: sign_trace(trace, KEY), 1, ""),
        (lambda trace: trace, 0, "is not used"),
        (lambda trace: sign_trace(trace, secret_key("stranger-1")), 0, "is not used"),
        (
            lambda trace: sign_trace(
                replace(trace, circumstances=replace(WELL, flaws=frozenset({Flaw.INTERRUPTED}))),
                KEY,
            ),
            0,
            "its recording was interrupted",
        ),
        (
            lambda trace: sign_trace(replace(trace, closure=ClosureDigest("5" * 64)), KEY),
            0,
            "the given paths have the closures",
        ),
    ],
)
async def test_the_trace_that_the_cache_has_is_used(
    cache: Cache,
    directory: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[StartupTrace], StartupTrace],
    extents: int,
    said: str,
) -> None:
    (directory / "trace").mkdir()
    (directory / f"trace/{DIGEST}").write_bytes(format_trace(change(cache.trace(PROGRAM))))
    assert (await cache.bundle()).extents == extents
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


async def test_indexes_of_what_a_start_does_not_touch_are_left_out_where_they_are_many(
    cache: Cache,
) -> None:
    result = await cache.bundle(cache.trace((LEAF, b"", 0, 1)))
    assert result.indexes == 1
    header, _ = await cache.read(NAMES[0])
    assert [path for path, _ in header.indexes] == [LEAF]
    assert len(header.narinfos) == 3


async def test_bundles_come_after_what_they_name_and_interrupted_anywhere_it_goes_on(
    cache: Cache, directory: Path
) -> None:
    for steps in range(2):
        for name in NAMES:
            (directory / name).unlink(missing_ok=True)
        broken = Watched(DirectoryDestination(directory), directory, steps)
        with pytest.raises(Exception, match="the disk went away"):
            await cache.bundle(cache.trace(PROGRAM), destination=broken)
        assert not (await cache.bundle(cache.trace(PROGRAM))).kept
        assert len({(directory / name).read_bytes() for name in NAMES}) == 1


async def test_a_source_whose_nar_is_another_by_now(cache: Cache) -> None:
    path = LEAF
    info = replace(cache.infos[path], nar_hash=Hash(HashAlgorithm.SHA256, bytes(32)))
    with pytest.raises(ContentMismatch, match="the cache has"):
        contents_of([b"nar"], [Part(path, 0, 3)], info)


async def test_parts_are_cut_from_pieces_of_any_size(state: Path, cache: Cache) -> None:
    nar, info = nar_of(TOP, state), cache.infos[TOP]
    parts = [Part(TOP, 500, 400), Part(TOP, 0, 7), Part(TOP, len(nar) - 5, 5), Part(TOP, 900, 10)]
    for size in (1, 13, len(nar)):
        pieces = [nar[at : at + size] for at in range(0, len(nar), size)]
        assert contents_of(pieces, parts, info) == [nar[p.offset : p.end] for p in parts]


async def test_a_long_read_is_several_extents_and_too_much_is_left_out(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = 3 * MAX_EXTENT_SIZE + 5
    tree = tree_of(LIBRARY)
    file = next(n for n, each in enumerate(tree.entries) if each.kind is EntryKind.REGULAR)
    begin = tree.entries[file].offset

    class Large:
        """The tree with a larger file."""

        entries = [
            replace(each, size=size) if n == file else each for n, each in enumerate(tree.entries)
        ]

    builder = TraceBuilder()
    number = builder.file(
        builder.path(LIBRARY, cache.infos[LIBRARY].nar_hash), file, size, b"lib/a.so"
    )
    builder.read(number, 0, size, size)
    trace = builder.trace(DIGEST, WELL)
    parts = parts_of(trace, {LIBRARY: Large()})  # type: ignore[dict-item]
    assert [(part.offset - begin, part.size) for part in parts] == [
        *((at * MAX_EXTENT_SIZE, MAX_EXTENT_SIZE) for at in range(3)),
        (3 * MAX_EXTENT_SIZE, 5),
    ]
    monkeypatch.setattr("fusesnap.publish.extents.MAX_CONTENT_SIZE", 2 * MAX_EXTENT_SIZE)
    assert parts_of(trace, {LIBRARY: Large()}) == parts[:2]  # type: ignore[dict-item]
    assert f"its bundle has the first {2 * MAX_EXTENT_SIZE} of them" in caplog.text


async def test_which_closures_get_a_bundle(cache: Cache) -> None:
    infos = cache.infos
    shown = ClosureDigest.of([LEAF, LIBRARY], StoreDir())
    assert [each.digest for each in closures_of([TOP], infos, {}, StoreDir())] == [DIGEST]
    traced = closures_of([TOP], infos, {shown: None}, StoreDir())
    assert [(each.digest, each.root) for each in traced] == [(DIGEST, TOP), (shown, None)]
    several = closures_of([LEAF, LIBRARY], infos, {}, StoreDir())
    assert [each.root for each in several] == [LEAF, LIBRARY]  # the second is that of all, too
    apart = {path: replace(info, references=()) for path, info in infos.items()}
    assert [each.root for each in closures_of([LEAF, TOP], apart, {}, StoreDir())] == [
        LEAF,
        TOP,
        None,
    ]
    assert several[0].file_names == (file_name(several[0].digest), root_file_name(LEAF))


async def test_files_of_traces(cache: Cache, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(format_trace(cache.trace(PROGRAM)))
    two.write_bytes(format_trace(cache.trace(SHARED)))
    merged = read_traces([one, two])
    assert merged[DIGEST].circumstances.starts == 2
    two.write_bytes(b"no trace")
    with pytest.raises(InvalidData, match=r"two: startup trace"):
        read_traces([one, two])


# ------------------------------------------------------------------- checking


def rewritten(directory: Path, **changes: object) -> None:
    """The bundle by its digest with something else in its header, signed by the trusted key."""
    file = directory / NAMES[0]
    header, *events = BundleParser(TRUSTED, StoreDir()).feed(file.read_bytes())
    assert isinstance(header, BundleHeader)
    changed = replace(header, **changes)  # type: ignore[arg-type]
    contents = [event.data for event in events if isinstance(event, ReadyExtent)]
    file.write_bytes(write_bundle(changed, contents, KEY, StoreDir()))


async def faults(cache: Cache, keys: TrustedKeys = TRUSTED) -> str:
    by_digest, by_root = await cache.check(keys)
    assert keys is not TRUSTED or not by_root.faults
    return "; ".join(by_digest.faults)


async def test_damage_is_told(cache: Cache, directory: Path) -> None:
    await cache.bundle(cache.trace(PROGRAM, SHARED))
    file = directory / NAMES[0]
    good = file.read_bytes()
    for place, said in (
        (20, "not trusted"),
        (40, "signature"),
        (len(good) - 1, "startup bundle: "),
    ):
        flipped = bytearray(good)
        flipped[place] ^= 1
        file.write_bytes(flipped)
        assert said in await faults(cache)
    file.write_bytes(good[:-3])
    assert "3 bytes of its stream are missing" in await faults(cache)
    file.unlink()
    assert "not found" in await faults(cache)
    file.write_bytes((directory / NAMES[1]).read_bytes())
    assert await faults(cache) == ""
    assert "not trusted" in await faults(cache, TrustedKeys((secret_key("other").public_key(),)))


async def test_a_bundle_under_another_name_is_told(cache: Cache, directory: Path) -> None:
    await cache.bundle()
    (directory / "bundle" / LEAF.hash_part).write_bytes((directory / NAMES[0]).read_bytes())
    checker = BundleChecker(cache.destination, TRUSTED, StoreDir())
    (result,) = await checker.check([f"bundle/{LEAF.hash_part}"])
    assert result.faults == (f"it is of closure {DIGEST}",)


async def test_bytes_that_are_not_the_nars_are_told(cache: Cache, directory: Path) -> None:
    await cache.bundle(cache.trace(PROGRAM))
    header, (ready,) = await cache.read(NAMES[0])
    wrong = bytes(len(ready.data))
    file = directory / NAMES[0]
    lie = Part.of(ready.extent).extent(wrong)
    file.write_bytes(write_bundle(replace(header, extents=(lie,)), [wrong], KEY, StoreDir()))
    assert f"{TOP}: the {len(wrong)} bytes from" in await faults(cache)


async def test_an_index_or_narinfo_that_does_not_hold_is_told(
    cache: Cache, directory: Path
) -> None:
    await cache.bundle()
    header, _ = await cache.read(NAMES[0])
    swapped = tuple((path, header.indexes[0][1]) for path, _ in header.indexes)
    rewritten(directory, indexes=swapped)
    assert "its index of" in await faults(cache)
    rewritten(directory, indexes=header.indexes, narinfos=unsigned(header))
    assert "it is unsigned" in await faults(cache)
    gone = parse_narinfo((directory / f"{LEAF.hash_part}.narinfo").read_bytes(), StoreDir()).url
    rewritten(directory, narinfos=header.narinfos)
    (directory / gone).unlink()
    assert [
        f"{gone} of {LEAF} is not there" in str(each.faults) for each in await cache.check()
    ] == [
        True,
        True,
    ]


def unsigned(header: BundleHeader) -> tuple[NarInfo, ...]:
    return tuple(replace(info, signatures=()) for info in header.narinfos)
