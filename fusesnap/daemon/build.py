"""Builds what every process of ours needs: a store, its substituters, and what fetches from one into the other."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import trio

from fusesnap.child import OURS
from fusesnap.config import Settings
from fusesnap.daemon.readers import identify
from fusesnap.daemon.telemetry.counting import Counters, Counting
from fusesnap.daemon.telemetry.keeper import Telemetry
from fusesnap.daemon.telemetry.owners import upper_of_reader
from fusesnap.daemon.telemetry.recorder import Recorder
from fusesnap.daemon.telemetry.spans import open_spans
from fusesnap.daemon.unpackers import make_root, unpack_command
from fusesnap.errors import FusesnapError
from fusesnap.fetch.bandwidth import Bandwidth
from fusesnap.fetch.builder import Builder, CommandBuilder
from fusesnap.fetch.bundles import Bundles
from fusesnap.fetch.chunked_paths import ChunkedPaths
from fusesnap.fetch.contents import Contents
from fusesnap.fetch.events import FetchEvent, ObserveFetch
from fusesnap.fetch.link import Link, open_link
from fusesnap.fetch.loader import Loader
from fusesnap.fetch.realiser import Limits, Realiser
from fusesnap.fetch.references import References
from fusesnap.fetch.scheduler import LinkLimits
from fusesnap.fetch.unpack_processes import UnpackProcesses
from fusesnap.fetch.unpack_start import StartedProcess
from fusesnap.fetch.unpacking import ThreadUnpackers
from fusesnap.nix.signature import PublicKey, TrustedKeys
from fusesnap.nix.store_path import StoreDir
from fusesnap.store.local_store import LocalStore
from fusesnap.store.partial_nars import PartialNars
from fusesnap.store.room import Room, StoreLimits
from fusesnap.substituter.addresses import parse_cache_url
from fusesnap.substituter.base import Meter, unmetered
from fusesnap.substituter.client import make_client, open_substituter, tls_context
from fusesnap.substituter.credentials import Secrets
from fusesnap.substituter.http import Timeouts
from fusesnap.substituter.late_tls import LateContext
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.patience import WINDOW, Patience
from fusesnap.substituter.pool import SubstituterPool
from fusesnap.substituter.retry import RetryPolicy

# Few connections are cheaper than many: 2,400 narinfos cost 2.4 s of CPU over 16, 6.6 s over 64.
LOOKUP_CONNECTIONS = 16
BOOT_ID = "/proc/sys/kernel/random/boot_id"
# A transfer is given up a little before its readers give up: then they are told why.
BEFORE_READERS = 0.9
# Seconds over which the pace of a transfer is judged.
PACE_WINDOW = WINDOW


@dataclass(frozen=True, slots=True)
class Node:
    """One state directory with what serves it."""

    settings: Settings
    store_dir: StoreDir
    store: LocalStore
    pool: SubstituterPool
    unpackers: UnpackProcesses
    link: Link
    realiser: Realiser
    contents: Contents
    bundles: Bundles
    loader: Loader
    telemetry: Telemetry


@contextmanager
def plain_errors() -> Iterator[None]:
    """Take the error that a person can be told about out of a nursery's group; what is unexpected stays as it is."""
    try:
        yield
    except BaseExceptionGroup as group:
        told = next(
            (leaf for leaf in leaves(group) if isinstance(leaf, FusesnapError | KeyboardInterrupt)),
            None,
        )
        if told is None:
            raise
        raise told from group


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions inside nested groups."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def open_store(settings: Settings, store_dir: StoreDir) -> LocalStore:
    """The local store; blocking, with the start-up pass. Raises ``StorageFailure``."""
    make_root(settings)
    return LocalStore.open(settings.root, store_dir, clock=time.time)


def timeouts(settings: Settings) -> Timeouts:
    """How long a cache has."""
    fetch = settings.fetch
    return Timeouts(fetch.connect_timeout, fetch.idle_timeout, fetch.lookup_timeout)


@dataclass(frozen=True, slots=True)
class Authorities:
    """Who is trusted to name servers, for the one client and for the other."""

    lookups: ssl.SSLContext
    transfers: ssl.SSLContext

    @classmethod
    def load(cls, settings: Settings) -> Authorities:
        """Those that the system, certifi, the environment and the settings name. Raises ``InvalidConfiguration``."""
        return cls(authorities(settings), authorities(settings))


