from __future__ import annotations

import hashlib
import os
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import ContentMismatch, InvalidData, UntrustedPath
from fusesnap.nix.api import startup_bundle_pb2 as api
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.startup_bundle import (
    MAGIC,
    MAX_EXTENT_SIZE,
    MAX_HEADER_SIZE,
    BundleEvent,
    BundleHeader,
    BundleParser,
    ReadyExtent,
    file_name,
    root_file_name,
    write_bundle,
)
from fusesnap.nix.store_path import StoreDir

from ..substituter.samples import KEY, TRUSTED, secret_key
from .bundles import GLIBC, HELLO, header, parsed

EVERY_BYTE = bool(os.environ.get("FUSESNAP_EVERY_BYTE"))  # set by scripts/check-every-byte

parts = st.lists(
    st.tuples(st.sampled_from([HELLO, GLIBC]), st.integers(0, 1 << 39), st.binary(min_size=1)),
    max_size=6,
)


def parser(keys: TrustedKeys = TRUSTED) -> BundleParser:
    return BundleParser(keys, StoreDir())


def written() -> bytes:
    head, contents = header((HELLO, 16_384, b"a" * 300), (GLIBC, 0, b"b" * 50), (HELLO, 7, b"c"))
    return write_bundle(head, contents, KEY, StoreDir())


def signed(message: api.StartupBundle, stream: bytes = b"") -> bytes:
    """A file whose message is not one that we would write."""
    body = zstandard.compress(message.SerializeToString())
    start = MAGIC + bytes((1, len(KEY.name))) + KEY.name.encode()
    length = len(body).to_bytes(4, "little")
    return start + KEY.sign(start + length + body).signature + length + body + stream


def message_of(data: bytes) -> tuple[api.StartupBundle, bytes]:
    """The message of a file that we have written, and its stream."""
    place = len(MAGIC) + 2 + len(KEY.name) + 64
    length = int.from_bytes(data[place : place + 4], "little")
    body = data[place + 4 : place + 4 + length]
    return api.StartupBundle.FromString(zstandard.decompress(body)), data[place + 4 + length :]


@given(parts, st.data())
def test_what_is_written_is_read_however_it_comes(
    given_parts: list[tuple[object, int, bytes]], data: st.DataObject
) -> None:
    head, contents = header(*given_parts)  # type: ignore[arg-type]
    file = write_bundle(head, contents, KEY, StoreDir())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(file)), max_size=4)))
    edges = [0, *cuts, len(file)]
    pieces = [file[start:end] for start, end in pairwise(edges)]
    first, *rest = parsed(parser(), *pieces)
    assert isinstance(first, BundleHeader)
    assert replace(first, stream_size=0, stream_digest=b"") == head
    assert rest == [
        ReadyExtent(extent, content) for extent, content in zip(head.extents, contents, strict=True)
    ]


