"""Image references that name a store path: ``nix:0/nix/store/<hash part>-<name>[:tag][@digest]``.

The form is nix-snapshotter's (``docs/architecture.md`` there): a host that no registry can have, port 0, and the store
path. Where a container's image may be written, so may it: a reference is domain, path, tag and digest as Docker's
grammar has them (``reference.go`` of github.com/distribution/reference), and the store path is domain and path. What a
store path may be called that this grammar has no word for (capitals, ``+``, ``=``, ``?``, a dot at the end) is spelled
with what it has. The hash part decides which path is meant, and may stand alone; the name is there for people, and must
be the path's own as far as it can be spelled.

A store path never changes, so a tag says nothing, and any is taken: clients put ``:latest`` behind what has none. A
digest is that of the image's manifest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from fusesnap.errors import InvalidArgument, InvalidData
from fusesnap.images.digest import Digest
from fusesnap.nix.quoting import quote
from fusesnap.nix.store_path import (
    HASH_PART_LENGTH,
    MAX_NAME_LENGTH,
    HashPart,
    StoreDir,
    StorePath,
)

DOMAIN: Final = "nix:0"
# The grammar's own limit is 255 for domain and path; what stands behind them is bounded too.
MAX_REFERENCE: Final = 255 + len(":") + 128 + len("@sha512:") + 128

_TAG: Final = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]{0,127}", re.ASCII)
# Words of a path's component, and what may stand between two of them.
_SEPARATOR: Final = re.compile(r"\.|_|__|-+", re.ASCII)
_ANY_SEPARATOR: Final = r"(?:\.|__?|-+)?"
_WORDS: Final = re.compile(r"[0-9A-Za-z]+", re.ASCII)
_SPELLED: Final = re.compile(rf"[0-9A-Za-z+\-._?=]{{1,{MAX_NAME_LENGTH}}}", re.ASCII)


@dataclass(frozen=True, slots=True)
class NixReference:
    """A reference to the image that a store path is, or that is made of it.

    ``spelling`` is what the reference calls the path, None where it has the hash part
    alone. ``tag`` means nothing; ``digest`` is what the image's manifest must have. :func:`parse_reference` makes one.
    """

    hash_part: HashPart
    spelling: str | None
    tag: str | None
    digest: Digest | None
    store_dir: StoreDir

    def check(self, path: StorePath) -> None:
        """Raise :class:`InvalidArgument` unless ``path``, which has the hash part, may be spelled as this spells it."""
        if not self.hash_part.is_of(path):
            raise InvalidArgument(f"{self}: expected the store path of that hash, got {path}")
        if self.spelling is not None and not may_be_spelled(path.name, self.spelling):
            raise InvalidArgument(
                f"{self}: the store path of that hash is {path.base_name}, which is not called"
                f" {quote(self.spelling)}; write {reference_of(path, self.store_dir)}"
            )

    @property
    def name(self) -> str:
        """The reference without tag and digest."""
        spelling = f"-{self.spelling}" if self.spelling is not None else ""
        return f"{DOMAIN}{self.store_dir}/{self.hash_part}{spelling}"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag is not None else ""
        digest = f"@{self.digest}" if self.digest is not None else ""
        return f"{self.name}{tag}{digest}"


def parse_reference(text: str, store_dir: StoreDir) -> NixReference | None:
    """Read a reference; None for one that is not ours, whatever it is.

    Raises :class:`InvalidArgument` for what begins with ``nix:0/`` and is not followed by a store path of
    ``store_dir``: no registry has that name, so nobody else could answer it.
    """
    if not text.startswith(f"{DOMAIN}/"):
        return None
    if len(text) > MAX_REFERENCE:
        raise InvalidArgument(
            f"image reference {quote(text)}: expected at most {MAX_REFERENCE} characters, got {len(text)}"
        )
    name, _, digest = text.removeprefix(DOMAIN).partition("@")
    path, colon, tag = name.partition(":")
    try:
        hash_part, spelling = _store_path(path, store_dir)
        return NixReference(
            hash_part,
            spelling,
            _tag(tag) if colon else None,
            Digest.parse(digest) if "@" in text else None,
            store_dir,
        )
    except InvalidData as error:
        raise InvalidArgument(
            f"image reference {quote(text, 160)}: expected {DOMAIN}{store_dir}/<hash>-<name>: {error}"
        ) from error


def reference_of(path: StorePath, store_dir: StoreDir) -> str:
    """Return a reference to ``path`` that every client can read: its name is spelled as far as that goes.

    The hash part alone stands where nothing of the name is left, or it would be too long.
    """
    words = _WORDS.findall(path.name)
    between = _WORDS.split(path.name)[1:-1]
    separators = [run if _SEPARATOR.fullmatch(run) else "-" for run in between]
    # A name may have no words at all, and then nothing between them.
    pairs = zip(words, [*separators, ""][: len(words)], strict=True)
    spelling = "".join(word.lower() + separator for word, separator in pairs)
    reference = f"{DOMAIN}{store_dir}/{path.hash_part}"
    full = f"{reference}-{spelling}"
    return full if spelling and len(full) <= 255 else reference  # noqa: PLR2004 (as for MAX_REFERENCE)


def may_be_spelled(name: str, spelling: str) -> bool:
    """Say whether ``spelling`` differs from a store path's ``name`` only where a reference cannot spell it.

    A capital may be a small letter. What stands between two words may be any separator, or none, if it is not one
    itself; at the ends of the name only separators that are legal there count.
    """
    return spelling == name or re.fullmatch(_pattern(name), spelling) is not None


def _pattern(name: str) -> str:
    words = _WORDS.findall(name)
    runs = _WORDS.split(name)
    if not words:
        return re.escape(name)
    spelled = "".join(
        _word(word) + _run(run) for word, run in zip(words, [*runs[1:-1], ""], strict=True)
    )
    # Before the first word stands the hyphen behind the hash part; behind the last one nothing may.
    first = f"(?:{re.escape(runs[0])}|-*)" if runs[0] else ""
    last = f"(?:{re.escape(runs[-1])})?" if runs[-1] else ""
    return first + spelled + last


def _word(word: str) -> str:
    return "".join(f"[{letter}{letter.lower()}]" if letter.isupper() else letter for letter in word)


def _run(run: str) -> str:
    if not run or _SEPARATOR.fullmatch(run):
        return re.escape(run)
    return f"(?:{re.escape(run)}|{_ANY_SEPARATOR})"


def _store_path(path: str, store_dir: StoreDir) -> tuple[HashPart, str | None]:
    base_name = path.removeprefix(f"{store_dir}/")
    if base_name == path:
        raise InvalidData(f"{quote(path)} is not in {store_dir}")
    hash_part, hyphen, spelling = (
        base_name[:HASH_PART_LENGTH],
        base_name[HASH_PART_LENGTH : HASH_PART_LENGTH + 1],
        base_name[HASH_PART_LENGTH + 1 :],
    )
    checked = HashPart(hash_part)
    if hyphen not in ("", "-") or (hyphen and not _SPELLED.fullmatch(spelling)):
        raise InvalidData(
            f"expected nothing or '-' and a name behind the hash, got {quote(hyphen + spelling)}"
        )
    return checked, spelling if hyphen else None


def _tag(text: str) -> str:
    if not _TAG.fullmatch(text):
        raise InvalidData(f"{quote(text)} is not a tag")
    return text
