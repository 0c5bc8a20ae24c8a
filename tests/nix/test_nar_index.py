from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import ContentMismatch, FusesnapError, InvalidData, UntrustedPath
from fusesnap.nix.api import nar_index_pb2 as api
from fusesnap.nix.chunk_table import Chunk, ChunkTable
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.hash_parts import HashPartScanner, Occurrence, blanked
from fusesnap.nix.nar import NarEvent, nar_bytes
from fusesnap.nix.nar_index import MAX_INDEX_SIZE, NarIndex, parse_nar_index
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.signature import SecretKey, TrustedKeys
from fusesnap.nix.store_path import StoreDir, StorePath

from .trees import tree_of

DIRECTORY = StoreDir()
PATH = StorePath("0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx", "hello")
OTHER = StorePath("1111111111111111111111111111111x", "other")
PARTS = (PATH.hash_part, OTHER.hash_part)


def secret_key(name: str, seed: int) -> SecretKey:
    from nacl.signing import SigningKey  # noqa: PLC0415

    key = SigningKey(bytes([seed]) * 32)
    return SecretKey(name, bytes(key) + bytes(key.verify_key))


KEY = secret_key("cache-1", 1)
KEYS = TrustedKeys((KEY.public_key(),))


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def index_of(nar: bytes, places: list[int]) -> NarIndex:
    """The index of a NAR that is cut into chunks at ``places``."""
    edges = sorted({0, len(nar), *(place % len(nar) for place in places)})
    chunks = [nar[start:end] for start, end in pairwise(edges)]
    found = tuple(HashPartScanner(PARTS).feed(nar))
    blank = blanked(nar, 0, found)
    touched = [
        sha256(blank[start:end])
        for start, end in pairwise(edges)
        if any(f.position < end and f.end > start for f in found)
    ]
    table = ChunkTable(
        [len(chunk) for chunk in chunks],
        [len(chunk) + 18 for chunk in chunks],
        b"".join(map(sha256, chunks)),
        PARTS,
        found,
        b"".join(touched),
    )
    nar_hash = Hash(HashAlgorithm.SHA256, sha256(nar))
    return NarIndex(PATH, nar_hash, tree_of(nar), table, DIRECTORY)


def assert_same(one: NarIndex, other: NarIndex) -> None:
    assert (one.store_path, one.nar_hash) == (other.store_path, other.nar_hash)
    assert list(one.tree.entries) == list(other.tree.entries)
    assert list(one.chunks) == list(other.chunks)
    assert list(one.chunks.occurrences) == list(other.chunks.occurrences)
    assert one.chunks.hash_parts == other.chunks.hash_parts
    assert one.chunks.blanked_digests == other.chunks.blanked_digests


@given(st.data())
def test_what_is_written_is_read(
    nar_events: st.SearchStrategy[list[NarEvent]], data: st.DataObject
) -> None:
    nar = b"".join(nar_bytes(data.draw(nar_events)))
    index = index_of(nar, data.draw(st.lists(st.integers(0, len(nar)), max_size=5)))
    assert_same(parse_nar_index(index.to_bytes(KEY), KEYS, DIRECTORY), index)


@pytest.fixture
def nar(tmp_path: Path, walk: Callable[[Path], Iterator[NarEvent]]) -> bytes:
    package = tmp_path / "small"
    package.mkdir()
    (package / "script").write_text(f"#!/nix/store/{OTHER}/bin/sh\nexec /nix/store/{PATH}/bin/x\n")
    (package / "link").symlink_to(f"/nix/store/{PATH}/bin")
    return b"".join(nar_bytes(walk(package)))


@pytest.fixture
def index(nar: bytes) -> NarIndex:
    return index_of(nar, [200, 300, 410])


def test_no_flipped_bit_goes_unnoticed(index: NarIndex) -> None:
    """Exhaustive: every bit of every byte, header and signature included."""
    data = index.to_bytes(KEY)
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            with pytest.raises((InvalidData, UntrustedPath)):
                parse_nar_index(bytes(flipped), KEYS, DIRECTORY)