def authorities(settings: Settings) -> ssl.SSLContext:
    """Who may vouch for a server, for one client. Raises ``InvalidConfiguration``."""
    read = partial(tls_context, settings.ca_file, trust_env=True)
    encrypted = any(parse_cache_url(url).scheme == "https" for url in settings.substituters)
    # What the settings name is read now, so that what is wrong with it is told now.
    return read() if encrypted or settings.ca_file else LateContext(read)


def secrets(settings: Settings) -> Secrets:
    """What caches are told of us. Raises ``InvalidConfiguration``."""
    return Secrets(settings.netrc_file, settings.token_files)


def open_client(
    settings: Settings, tls: ssl.SSLContext, *, http2: bool, connections: int
) -> httpx.AsyncClient:
    """A client with the environment's proxies and certificate authorities."""
    return make_client(
        http2=http2,
        max_connections=connections,
        timeouts=timeouts(settings),
        trust_env=True,
        tls=tls,
        user_agent=f"fusesnap/{version('fusesnap')}",
    )


async def open_pool(
    settings: Settings,
    store_dir: StoreDir,
    authorities: Authorities,
    stack: AsyncExitStack,
    meter: Meter = unmetered,
) -> SubstituterPool:
    """The substituters that the settings name; what they hold is closed with ``stack``.

    ``meter`` is told of all bytes that come but NARs', which have their own way over a link.
    """
    lookups = open_client(settings, authorities.lookups, http2=True, connections=LOOKUP_CONNECTIONS)
    # The link sees to it that none has more than its own, and as many that are held.
    connections = 2 * settings.fetch.connections * max(1, len(settings.substituters))
    transfers = open_client(settings, authorities.transfers, http2=False, connections=connections)
    await stack.enter_async_context(lookups)
    await stack.enter_async_context(transfers)
    told = secrets(settings)
    cache = NarInfoCache(settings.root / "narinfo-cache.sqlite", time.time)
    stack.callback(cache.close)
    return SubstituterPool(
        [
            open_substituter(
                url,
                lookups,
                transfers=transfers,
                store_dir=store_dir,
                timeouts=timeouts(settings),
                secrets=told,
                meter=meter,
            )
            for url in settings.substituters
        ],
        store_dir=store_dir,
        trusted_keys=trusted_keys(settings),
        narinfo_cache=cache,
        retry=RetryPolicy(),
        deadline=settings.fetch.lookup_timeout,
        clock=time.monotonic,  # status asks it in a thread, where trio's cannot be read
        patience=Patience(
            settings.fetch.stall_timeout * BEFORE_READERS, settings.fetch.min_rate, PACE_WINDOW
        ),
        meter=meter,
    )


def open_builder(settings: Settings, store: LocalStore) -> Builder | None:
    """What brings paths that no cache has, if the settings name a command for that."""
    if not settings.builder.command:
        return None
    return CommandBuilder(
        settings.builder.command,
        settings.builder.timeout,
        store,
        trusted_keys(settings),
        {name: value for name, value in os.environ.items() if name not in OURS},
    )


def trusted_keys(settings: Settings) -> TrustedKeys:
    """The keys that may vouch for a path."""
    return TrustedKeys(tuple(map(PublicKey.parse, settings.trusted_public_keys)))


async def open_chunked_paths(
    settings: Settings,
    store: LocalStore,
    pool: SubstituterPool,
    link: Link,
    nursery: trio.Nursery,
    observe: ObserveFetch,
) -> ChunkedPaths:
    """What is fetched by the chunk. Raises ``StorageFailure``."""
    boot = UUID(Path(BOOT_ID).read_text(encoding="ascii").strip())  # noqa: ASYNC240 - the kernel has it at hand
    partials = await trio.to_thread.run_sync(PartialNars.in_state, settings.root, boot)
    keys, stall = trusted_keys(settings), settings.fetch.stall_timeout
    # Where all of a closure is fetched in the end, what was guessed wrongly comes too early, and costs nothing.
    return ChunkedPaths(
        store,
        pool,
        partials,
        keys,
        link,
        nursery,
        stall,
        observe,
        scattered=settings.fetch.complete and "references" in settings.fetch.follows,
    )


