"""Ed25519 signatures and keys in Nix's text form ``<key name>:<base 64>``.

Source: Nix manual, ``nix key``; ``src/libutil/signature/local-keys.cc`` of Nix. A secret key holds
64 bytes: the seed (32 bytes) and the public key (32 bytes).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from fusesnap.errors import InvalidData
from fusesnap.nix.quoting import quote

SIGNATURE_SIZE: Final = 64
PUBLIC_KEY_SIZE: Final = 32
SECRET_KEY_SIZE: Final = 64
_SEED_SIZE: Final = 32

# A key's name stands in narinfos, in configuration and on command lines, where whitespace
# separates.
_KEY_NAME: Final = re.compile(r"[^\x00-\x20\x7f:]+")


def _parse_named(text: str, what: str) -> tuple[str, bytes]:
    name, separator, encoded = text.partition(":")
    if not separator or not _KEY_NAME.fullmatch(name):
        raise InvalidData(f"{what} is not of the form <key name>:<base 64>")
    try:
        return name, base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidData(f"{what} of key {quote(name)} is not in base 64") from None


def _format_named(name: str, data: bytes) -> str:
    return f"{name}:{base64.b64encode(data).decode('ascii')}"


def _check_size(what: str, name: str, data: bytes, size: int) -> None:
    if len(data) != size:
        raise InvalidData(f"{what} {quote(name)} has {len(data)} bytes, expected {size}")


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature and the name of the key that made it.

    The length is not checked here: a path may also carry signatures of kinds that Nix does not know
    yet, and they count for nothing, but must not make the others void.
    """

    key_name: str
    signature: bytes

    @classmethod
    def parse(cls, text: str) -> Signature:
        """Read ``<key name>:<base 64>``; raises :class:`InvalidData`."""
        return cls(*_parse_named(text, f"signature {quote(text)}"))

    def __str__(self) -> str:
        return _format_named(self.key_name, self.signature)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that verifies (32 bytes)."""

    name: str
    key: bytes

    def __post_init__(self) -> None:
        _check_size("public key", self.name, self.key, PUBLIC_KEY_SIZE)

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read ``<key name>:<base 64>``; raises :class:`InvalidData`."""
        return cls(*_parse_named(text, f"public key {quote(text)}"))

    def verify(self, message: bytes, signature: Signature) -> bool:
        """Tell whether ``signature`` was made over ``message`` by this key."""
        if signature.key_name != self.name or len(signature.signature) != SIGNATURE_SIZE:
            return False
        try:
            VerifyKey(self.key).verify(message, signature.signature)
        except BadSignatureError:
            return False
        return True

    def __str__(self) -> str:
        return _format_named(self.name, self.key)


@dataclass(frozen=True, slots=True)
class SecretKey:
    """A key that signs: seed and public key, 64 bytes. ``str()`` gives the secret away, ``repr()``
    does not.
    """

    name: str
    seed_and_key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_size("secret key", self.name, self.seed_and_key, SECRET_KEY_SIZE)
        if bytes(self._signing_key().verify_key) != self.seed_and_key[_SEED_SIZE:]:
            raise InvalidData(f"secret key {quote(self.name)}: its public half is of another key")

    @classmethod
    def parse(cls, text: str) -> SecretKey:
        """Read ``<key name>:<base 64>``.

        Raises :class:`InvalidData`, whose message does not show the key.
        """
        return cls(*_parse_named(text.strip(), "secret key"))

    def sign(self, message: bytes) -> Signature:
        """Sign ``message``."""
        return Signature(self.name, self._signing_key().sign(message).signature)

    def public_key(self) -> PublicKey:
        """Return the key that verifies what this one signs."""
        return PublicKey(self.name, self.seed_and_key[_SEED_SIZE:])

    def _signing_key(self) -> SigningKey:
        return SigningKey(self.seed_and_key[:_SEED_SIZE])

    def __str__(self) -> str:
        return _format_named(self.name, self.seed_and_key)


@dataclass(frozen=True, slots=True)
class TrustedKeys:
    """The keys whose signatures count.

    Several keys may share a name, as while one is being replaced.
    """

    keys: tuple[PublicKey, ...]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> TrustedKeys:
        """Read public keys, one a text; raises :class:`InvalidData`."""
        return cls(tuple(PublicKey.parse(text) for text in texts))

    def named(self, name: str) -> tuple[PublicKey, ...]:
        """Return the keys called ``name``."""
        return tuple(key for key in self.keys if key.name == name)
