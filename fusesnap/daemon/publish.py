"""Builds what publishing needs, and runs it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import trio

from fusesnap.config import Settings
from fusesnap.daemon.build import (
    Authorities,
    authorities,
    open_client,
    open_pool,
    plain_errors,
    secrets,
    trusted_keys,
)
from fusesnap.errors import InvalidConfiguration, InvalidData, StorageFailure
from fusesnap.fetch.bandwidth import Bandwidth
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.signature import PublicKey, SecretKey, TrustedKeys
from fusesnap.nix.startup_trace import StartupTrace
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.publish.bundles import Bundler, PublishedBundle
from fusesnap.publish.check import Checked, Checker
from fusesnap.publish.check_bundles import DIRECTORY as BUNDLE_DIRECTORY
from fusesnap.publish.check_bundles import BundleChecker, CheckedBundle
from fusesnap.publish.chunking import DEFAULT_CHUNK_SIZE
from fusesnap.publish.closures import BundledClosure, closures_of
from fusesnap.publish.destination import Destination, DirectoryDestination
from fusesnap.publish.http_destination import HttpDestination
from fusesnap.publish.packing import DEFAULT_LEVEL, Compressor, Packer
from fusesnap.publish.publisher import Published, Publisher
from fusesnap.publish.s3_destination import S3Destination
from fusesnap.publish.source import CacheSource, Source, StoreSource, closure_of, infos_of
from fusesnap.publish.traces import read_traces
from fusesnap.substituter.answers import narinfo_name

DEFAULT_PRIORITY: Final = 40  # as cache.nixos.org has it
CONNECTIONS: Final = 16  # to a server that takes PUT


@dataclass(frozen=True, slots=True)
class Publication:
    """What to publish, and how.

    ``source`` is a URL of a cache, or the root directory or state directory of a store; ``target`` a directory or a
    URL. ``chunk_size`` in bytes; ``jobs`` are threads that compress. ``traces`` are files; what is missing in one is
    excused by ``allow_partial``.
    """

    source: str
    target: str
    paths: tuple[str, ...]
    closure: bool
    level: int = DEFAULT_LEVEL
    chunk_size: int = DEFAULT_CHUNK_SIZE
    jobs: int = 0
    priority: int = DEFAULT_PRIORITY
    traces: tuple[Path, ...] = ()
    allow_partial: bool = False


def read_secret_key(file: Path) -> SecretKey:
    """The key in ``file``. Raises InvalidData and StorageFailure, whose messages do not show it."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise StorageFailure(f"{file}: {error.strerror}", error.errno or 0) from error
    try:
        return SecretKey.parse(text)
    except InvalidData as error:
        raise InvalidData(f"{file}: {error}") from None


async def publish_paths(
    settings: Settings,
    publication: Publication,
    key: SecretKey,
    plan: Callable[[Sequence[NarInfo]], None],
    tell: Callable[[Published], None],
) -> tuple[list[Published], list[PublishedBundle]]:
    """Publish, with bundles where it is a closure; ``plan`` is told what there is to do, ``tell`` of each path.

    Raises the first error met with; what is done by then stays, and is found by the next run.
    """
    store_dir = StoreDir(settings.store_dir)
    roots = [store_dir.parse(text) for text in publication.paths]
    traces = await trio.to_thread.run_sync(read_traces, publication.traces)
    with plain_errors():
        async with AsyncExitStack() as stack:
            source = await stack.enter_async_context(_open_source(settings, publication.source))
            destination = await stack.enter_async_context(
                open_destination(settings, publication.target)
            )
            executor = stack.enter_context(
                ThreadPoolExecutor(publication.jobs or os.cpu_count() or 1, "compress")
            )
            packer = Packer(executor, Compressor(publication.level), publication.chunk_size)
            publisher = Publisher(
                source, destination, packer, key, store_dir, priority=publication.priority
            )
            bundler = Bundler(
                source,
                destination,
                key,
                trusted_keys(settings),
                store_dir,
                allow_partial=publication.allow_partial,
            )
            if not publication.closure:
                infos = await infos_of(source, roots)
                plan(infos)
                return await publisher.publish(infos, tell), []
            infos = await closure_of(source, roots)
            bundler.check(traces, _closures(roots, infos, traces, store_dir))
            plan(infos)
            published = await publisher.publish(infos, tell)
            there = [each.narinfo for each in published]
            closures = _closures(roots, there, traces, store_dir)
            return published, await bundler.write(closures, traces)
    raise AssertionError("unreachable: a block that raises nothing returned")


