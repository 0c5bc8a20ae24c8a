"""Store paths to publish: real NARs, really compressed, really signed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import zstandard
from nacl.signing import SigningKey

from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.nar import FileData, FileEnd, NarEnd, NarEvent, RegularFile, nar_bytes
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.signature import SecretKey, TrustedKeys
from fusesnap.nix.store_path import StoreDir, StorePath

CACHE_INFO: Final = b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n"
COMPRESSORS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "none": bytes,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
}


def secret_key(name: str = "key-1") -> SecretKey:
    """A key that is the same each time it is asked for by that name."""
    seed = name.encode().ljust(32, b".")
    return SecretKey(name, seed + bytes(SigningKey(seed).verify_key))


KEY: Final = secret_key()
TRUSTED: Final = TrustedKeys((KEY.public_key(),))


@dataclass(frozen=True)
class Sample:
    """A store path as a cache has it: what it says, and the file with the NAR."""

    info: NarInfo
    file: bytes

    @property
    def path(self) -> StorePath:
        return self.info.store_path

    @property
    def narinfo_name(self) -> str:
        return f"{self.path.hash_part}.narinfo"

    @property
    def narinfo(self) -> bytes:
        return self.info.to_text().encode()

    def signed_by(self, *keys: SecretKey) -> Sample:
        fingerprint = self.info.fingerprint()
        signatures = tuple(key.sign(fingerprint) for key in keys)
        return Sample(replace(self.info, signatures=signatures), self.file)

    def but(self, **fields: object) -> Sample:
        """The same with other fields; the signature stays as it was."""
        return Sample(replace(self.info, **fields), self.file)  # type: ignore[arg-type]


def sample(name: str = "hello", *, size: int = 1000, compression: str = "xz") -> Sample:
    """A path that is one file of ``size`` bytes that no compression makes smaller."""
    contents = random.Random(name).randbytes(size)  # noqa: S311 -- not for secrets
    events: list[NarEvent] = [
        RegularFile(name=b"", size=size, executable=False, offset=0),
        FileData(contents),
        FileEnd(),
        NarEnd(),
    ]
    nar = b"".join(nar_bytes(events))
    file = COMPRESSORS[compression](nar)
    info = NarInfo(
        store_path=StorePath(_sha256(name.encode()).nix32()[:32], name),
        url=f"nar/{_sha256(file).nix32()}.nar.{compression}",
        compression=compression,
        file_hash=_sha256(file),
        file_size=len(file),
        nar_hash=_sha256(nar),
        nar_size=len(nar),
        references=(),
        deriver=None,
        system=None,
        signatures=(),
        ca=None,
        unknown=(),
        store_dir=StoreDir(),
    )
    return Sample(info, file).signed_by(KEY)


def _sha256(data: bytes) -> Hash:
    algorithm = HashAlgorithm.SHA256
    hasher = algorithm.new()
    hasher.update(data)
    return Hash(algorithm, hasher.digest())
