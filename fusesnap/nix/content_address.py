"""Content addresses: store paths whose hash part is made of their contents.

Source: Nix manual, "Content-addressing store objects" and "Store path specification";
``src/libstore/content-address.cc`` and ``store-dir-config.cc`` of Nix. Their text forms in a
narinfo's field ``CA`` are ``text:sha256:<hash>`` (a file written by an expression),
``fixed:<hash>`` (a file by its contents) and ``fixed:r:<hash>`` (a tree by its NAR).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from fusesnap.errors import ContentMismatch, InvalidData
from fusesnap.nix.hash import Hash, HashAlgorithm, compress_digest, nix32_encode
from fusesnap.nix.nar import DirectoryStart, FileData, NarEvent, RegularFile, Symlink
from fusesnap.nix.quoting import quote
from fusesnap.nix.store_path import StoreDir, StorePath

_HASH_PART_SIZE = 20  # bytes


class ContentAddressMethod(Enum):
    """How contents are hashed."""

    TEXT = "text:"
    FLAT = "fixed:"
    RECURSIVE = "fixed:r:"


@dataclass(frozen=True, slots=True)
class ContentAddress:
    """A hash of contents and how it was made."""

    method: ContentAddressMethod
    hash: Hash

    @classmethod
    def parse(cls, text: str) -> ContentAddress:
        """Read a content address; raises :class:`InvalidData`, also for methods of later Nix."""
        for method in (
            ContentAddressMethod.TEXT,
            ContentAddressMethod.RECURSIVE,
            ContentAddressMethod.FLAT,
        ):
            if text.startswith(method.value):
                address = cls(method, Hash.parse(text.removeprefix(method.value)))
                if method is ContentAddressMethod.TEXT and not address.is_sha256:
                    raise InvalidData(f"content address {quote(text)} is a text not by sha256")
                return address
        raise InvalidData(
            f"content address {quote(text)} begins with none of text:, fixed:, fixed:r:"
        )

    @property
    def is_sha256(self) -> bool:
        """Whether the hash is SHA-256."""
        return self.hash.algorithm is HashAlgorithm.SHA256

    def store_path(
        self,
        name: str,
        references: Iterable[StorePath],
        *,
        refers_to_self: bool,
        store_dir: StoreDir,
    ) -> StorePath:
        """Return the store path that this content address gives.

        ``references`` are the path's references without itself. Raises :class:`InvalidData` where
        Nix has no path for such a combination.
        """
        paths = sorted(store_dir.format(path) for path in references)
        takes_references = self.method is not ContentAddressMethod.FLAT and self.is_sha256
        takes_self = takes_references and self.method is ContentAddressMethod.RECURSIVE
        if (paths and not takes_references) or (refers_to_self and not takes_self):
            raise InvalidData(f"a path with content address {self} cannot have such references")
        if self.method is ContentAddressMethod.TEXT:
            return _make_store_path(":".join(["text", *paths]), self.hash, name, store_dir)
        if takes_references:
            kind = ":".join(["source", *paths, *(["self"] if refers_to_self else [])])
            return _make_store_path(kind, self.hash, name, store_dir)
        return _make_store_path("output:out", self._fixed_output_hash(), name, store_dir)

    def _fixed_output_hash(self) -> Hash:
        recursive = "r:" if self.method is ContentAddressMethod.RECURSIVE else ""
        text = f"fixed:out:{recursive}{self.hash.algorithm}:{self.hash.base16()}:"
        return Hash(HashAlgorithm.SHA256, hashlib.sha256(text.encode()).digest())

    def __str__(self) -> str:
        return f"{self.method.value}{self.hash}"


def _make_store_path(kind: str, content: Hash, name: str, store_dir: StoreDir) -> StorePath:
    text = f"{kind}:{content.algorithm}:{content.base16()}:{store_dir.path}:{name}"
    digest = hashlib.sha256(text.encode()).digest()
    return StorePath(nix32_encode(compress_digest(digest, _HASH_PART_SIZE)), name)


class _HashModulo:
    """A hash of a stream in which one string is read as zeros.

    A path that refers to itself is named by such a hash, with its own hash part read as zeros.

    The positions of the zeros follow the stream as ``|<decimal number>`` each, so that zeros that
    stood there before make another hash. Nix 2.17 to 2.34 left the positions out by mistake
    (NixOS/nix issue 15837); content addresses that those made of such paths hold neither here nor
    in other versions of Nix.
    """

    def __init__(self, algorithm: HashAlgorithm, modulus: bytes) -> None:
        self._hash = algorithm.new()
        self._modulus = modulus
        self._tail = b""  # may be the beginning of the string
        self._position = 0  # of the tail, in the stream
        self._found: list[int] = []

    def update(self, data: bytes) -> None:
        size = len(self._modulus)
        data = self._tail + data
        start = data.find(self._modulus)
        while start >= 0:
            self._found.append(self._position + start)
            start = data.find(self._modulus, start + size)
        data = data.replace(self._modulus, bytes(size))
        done = max(len(data) - size + 1, 0)
        self._hash.update(data[:done])
        self._tail = data[done:]
        self._position += done

    def digest(self) -> bytes:
        self._hash.update(self._tail)
        for position in self._found:
            self._hash.update(b"|%d" % position)
        return self._hash.digest()


class ContentAddressCheck:
    """Checks a NAR against a content address while it streams.

    Give each piece of the NAR to :meth:`receive_nar` and each of its events to :meth:`receive`,
    then call :meth:`finish`. Which of the two is looked at depends on the content address.
    """

    def __init__(self, address: ContentAddress, self_reference: StorePath | None) -> None:
        self._address = address
        self._recursive = address.method is ContentAddressMethod.RECURSIVE
        algorithm = address.hash.algorithm
        self._hash = (
            algorithm.new()
            if self_reference is None
            else _HashModulo(algorithm, self_reference.hash_part.encode())
        )

    def receive_nar(self, data: bytes) -> None:
        """Take the next piece of the NAR."""
        if self._recursive:
            self._hash.update(data)

    def receive(self, event: NarEvent) -> None:
        """Take the next event.

        Raises :class:`ContentMismatch` where the NAR is not one plain file but must be.
        """
        if self._recursive:
            return
        match event:
            case RegularFile(b"", executable=False):
                pass
            case FileData(data):
                self._hash.update(data)
            case DirectoryStart() | RegularFile() | Symlink():
                raise ContentMismatch(
                    f"content address {self._address} is of a file that is not executable,"
                    f" the NAR holds {type(event).__name__}"
                )

    def finish(self) -> None:
        """Compare; raises :class:`ContentMismatch`."""
        found = Hash(self._address.hash.algorithm, self._hash.digest())
        if found != self._address.hash:
            raise ContentMismatch(
                f"content address is {self._address}, but the contents have {found}"
            )
