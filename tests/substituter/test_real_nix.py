"""A cache that real ``nix copy`` wrote, read from its directory and through a real nginx."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from testbed.binary_cache import CacheFiles, http_cache, signing_key
from testbed.processes import run

from fusesnap.nix.compression import decompressor
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.substituter.client import make_client, open_substituter
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.pool import SubstituterPool
from fusesnap.substituter.retry import RetryPolicy

ENVIRONMENT = {
    "NIX_REMOTE": "local",
    "NIX_CONFIG": "sandbox = false\nbuild-users-group =\nsubstituters =\n"
    "experimental-features = nix-command",
}


@dataclass(frozen=True)
class RealCache:
    files: CacheFiles
    keys: TrustedKeys
    paths: tuple[StorePath, ...]


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> RealCache:
    """Three paths that a real Nix added, signed and copied."""
    work = tmp_path_factory.mktemp("real")
    store = f"local?store=/nix/store&real={work}/store&state={work}/state&log={work}/log"
    key = signing_key(work, "real-1")
    target = f"file://{work}/cache?compression=xz&secret-key={key.secret_file}"
    added = []
    for name in ("one", "two", "three"):
        (work / name).write_text(name * 10_000)
        command: list[str | Path] = ["nix", "store", "add-path", work / name, "--store", store]
        added.append(run(command, env=ENVIRONMENT).strip())
    run(["nix", "copy", "--from", store, "--to", target, *added], env=ENVIRONMENT)
    return RealCache(
        CacheFiles(work / "cache"),
        TrustedKeys.parse([key.public]),
        tuple(StoreDir().parse(path) for path in added),
    )


@pytest.fixture(params=["file", "http"])
def url(request: pytest.FixtureRequest, real_cache: RealCache, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{real_cache.files.directory}"
    else:
        with http_cache(real_cache.files, tmp_path / "nginx") as cache:
            yield cache.url


async def test_everything_that_nix_copied(real_cache: RealCache, url: str, tmp_path: Path) -> None:
    narinfos = NarInfoCache(tmp_path / "narinfos.sqlite", lambda: 1_000_000.0)
    async with make_client() as client:
        pool = SubstituterPool(
            [open_substituter(url, client)],
            store_dir=StoreDir(),
            trusted_keys=real_cache.keys,
            narinfo_cache=narinfos,
            retry=RetryPolicy(),
            deadline=30,
        )
        for path in real_cache.paths:
            offer = await pool.find(path)
            nar = bytearray()
            decoder = decompressor(offer.narinfo.compression)
            async with offer.substituter.nar(offer.narinfo) as pieces:
                async for piece in pieces:
                    for part in decoder.decompress(piece):
                        nar += part
            decoder.finish()
            assert len(nar) == offer.narinfo.nar_size
            assert hashlib.sha256(nar).digest() == offer.narinfo.nar_hash.digest
    narinfos.close()