def totals_of(pool: SubstituterPool, room: Room) -> Iterator[tuple[str, dict[str, str], float]]:
    """What a pool counts of its caches, and a store of what it removes."""
    paths, size = room.removed
    yield "fusesnap_evicted_paths", {}, paths
    yield "fusesnap_evicted_bytes", {}, size
    for state in pool.states():
        yield "fusesnap_narinfo_requests", {"cache": state.url}, state.narinfos_asked


def open_telemetry(settings: Settings, process: str) -> Telemetry:
    """What hears, counts and keeps what happens in this process. Raises ``InvalidConfiguration``."""
    # Pids come again; a session is for ever.
    session = f"{os.getpid()}-{uuid4().hex}"
    recorder = Recorder(session, time.time, upper_of_reader)
    counting = Counting(Counters(), time.monotonic)
    spans = open_spans(settings.spans, process)
    return Telemetry(settings.root, recorder, counting, time.time, spans)


@asynccontextmanager
async def open_node(
    settings: Settings,
    authorities: Authorities | None = None,
    process: str = "command",
    linger: float = 0.0,
    unpackers: Sequence[StartedProcess] = (),
) -> AsyncIterator[Node]:
    """The objects of one state directory, with everything closed and every transfer ended when the block is left.

    ``authorities``, where they were loaded before: to do so takes longer than all the rest. ``process`` names ours, for
    people. ``linger``: for how many seconds a path that nobody waits for may wait for others to be committed with.
    ``unpackers``: processes that unpack, if some were started before.
    """
    store_dir = StoreDir(settings.store_dir)
    store = await trio.to_thread.run_sync(open_store, settings, store_dir)
    async with AsyncExitStack() as stack:
        stack.callback(store.close)
        store.room.keep_to(StoreLimits(settings.store.max_size, settings.store.min_free))
        authorities = authorities or Authorities.load(settings)
        bandwidth = Bandwidth(settings.fetch.bandwidth)
        pool = await open_pool(settings, store_dir, authorities, stack, bandwidth.owe)
        telemetry = await stack.enter_async_context(open_telemetry(settings, process).running())
        telemetry.watch(lambda: totals_of(pool, store.room))
        nursery = await stack.enter_async_context(trio.open_nursery())
        try:
            yield await assembled(
                settings, store, pool, bandwidth, telemetry, nursery, linger, unpackers
            )
        finally:
            nursery.cancel_scope.cancel()


async def assembled(
    settings: Settings,
    store: LocalStore,
    pool: SubstituterPool,
    bandwidth: Bandwidth,
    telemetry: Telemetry,
    nursery: trio.Nursery,
    linger: float,
    started: Sequence[StartedProcess],
) -> Node:
    """What fetches from ``pool`` into ``store``, in tasks of ``nursery``. See :func:`open_node`."""
    fetch = settings.fetch
    link = open_link(nursery, LinkLimits(fetch.transfers, fetch.connections), bandwidth)
    command, threads = unpack_command(settings, linger), ThreadUnpackers(store)
    unpackers = UnpackProcesses(command, fetch.unpackers, nursery, threads, started)
    chunked = await open_chunked_paths(settings, store, pool, link, nursery, telemetry.fetch)

    def heard(event: FetchEvent) -> None:
        telemetry.fetch(event)
        if "references" in fetch.follows:
            references.heard(event)

    limits, builder = Limits(fetch.lookups, fetch.stall_timeout), open_builder(settings, store)
    realiser = Realiser(
        store, pool, unpackers, link, nursery, limits, identify, heard, builder, chunked
    )
    contents = Contents(store, realiser, chunked, nursery)
    bundles = Bundles(
        pool.caches(),
        store,
        chunked,
        trusted_keys(settings),
        link,
        nursery,
        fetch.lookup_timeout,
        telemetry.fetch,
    )
    references = References(store, contents.request, nursery)
    follows = "loader" in fetch.follows
    loader = Loader(store, store.store_dir, contents, nursery, follows=follows)
    return Node(
        settings,
        store.store_dir,
        store,
        pool,
        unpackers,
        link,
        realiser,
        contents,
        bundles,
        loader,
        telemetry,
    )
