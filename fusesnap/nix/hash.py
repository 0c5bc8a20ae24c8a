"""Hashes in the spellings that Nix reads and prints.

Source: Nix manual, "Store object content addressing"; ``src/libutil/hash.cc`` of Nix. A digest is
written in base 16, in Nix's own base 32 ("nix32": little-endian, the most significant digit first,
without e, o, u and t), or in base 64; with the algorithm in front as ``sha256:<digest>``, or as a
Subresource Integrity string ``sha256-<base64>``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from fusesnap.errors import InvalidData
from fusesnap.nix.quoting import quote

if TYPE_CHECKING:
    from hashlib import _Hash

NIX32_ALPHABET: Final = "0123456789abcdfghijklmnpqrsvwxyz"
_PYTHON_DIGITS: Final = "0123456789abcdefghijklmnopqrstuv"
_NIX32_TO_PYTHON: Final = str.maketrans(NIX32_ALPHABET, _PYTHON_DIGITS)
_RFC4648_TO_NIX32: Final = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", NIX32_ALPHABET)
_NIX32_TEXT: Final = re.compile(f"[{NIX32_ALPHABET}]*", re.ASCII)
_BASE16_TEXT: Final = re.compile("[0-9a-fA-F]*", re.ASCII)


class HashAlgorithm(StrEnum):
    """The algorithms that Nix names."""

    MD5 = "md5"
    SHA1 = "sha1"
    SHA256 = "sha256"
    SHA512 = "sha512"

    @property
    def digest_size(self) -> int:
        """Bytes in a digest."""
        return _DIGEST_SIZES[self]

    def new(self) -> _Hash:
        """Return a fresh hash object of :mod:`hashlib`."""
        # md5 and sha1 name fixed outputs of old; a build of OpenSSL for FIPS refuses them
        # otherwise.
        return hashlib.new(self.value, usedforsecurity=False)

    @classmethod
    def parse(cls, text: str) -> HashAlgorithm:
        """Return the algorithm called ``text``; raises :class:`InvalidData`."""
        try:
            return cls(text)
        except ValueError:
            raise InvalidData(
                f"hash algorithm is {quote(text)}, expected one of {', '.join(cls)}"
            ) from None


_DIGEST_SIZES: Final = {
    HashAlgorithm.MD5: 16,
    HashAlgorithm.SHA1: 20,
    HashAlgorithm.SHA256: 32,
    HashAlgorithm.SHA512: 64,
}


def _nix32_length(size: int) -> int:
    return (size * 8 + 4) // 5


def nix32_encode(data: bytes) -> str:
    """Return ``data`` in Nix's base 32."""
    # The digits of a number whose last byte comes first; RFC 4648's begin with the first byte, in groups of 5.
    number = bytes(-len(data) % 5) + data[::-1]
    digits = base64.b32encode(number).decode("ascii").translate(_RFC4648_TO_NIX32)
    return digits[len(digits) - _nix32_length(len(data)) :]


def nix32_decode(text: str) -> bytes:
    """Return the bytes that ``text`` spells in Nix's base 32; raises :class:`InvalidData`."""
    if not _NIX32_TEXT.fullmatch(text):
        raise InvalidData(f"{quote(text)} has characters that are not in Nix's base 32")
    size = len(text) * 5 // 8
    number = int(text.translate(_NIX32_TO_PYTHON), 32) if text else 0
    if _nix32_length(size) != len(text) or number.bit_length() > size * 8:
        raise InvalidData(f"{quote(text)} is not a whole number of bytes in Nix's base 32")
    return number.to_bytes(size, "little")


def compress_digest(digest: bytes, size: int) -> bytes:
    """Fold ``digest`` to ``size`` bytes by exclusive or.

    So Nix makes the hash part of a store path (``compressHash``).
    """
    folded = bytearray(size)
    for position, byte in enumerate(digest):
        folded[position % size] ^= byte
    return bytes(folded)


@dataclass(frozen=True, slots=True)
class Hash:
    """A digest and the algorithm that made it."""

    algorithm: HashAlgorithm
    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != self.algorithm.digest_size:
            raise InvalidData(
                f"{self.algorithm} digest has {len(self.digest)} bytes,"
                f" expected {self.algorithm.digest_size}"
            )

    @classmethod
    def parse(cls, text: str, algorithm: HashAlgorithm | None = None) -> Hash:
        """Read a hash in any spelling of Nix.

        ``text`` is ``<algorithm>:<base 16, nix32 or base 64>``, ``<algorithm>-<base 64>``, or a
        bare digest where ``algorithm`` is given. A prefix that contradicts ``algorithm`` is
        refused. Raises :class:`InvalidData`.
        """
        prefix, separator, digest = text.partition(":")
        if not separator:
            prefix, separator, digest = text.partition("-")
        if not separator:
            if algorithm is None:
                raise InvalidData(f"hash {quote(text)} does not say its algorithm")
            return cls(algorithm, _decode_bare(text, algorithm))
        named = HashAlgorithm.parse(prefix)
        if algorithm not in (None, named):
            raise InvalidData(f"hash {quote(text)} is {named}, expected {algorithm}")
        if separator == "-":
            return cls(named, _decode_base64(digest, named))
        return cls(named, _decode_bare(digest, named))

    def base16(self) -> str:
        """Return the digest in lower-case hexadecimal digits."""
        return self.digest.hex()

    def nix32(self) -> str:
        """Return the digest in Nix's base 32."""
        return nix32_encode(self.digest)

    def base64(self) -> str:
        """Return the digest in padded base 64."""
        return base64.b64encode(self.digest).decode("ascii")

    def sri(self) -> str:
        """Return ``<algorithm>-<base 64>``."""
        return f"{self.algorithm}-{self.base64()}"

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.nix32()}"


def _decode_bare(text: str, algorithm: HashAlgorithm) -> bytes:
    """Decode a digest whose spelling shows in its length, as Nix tells them apart."""
    size = algorithm.digest_size
    lengths = {size * 2: "base 16", _nix32_length(size): "nix32", (size + 2) // 3 * 4: "base 64"}
    match lengths.get(len(text)):
        case "base 16":
            if not _BASE16_TEXT.fullmatch(text):
                raise InvalidData(f"{algorithm} hash {quote(text)} is not in base 16")
            return bytes.fromhex(text)
        case "nix32":
            return nix32_decode(text)
        case "base 64":
            return _decode_base64(text, algorithm)
    expected = ", ".join(f"{length} ({spelling})" for length, spelling in lengths.items())
    raise InvalidData(
        f"{algorithm} hash {quote(text)} has {len(text)} characters, expected {expected}"
    )


def _decode_base64(text: str, algorithm: HashAlgorithm) -> bytes:
    """Decode padded base 64. Only the one canonical spelling of a digest is taken."""
    try:
        digest = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidData(f"{algorithm} hash {quote(text)} is not in base 64") from None
    if len(digest) != algorithm.digest_size:
        raise InvalidData(
            f"{algorithm} hash {quote(text)} has {len(digest)} bytes, expected {algorithm.digest_size}"
        )
    if base64.b64encode(digest).decode("ascii") != text:
        raise InvalidData(f"{algorithm} hash {quote(text)} is not in canonical base 64")
    return digest
