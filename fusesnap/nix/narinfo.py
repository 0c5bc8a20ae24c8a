"""narinfo: what a binary cache says of one store path.

Source: ``src/libstore/nar-info.cc`` of Nix. Lines of ``Name: value``, each ended by a line feed.
Nix lets the last of two equal fields win; here the second is refused, because two readers that
choose differently would trust different things.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeVar
from urllib.parse import unquote

from fusesnap.errors import InvalidData
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.quoting import quote
from fusesnap.nix.signature import Signature
from fusesnap.nix.store_path import StoreDir, StorePath

# The only long line is References: a base name has at most 244 characters, so that 1 MiB holds more
# than 4,000 references of the longest names, several times what the largest paths of nixpkgs have.
MAX_NARINFO_SIZE: Final = 1024 * 1024
# One signature a key that vouches; each that names a trusted key costs a verification.
MAX_SIGNATURES: Final = 128
# Bytes of most narinfos, and how many as small as that are kept parsed: those of a closure, in some 8 MB.
_USUAL_SIZE: Final = 4096
_KEPT: Final = 2048
# Nix keeps sizes in signed 64-bit columns.
MAX_SIZE: Final = 2**63 - 1

T = TypeVar("T")

_UNPRINTABLE: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_FIELD_NAME: Final = re.compile(r"[0-9A-Za-z_-]+", re.ASCII)
_DIGITS: Final = re.compile(r"[0-9]{1,19}", re.ASCII)
_COMPRESSION: Final = re.compile(r"[0-9a-z]{1,32}", re.ASCII)
_ABSOLUTE_URL: Final = re.compile(r"https?://[^/?#]", re.ASCII | re.IGNORECASE)
_SCHEME: Final = re.compile(r"[A-Za-z][0-9A-Za-z+.-]*:", re.ASCII)

_SINGLE_FIELDS: Final = (
    "StorePath", "URL", "Compression", "FileHash", "FileSize", "NarHash", "NarSize", "References", "Deriver", "System",
    "CA",
)  # fmt: skip
_REQUIRED_FIELDS: Final = ("StorePath", "URL", "NarHash", "NarSize")


@dataclass(frozen=True, slots=True)
class NarInfo:
    """One store path as a binary cache offers it.

    ``url`` is relative to the cache, or absolute with http or https. ``file_hash`` and
    ``file_size`` (bytes) describe the compressed file, ``nar_hash`` (SHA-256) and ``nar_size``
    (bytes) the NAR in it. ``references`` are sorted and unique. ``ca`` is the content address in
    Nix's text form. ``unknown`` holds fields of other names in the order in which they came.
    Nothing in here is trusted before :func:`fusesnap.nix.trust.check_trust` says so.
    """

    store_path: StorePath
    url: str
    compression: str
    file_hash: Hash | None
    file_size: int | None
    nar_hash: Hash
    nar_size: int
    references: tuple[StorePath, ...]
    deriver: StorePath | None
    system: str | None
    signatures: tuple[Signature, ...]
    ca: str | None
    unknown: tuple[tuple[str, str], ...]
    store_dir: StoreDir

    def fingerprint(self) -> bytes:
        """Return what signatures are made over: store path, NAR hash, NAR size and references."""
        references = ",".join(self.store_dir.format(path) for path in self.references)
        path = self.store_dir.format(self.store_path)
        return f"1;{path};{self.nar_hash};{self.nar_size};{references}".encode()

    def to_text(self) -> str:
        """Return the narinfo as Nix writes it, unknown fields last."""
        return "".join(f"{name}: {value}\n" for name, value in self._fields())

    def _fields(self) -> Iterator[tuple[str, str]]:
        yield "StorePath", self.store_dir.format(self.store_path)
        yield "URL", self.url
        yield "Compression", self.compression
        if self.file_hash is not None:
            yield "FileHash", str(self.file_hash)
        if self.file_size is not None:
            yield "FileSize", str(self.file_size)
        yield "NarHash", str(self.nar_hash)
        yield "NarSize", str(self.nar_size)
        yield "References", " ".join(path.base_name for path in self.references)
        if self.deriver is not None:
            yield "Deriver", self.deriver.base_name
        if self.system is not None:
            yield "System", self.system
        for signature in self.signatures:
            yield "Sig", str(signature)
        if self.ca is not None:
            yield "CA", self.ca
        yield from self.unknown


def parse_narinfo(data: bytes, store_dir: StoreDir) -> NarInfo:
    """Read a narinfo of a cache whose store directory is ``store_dir``.

    Raises :class:`InvalidData` naming the field.
    """
    # Who fetches a path meets with its narinfo several times: from its cache, on disk, and in our database.
    return _parsed_of_late(data, store_dir) if len(data) <= _USUAL_SIZE else _parse(data, store_dir)


def _parse(data: bytes, store_dir: StoreDir) -> NarInfo:
    single: dict[str, str] = {}
    signatures: list[str] = []
    unknown: list[tuple[str, str]] = []
    for name, value in _lines(data):
        if name == "Sig":
            signatures.append(value)
        elif name not in _SINGLE_FIELDS:
            unknown.append((name, value))
        elif name in single:
            raise InvalidData(f"narinfo: field {name} comes twice")
        else:
            single[name] = value
    missing = [name for name in _REQUIRED_FIELDS if name not in single]
    if missing:
        raise InvalidData(f"narinfo: field {' and '.join(missing)} missing")
    return NarInfo(
        store_path=_field(single, "StorePath", store_dir.parse),
        url=_field(single, "URL", parse_url),
        compression=_field(single, "Compression", _parse_compression, "bzip2"),
        file_hash=_optional(single, "FileHash", Hash.parse),
        # Nix prints and reads an unknown size as 0.
        file_size=_optional(single, "FileSize", parse_size) or None,
        nar_hash=_field(single, "NarHash", _parse_nar_hash),
        nar_size=_field(single, "NarSize", _parse_nar_size),
        references=_field(single, "References", _parse_references, ""),
        deriver=_optional(single, "Deriver", _parse_deriver),
        system=single.get("System"),
        signatures=_parse_signatures(signatures),
        ca=single.get("CA") or None,
        unknown=tuple(unknown),
        store_dir=store_dir,
    )


_parsed_of_late = lru_cache(maxsize=_KEPT)(_parse)


def _lines(data: bytes) -> Iterator[tuple[str, str]]:
    """Split into names and values."""
    text = _decode(data)
    if text and not text.endswith("\n"):
        raise InvalidData("narinfo: the last line is cut short (no line feed at its end)")
    for number, line in enumerate(text.split("\n")[:-1], 1):
        name, separator, value = line.partition(": ")
        if not separator or not _FIELD_NAME.fullmatch(name):
            raise InvalidData(f"narinfo: line {number} is {quote(line)}, expected 'Name: value'")
        yield name, value


def _decode(data: bytes) -> str:
    if len(data) > MAX_NARINFO_SIZE:
        raise InvalidData(f"narinfo: {len(data)} bytes, expected at most {MAX_NARINFO_SIZE}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidData(f"narinfo: binary, byte {error.start} is not UTF-8") from None
    unprintable = _UNPRINTABLE.search(text)
    if unprintable:
        raise InvalidData(f"narinfo: binary, character {unprintable.start()} is {unprintable[0]!r}")
    return text


def _field(fields: dict[str, str], name: str, parse: Callable[[str], T], default: str = "") -> T:
    """Parse a field; an error names it."""
    try:
        return parse(fields.get(name, default))
    except InvalidData as error:
        raise InvalidData(f"narinfo: field {name}: {error}") from error


def _optional(fields: dict[str, str], name: str, parse: Callable[[str], T]) -> T | None:
    return _field(fields, name, parse) if name in fields else None


def parse_url(text: str) -> str:
    """Check a URL that is to be joined to a cache's own; raises :class:`InvalidData`.

    It must not lead out of the cache's directory.
    """
    if not text:
        raise InvalidData("empty")
    if re.search(r"[\s\\]", text):
        raise InvalidData(f"{quote(text)} has a space or a backslash")
    if _ABSOLUTE_URL.match(text):
        return text
    if text.startswith("/") or _SCHEME.match(text):
        raise InvalidData(f"{quote(text)} is neither relative to the cache nor http or https")
    path = unquote(re.split("[?#]", text, maxsplit=1)[0])
    if ".." in path.split("/") or not path.isprintable():
        raise InvalidData(f"{quote(text)} has a segment '..' or unprintable characters")
    return text


def _parse_compression(text: str) -> str:
    # As Nix: a narinfo of old that does not say how its file is compressed means bzip2.
    name = text or "bzip2"
    if not _COMPRESSION.fullmatch(name):
        raise InvalidData(f"{quote(text)} is not the name of a compression")
    return name


def parse_size(text: str) -> int:
    """Read a number of bytes; raises :class:`InvalidData`."""
    if not _DIGITS.fullmatch(text) or int(text) > MAX_SIZE:
        raise InvalidData(f"{quote(text)} is not a number of bytes from 0 to {MAX_SIZE}")
    return int(text)


def _parse_nar_size(text: str) -> int:
    size = parse_size(text)
    if size == 0:
        raise InvalidData("0, but no NAR is empty")
    return size


def _parse_nar_hash(text: str) -> Hash:
    parsed = Hash.parse(text)
    if parsed.algorithm is not HashAlgorithm.SHA256:
        raise InvalidData(f"{quote(text)} is {parsed.algorithm}, expected sha256")
    return parsed


def _parse_references(text: str) -> tuple[StorePath, ...]:
    return tuple(sorted({StorePath.parse_base_name(word) for word in text.split(" ") if word}))


def _parse_deriver(text: str) -> StorePath | None:
    return None if text == "unknown-deriver" else StorePath.parse_base_name(text)


def _parse_signatures(texts: Iterable[str]) -> tuple[Signature, ...]:
    unique = dict.fromkeys(texts)
    if len(unique) > MAX_SIGNATURES:
        raise InvalidData(f"narinfo: {len(unique)} signatures, expected at most {MAX_SIGNATURES}")
    try:
        return tuple(Signature.parse(text) for text in unique)
    except InvalidData as error:
        raise InvalidData(f"narinfo: field Sig: {error}") from error