def test_an_extent_is_given_before_the_rest_has_come() -> None:
    noise = random.Random(1).randbytes(4 * MAX_EXTENT_SIZE)  # noqa: S311 - not for secrets
    sizes = range(0, len(noise), MAX_EXTENT_SIZE)
    head, contents = header(*((HELLO, at, noise[at : at + MAX_EXTENT_SIZE]) for at in sizes))
    file = write_bundle(head, contents, KEY, StoreDir())
    early = list(parser().feed(file[: len(file) // 2]))
    assert 2 <= len(early) <= 3
    assert early[1] == ReadyExtent(head.extents[0], contents[0])


def test_no_flipped_bit_goes_unnoticed() -> None:
    """One bit of every byte; all of them with ``scripts/check-every-byte``. What came before the end was right."""
    data = written()
    right = parsed(parser(), data)
    for place in range(len(data)):
        for bit in range(8) if EVERY_BYTE else (place % 8,):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            got: list[BundleEvent] = []
            with pytest.raises((InvalidData, UntrustedPath)):
                read_into(got, bytes(flipped))
            assert got == right[: len(got)]


def read_into(got: list[BundleEvent], data: bytes) -> None:
    """Read a file; what came before an error is kept."""
    reading = parser()
    for event in reading.feed(data):
        got.append(event)  # noqa: PERF402 - what came before an error counts
    reading.finish()


def test_no_bundle_that_is_cut_short_or_too_long_goes_unnoticed() -> None:
    data = written()
    for wrong in (*(data[:size] for size in range(len(data))), data + b"\0"):
        with pytest.raises((InvalidData, UntrustedPath)):
            parsed(parser(), wrong)


def test_a_key_that_is_not_trusted_counts_for_nothing() -> None:
    with pytest.raises(UntrustedPath, match="signed by 'key-1', not trusted"):
        parsed(parser(TrustedKeys((secret_key("other").public_key(),))), written())


def test_another_key_of_the_same_name() -> None:
    other = replace(secret_key("other").public_key(), name=KEY.name)
    with pytest.raises(UntrustedPath, match="signature by trusted key"):
        parsed(parser(TrustedKeys((other,))), written())


def test_a_header_that_is_too_large_is_not_waited_for() -> None:
    place = len(MAGIC) + 2 + len(KEY.name) + 64
    large = (MAX_HEADER_SIZE + 1).to_bytes(4, "little")
    with pytest.raises(InvalidData, match="expected at most"):
        list(parser().feed(written()[:place] + large))


def test_what_is_no_bundle() -> None:
    with pytest.raises(InvalidData, match="begins with"):
        list(parser().feed(b"<html>"))
    with pytest.raises(InvalidData, match="version 2, expected 1"):
        list(parser().feed(MAGIC + b"\x02\x01"))


def test_a_stream_of_other_bytes() -> None:
    message, _ = message_of(written())
    for content, error in (
        (b"a" * 299 + b"x" + b"b" * 50 + b"c", ContentMismatch),
        (b"a" * 300 + b"b" * 50 + b"cd", InvalidData),
        (b"a" * 300 + b"b" * 50, InvalidData),
    ):
        stream = zstandard.compress(content)
        message.stream_size = len(stream)
        message.stream_hash = hashlib.sha256(stream).digest()
        with pytest.raises(error):
            parsed(parser(), signed(message, stream))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.narinfos.pop(), "of a path that is not in it|narinfos are of"),
        (lambda m: m.narinfos.append(m.narinfos[0]), "sorted by path, each once"),
        (lambda m: m.indexes.pop(), "indexes of"),
        (lambda m: m.extents.indexes.__setitem__(0, 9), "index that is not in it"),
        (lambda m: m.extents.sizes.__setitem__(0, 0), "0 bytes from"),
        (lambda m: m.extents.sizes.__setitem__(0, MAX_EXTENT_SIZE + 1), "bytes from"),
        (lambda m: m.extents.offsets.__setitem__(0, (1 << 63)), "of a NAR of"),
        (lambda m: m.extents.offsets.pop(), "different lengths"),
        (lambda m: setattr(m, "closure", b"x" * 32), "but its narinfos are of"),
        (lambda m: setattr(m, "closure", b""), "digest of a closure"),
        (lambda m: m.narinfos.reverse(), "sorted by path"),
        (lambda m: setattr(m, "stream_hash", b"x" * 32), "its stream hashes to"),
        (lambda m: setattr(m, "stream_size", 1 << 40), "bytes of its stream, expected at most"),
        (lambda m: m.narinfos.append(b"x" * (1 << 21)), "a narinfo has"),
    ],
)
def test_a_signed_header_that_contradicts_itself(change: object, said: str) -> None:
    message, stream = message_of(written())
    change(message)  # type: ignore[operator]
    with pytest.raises(InvalidData, match=said):
        parsed(parser(), signed(message, stream))


def test_contents_that_are_not_those_of_the_extents_are_not_written() -> None:
    head, contents = header((HELLO, 0, b"right"))
    with pytest.raises(ContentMismatch):
        write_bundle(head, [b"wrong"], KEY, StoreDir())
    assert contents == [b"right"]


def test_a_closure_bundle_has_no_extents() -> None:
    head, _ = header()
    (event,) = parsed(parser(), write_bundle(head, [], KEY, StoreDir()))
    assert isinstance(event, BundleHeader)
    assert replace(event, stream_size=0, stream_digest=b"") == head


def test_its_name_is_that_of_the_closure() -> None:
    assert file_name(ClosureDigest("5" * 64)) == "bundle/" + "5" * 64
    assert root_file_name(HELLO.store_path) == f"bundle/{HELLO.store_path.hash_part}"