def _closures(
    roots: Sequence[StorePath],
    infos: Iterable[NarInfo],
    traces: Mapping[ClosureDigest, StartupTrace],
    store_dir: StoreDir,
) -> list[BundledClosure]:
    return closures_of(roots, {info.store_path: info for info in infos}, traces, store_dir)


async def check_cache(
    settings: Settings,
    target: str,
    keys: Sequence[PublicKey],
    paths: Sequence[str],
    tell: Callable[[Checked], None],
) -> tuple[list[Checked], list[CheckedBundle]]:
    """Check ``paths`` and their bundles, or all that the cache has; raises StorageFailure and Unavailable."""
    store_dir, trusted = StoreDir(settings.store_dir), TrustedKeys(tuple(keys))
    roots = [store_dir.parse(text) for text in paths]
    with plain_errors():
        async with open_destination(settings, target, make=False) as cache:
            checker = BundleChecker(cache, trusted, store_dir)
            if roots:
                names = [narinfo_name(root) for root in roots]
                bundles = await checker.names_of(roots)
            else:
                listed = await _listed(cache, "")
                names = [name for name in listed if name.endswith(".narinfo")]
                bundles = await _listed(cache, BUNDLE_DIRECTORY)
            checked = await Checker(cache, trusted, store_dir).check(names, tell)
            return checked, await checker.check(bundles)
    raise AssertionError("unreachable: a block that raises nothing returned")


async def _listed(cache: Destination, directory: str) -> list[str]:
    listed = await cache.names(directory)
    if listed is None:
        raise InvalidConfiguration(f"{cache.url}: cannot be listed: name the paths to check")
    return list(listed)


@asynccontextmanager
async def _open_source(settings: Settings, text: str) -> AsyncIterator[Source]:
    if "://" not in text:
        store_dir = StoreDir(settings.store_dir)
        store = await trio.to_thread.run_sync(StoreSource.at, Path(text), store_dir)
        try:
            yield store
        finally:
            store.close()
        return
    async with AsyncExitStack() as stack:
        # Narinfos are asked for once; what is remembered of them goes with the run.
        own = settings.model_copy(update={"root": _spool(stack), "substituters": [text]})
        store_dir, bandwidth = StoreDir(own.store_dir), Bandwidth(own.fetch.bandwidth)
        pool = await open_pool(own, store_dir, Authorities.load(own), stack, bandwidth.owe)
        nursery = await stack.enter_async_context(trio.open_nursery())
        yield CacheSource(pool, nursery, bandwidth.pay)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_destination(
    settings: Settings, text: str, *, make: bool = True
) -> AsyncIterator[Destination]:
    """What ``--to`` names; ``make`` says whether a directory that is missing is made.

    Raises InvalidConfiguration for what is none.
    """
    scheme = urlsplit(text).scheme if "://" in text else ""
    async with AsyncExitStack() as stack:
        match scheme:
            case "" | "file":
                path = unquote(urlsplit(text).path) if scheme else text
                yield _directory(path, make=make)
            case "http" | "https":
                client = open_client(
                    settings, authorities(settings), http2=False, connections=CONNECTIONS
                )
                await stack.enter_async_context(client)
                yield HttpDestination(text, client, _spool(stack), secrets=secrets(settings))
            case "s3":
                yield S3Destination(text, _spool(stack))
            case _:
                raise InvalidConfiguration(
                    f"{text}: scheme is {scheme!r}, expected a directory, or file, http, https or s3"
                )


def _spool(stack: AsyncExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fusesnap-publish-")))


def _directory(text: str, *, make: bool) -> DirectoryDestination:
    directory = Path(text).absolute()
    if not make and not directory.is_dir():
        raise InvalidConfiguration(f"{directory}: no directory")
    return DirectoryDestination(directory)
