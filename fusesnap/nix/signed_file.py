"""The beginning that all signed files of ours have: what it is, by whose key, and the signature.

Source: docs/formats.md: a magic word, a byte with the version, a byte with the length of the key's name, that name, and
64 bytes of ed25519 signature over everything before it and everything behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fusesnap.errors import InvalidData, UntrustedPath
from fusesnap.nix.quoting import quote
from fusesnap.nix.signature import SIGNATURE_SIZE, SecretKey, Signature, TrustedKeys

_LONGEST_NAME: Final = 255  # its length is one byte


@dataclass(frozen=True, slots=True)
class SignedFile:
    """One sort of them: ``what`` it is called in messages, its ``magic``, and the ``version`` that is known."""

    what: str
    magic: bytes
    version: int

    def sign(self, content: bytes, key: SecretKey) -> bytes:
        """The beginning of a file, with the signature; ``content`` is what is signed of the rest.

        Raises :class:`InvalidData` for a key whose name is too long.
        """
        name = key.name.encode()
        if not 0 < len(name) <= _LONGEST_NAME:
            raise InvalidData(
                f"name of key {quote(name)} has {len(name)} bytes, expected 1 to {_LONGEST_NAME}"
            )
        start = self.magic + bytes((self.version, len(name))) + name
        return start + key.sign(start + content).signature

    def content_start(self, data: bytes | bytearray) -> int | None:
        """Where the signature ends in a file that begins with ``data``; None where that cannot be said yet.

        Raises :class:`InvalidData` where it is another sort of file, or of another version.
        """
        found = bytes(data[: len(self.magic)])
        if not self.magic.startswith(found):
            raise InvalidData(
                f"{self.what} begins with {quote(found)}, expected {quote(self.magic)}"
            )
        if len(data) < self._fixed_size:
            return None
        version, name_length = data[len(self.magic) : self._fixed_size]
        if version != self.version:
            raise InvalidData(f"{self.what} has version {version}, expected {self.version}")
        return self._fixed_size + name_length + SIGNATURE_SIZE

    def verified(self, data: bytes, keys: TrustedKeys) -> bytes:
        """What follows the signature in ``data``, which is all that is signed, once that is known to be good.

        Raises :class:`UntrustedPath` where none of ``keys`` has made it, and :class:`InvalidData`.
        """
        end = self.content_start(data)
        if end is None:
            raise InvalidData(f"{self.what} is cut short after {len(data)} bytes")
        start, content = data[: end - SIGNATURE_SIZE], data[end:]
        name = start[self._fixed_size :].decode("utf-8", "backslashreplace")
        signature = Signature(name, data[len(start) : end])
        named = keys.named(name)
        if not named:
            raise UntrustedPath(f"{self.what} is signed by {quote(name)}, not trusted")
        if not any(key.verify(start + content, signature) for key in named):
            raise UntrustedPath(f"{self.what}: the signature by trusted key {quote(name)} is wrong")
        return content

    @property
    def _fixed_size(self) -> int:
        return len(self.magic) + 2