def test_no_index_that_is_cut_short_or_too_long_goes_unnoticed(index: NarIndex) -> None:
    data = index.to_bytes(KEY)
    for wrong in (*(data[:size] for size in range(len(data))), data + b"\0"):
        with pytest.raises((InvalidData, UntrustedPath)):
            parse_nar_index(wrong, KEYS, DIRECTORY)


def test_a_key_that_is_not_trusted_is_named(index: NarIndex) -> None:
    stranger = secret_key("stranger-1", 2)
    with pytest.raises(UntrustedPath, match="signed by 'stranger-1', not trusted"):
        parse_nar_index(index.to_bytes(stranger), KEYS, DIRECTORY)
    impostor = secret_key("cache-1", 3)
    with pytest.raises(UntrustedPath, match="the signature by trusted key 'cache-1' is wrong"):
        parse_nar_index(index.to_bytes(impostor), KEYS, DIRECTORY)


def test_a_narinfos_signature_is_none_for_an_index(index: NarIndex) -> None:
    """The two kinds of message begin differently, so that one is never the other."""
    assert not index.to_bytes(KEY).startswith(b"1;")


def resigned(index: NarIndex, change: Callable[[api.NarIndex], None]) -> bytes:
    """The index with something changed in its message, signed by the trusted key."""
    data = index.to_bytes(KEY)
    header = data[: 11 + len(KEY.name)]
    message = api.NarIndex.FromString(zstandard.decompress(data[len(header) + 64 :]))
    change(message)
    body = zstandard.compress(message.SerializeToString())
    return header + KEY.sign(header + body).signature + body


def set_field(name: str, value: object) -> Callable[[api.NarIndex], None]:
    *parents, last = name.split(".")

    def change(message: api.NarIndex) -> None:
        at: object = message
        for parent in parents:
            at = getattr(at, parent)
        if isinstance(value, list):
            getattr(at, last)[:] = value
        else:
            setattr(at, last, value)

    return change


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("store_path", "/gnu/store/x", "is not a store path in /nix/store"),
        ("nar_hash", b"short", "sha256 digest has 5 bytes, expected 32"),
        ("nar_size", 8, "its tree makes a NAR of 640 bytes, expected 8"),
        ("file_size", 8, "its chunks make a file of 712 bytes, expected 8"),
        ("tree.names", b"b\0a\0", "name 'a' comes after 'b': not sorted"),
        ("tree.sizes", [1], "its tree makes a NAR of"),
        ("chunks.nar_sizes", [1, 2, 3], "3 chunks of the NAR, but 4 of the file"),
        ("chunks.nar_sizes", [0, 1, 1, 1], "chunk 0 has 0 bytes of the NAR, expected 1 to 1048576"),
        ("chunks.file_sizes", [2**21, 1, 1, 1], "chunk 0 has 2097152 bytes of the file"),
        ("chunks.nar_sizes", [1, 1, 1, 1], "its chunks make a NAR of|hash part ends at byte"),
        ("chunks.hashes", b"", "digests have 0 bytes, expected 128 for 4 chunks"),
        ("hash_parts.which", [0], "3 gaps between 1 hash parts"),
        ("hash_parts.which", [0, 0, 2], "hash part 2 is named, expected one of 2"),
        ("hash_parts.gaps", [0, 2**40, 0], "the NAR has 640"),
        ("hash_parts.hash_parts", b"x", "hash parts have 1 bytes, expected a multiple of 32"),
        ("hash_parts.hash_parts", b"e" * 64, "is not 32 characters of"),
        ("hash_parts.blanked_hashes", b"", "digests of blanked chunks have 0 bytes"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(
    index: NarIndex, name: str, value: object, said: str
) -> None:
    with pytest.raises(FusesnapError, match=said):
        parse_nar_index(resigned(index, set_field(name, value)), KEYS, DIRECTORY)


def test_fields_of_later_versions_are_left_alone(index: NarIndex) -> None:
    def change(message: api.NarIndex) -> None:
        message.MergeFromString(b"\xf8\x01\x05")

    later = resigned(index, change)
    assert_same(parse_nar_index(later, KEYS, DIRECTORY), index)


def test_an_index_too_large_is_refused_unread() -> None:
    with pytest.raises(InvalidData, match="expected at most"):
        parse_nar_index(bytes(MAX_INDEX_SIZE + 1), KEYS, DIRECTORY)


def test_what_a_signed_index_unfolds_to_is_bounded() -> None:
    header = b"NAR-INDEX\1" + bytes([len(KEY.name)]) + KEY.name.encode()
    compressor = zstandard.ZstdCompressor()
    for body in (compressor.compress(bytes(256 * 2**20 + 1)), b"\x28\xb5\x2f\xfd" + b"\0" * 8):
        data = header + KEY.sign(header + body).signature + body
        with pytest.raises(InvalidData, match=r"unfolds to|cannot be decompressed"):
            parse_nar_index(data, KEYS, DIRECTORY)


def test_an_index_of_another_nar_is_told(index: NarIndex) -> None:
    info = NarInfo(
        PATH, "nar/x", "zstd", None, 712, index.nar_hash, 640, (), None, None, (), None, (), DIRECTORY
    )  # fmt: skip
    index.check_matches(info)
    index.check_matches(replace(info, file_size=None))
    other = Hash(HashAlgorithm.SHA256, bytes(32))
    for wrong, said in (
        (
            replace(info, store_path=OTHER),
            "its store path is 0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx-hello",
        ),
        (replace(info, nar_hash=other), "its NAR hash is"),
        (replace(info, nar_size=641), "its NAR size is 640, the narinfo's is 641"),
        (replace(info, file_size=713), "its file size is 712, the narinfo's is 713"),
    ):
        with pytest.raises(ContentMismatch, match=said):
            index.check_matches(wrong)


def test_chunks_are_found_by_the_bytes_that_are_wanted(index: NarIndex, nar: bytes) -> None:
    chunks = index.chunks
    for start in range(0, len(nar), 7):
        for end in range(start, len(nar) + 20, 11):
            numbers = chunks.covering(start, end)
            wanted = set(range(start, min(end, len(nar))))
            overlap = [c.number for c in chunks if wanted & set(range(c.start, c.end))]
            assert list(numbers) == overlap
    assert list(chunks.covering(5, 5)) == []


def test_each_chunk_vouches_for_its_own_bytes_only(index: NarIndex, nar: bytes) -> None:
    for chunk in index.chunks:
        data = nar[chunk.start : chunk.end]
        chunk.check(data)
        with pytest.raises(ContentMismatch, match=f"chunk {chunk.number} has"):
            chunk.check(data + b"x")
        with pytest.raises(ContentMismatch, match=f"chunk {chunk.number} hashes to sha256:"):
            chunk.check(bytes([data[0] ^ 1]) + data[1:])
        assert sha256(index.chunks.blank(chunk.number, data)) == index.chunks.blanked_digest(
            chunk.number
        )


def test_a_hash_part_that_two_chunks_share_is_blanked_in_both(nar: bytes) -> None:
    place = nar.index(PATH.hash_part.encode()) + 10
    index = index_of(nar, [place])
    assert [len(index.chunks.occurrences_in(number)) for number in range(2)] == [1, 3]
    for chunk in index.chunks:
        blank = index.chunks.blank(chunk.number, nar[chunk.start : chunk.end])
        assert PATH.hash_part.encode()[10:] not in blank
        assert sha256(blank) == index.chunks.blanked_digest(chunk.number)


def test_there_is_no_chunk_beyond_the_last(index: NarIndex) -> None:
    with pytest.raises(IndexError):
        index.chunks[len(index.chunks)]
    with pytest.raises(IndexError):
        index.chunks[-1]


def test_overlapping_hash_parts_are_refused() -> None:
    with pytest.raises(InvalidData, match="hash part at byte 40 of the NAR overlaps another"):
        ChunkTable([100], [9], bytes(32), PARTS, (Occurrence(10, 0), Occurrence(40, 1)), bytes(32))


def test_chunks_lie_one_after_another() -> None:
    table = ChunkTable([10, 20], [7, 9], bytes(32) + b"\1" * 32)
    assert list(table) == [Chunk(0, 0, 10, 0, 7, bytes(32)), Chunk(1, 10, 20, 7, 9, b"\1" * 32)]
    assert (table[1].end, table[1].file_end) == (30, 16)
