from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise

import brotli
import lz4.frame
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import InvalidData
from fusesnap.nix.compression import (
    MAX_PIECE,
    XZ_MEMORY_LIMIT,
    ZSTD_MAX_WINDOW,
    decompressor,
    supported,
)

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "": bytes,
    "xz": lzma.compress,
    "zstd": zstandard.compress,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "br": lambda data: brotli.compress(data, quality=5),
    "lz4": lz4.frame.compress,
}
PACKED = [name for name in COMPRESS if name not in ("none", "")]
# Brotli is one stream without a frame around it.
FRAMED = [name for name in PACKED if name != "br"]


def unpack(name: str, pieces: Iterable[bytes]) -> bytes:
    stream = decompressor(name)
    out = []
    for piece in pieces:
        for part in stream.decompress(piece):
            assert 0 < len(part) <= MAX_PIECE
            out.append(part)
    stream.finish()
    return b"".join(out)


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def sample(size: int) -> bytes:
    """Bytes of which half compress and half do not."""
    noise = hashlib.shake_128(b"noise").digest(size // 2)
    return b"".join(noise[i : i + 500] + bytes(500) for i in range(0, len(noise), 500))


@pytest.mark.parametrize("name", COMPRESS)
@given(data=st.binary(max_size=2000), places=st.lists(st.integers(0, 5000), max_size=5))
def test_round_trip_however_cut(name: str, data: bytes, places: list[int]) -> None:
    assert unpack(name, cut(COMPRESS[name](data), places)) == data


@pytest.mark.parametrize("name", COMPRESS)
@pytest.mark.parametrize("step", [1000, 70_000, 10_000_000])
def test_large_files(name: str, step: int) -> None:
    data = sample(1_500_000)
    packed = COMPRESS[name](data)
    assert unpack(name, (packed[i : i + step] for i in range(0, len(packed), step))) == data


@pytest.mark.parametrize("name", PACKED)
def test_a_bomb_comes_in_small_pieces(name: str) -> None:
    stream = decompressor(name)
    total = 0
    for part in stream.decompress(COMPRESS[name](bytes(20_000_000))):
        assert len(part) <= MAX_PIECE
        total += len(part)
    stream.finish()
    assert total == 20_000_000


@pytest.mark.parametrize("name", FRAMED)
@given(places=st.lists(st.integers(0, 5000), max_size=5))
def test_streams_one_after_another_are_joined(name: str, places: list[int]) -> None:
    parts = [b"one", b"", b"three" * 1000]
    packed = b"".join(map(COMPRESS[name], parts))
    assert unpack(name, cut(packed, places)) == b"".join(parts)
    assert unpack(name, (packed[i : i + 1] for i in range(len(packed)))) == b"".join(parts)


@pytest.mark.parametrize("name", PACKED)
def test_a_file_cut_short_is_refused(name: str) -> None:
    packed = COMPRESS[name](sample(5000))
    for length in (0, 1, 10, len(packed) // 2, len(packed) - 1):
        with pytest.raises(InvalidData, match=f"^{name}: file is cut short after .* bytes"):
            unpack(name, [packed[:length]])


@pytest.mark.parametrize("name", FRAMED)
def test_garbage_after_the_end_is_refused(name: str) -> None:
    packed = COMPRESS[name](b"contents")
    with pytest.raises(InvalidData, match=f"^{name}: file is followed by garbage after 8 bytes"):
        unpack(name, [packed + b"garbage, more than any header is long"])
    with pytest.raises(InvalidData, match=f"^{name}: file is followed by garbage after 8 bytes"):
        unpack(name, [packed, b"garbage, more than any header is long"])


@pytest.mark.parametrize("pieces", [[b"garbage"], [b"", b"garbage"]])
def test_garbage_after_brotli_is_refused(pieces: list[bytes]) -> None:
    packed = brotli.compress(b"contents")
    with pytest.raises(InvalidData, match=r"^br: file is"):
        unpack("br", [packed + pieces[0], *pieces[1:]])


@pytest.mark.parametrize("name", FRAMED)
def test_a_flipped_bit_is_refused(name: str) -> None:
    # Of these, zstd and LZ4 have a checksum of the contents only when asked for it.
    checked: dict[str, Callable[[bytes], bytes]] = {
        "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
        "lz4": lambda data: bytes(lz4.frame.compress(data, content_checksum=True)),
    }
    pack = checked.get(name, COMPRESS[name])
    packed = bytearray(pack(sample(5000)))
    packed[len(packed) // 2] ^= 1
    with pytest.raises(InvalidData, match=f"^{name}: file is unreadable after .* bytes"):
        unpack(name, [bytes(packed)])


@pytest.mark.parametrize("name", PACKED)
def test_what_is_not_compressed_so_is_refused(name: str) -> None:
    with pytest.raises(InvalidData, match=f"^{name}: file is unreadable after 0 bytes"):
        unpack(name, [b"<html><body>Bad gateway</body></html>" * 10])


def test_an_unknown_compression_is_named() -> None:
    with pytest.raises(InvalidData, match=r"compression is 'lzip', supported are none, xz, zstd"):
        decompressor("lzip")


def test_a_compression_whose_library_is_missing_is_not_offered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {"br", "lz4"} <= set(supported())
    monkeypatch.setitem(sys.modules, "brotli", None)
    assert "br" not in supported()
    with pytest.raises(InvalidData, match=r"compression is 'br', supported are .*lz4$"):
        decompressor("br")


def test_xz_padding_is_a_multiple_of_four() -> None:
    packed = lzma.compress(b"a")
    assert unpack("xz", [packed, bytes(3), bytes(5), packed, bytes(4)]) == b"aa"
    with pytest.raises(InvalidData, match="padding of 3 bytes, expected a multiple of 4"):
        unpack("xz", [packed, bytes(3)])
    with pytest.raises(InvalidData, match="padding of 5 bytes, expected a multiple of 4"):
        unpack("xz", [packed, bytes(5) + packed])


def test_xz_of_the_highest_preset_fits_its_limit_and_more_does_not() -> None:
    assert unpack("xz", [lzma.compress(b"a", preset=9)]) == b"a"
    largest = {"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": XZ_MEMORY_LIMIT * 2}
    packed = lzma.compress(b"a", filters=[largest])
    with pytest.raises(InvalidData, match=r"xz: file is unreadable after 0 bytes.*[Mm]emory"):
        unpack("xz", [packed])


def zstd_frame(window_log: int) -> bytes:
    """A frame that says its window and holds one raw block of one byte (RFC 8878, 3.1.1)."""
    header = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(window_log - 10) << 3])
    return header + (1 | 1 << 3).to_bytes(3, "little") + b"a"


def test_zstd_windows_of_long_mode_are_taken_and_larger_ones_not() -> None:
    limit = ZSTD_MAX_WINDOW.bit_length() - 1
    assert unpack("zstd", [zstd_frame(limit)]) == b"a"
    with pytest.raises(InvalidData, match=r"zstd: file is unreadable after 0 bytes.*memory"):
        unpack("zstd", [zstd_frame(limit + 1)])
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    long_mode = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = sample(1_000_000)
    assert unpack("zstd", [long_mode.compress(data) + long_mode.flush()]) == data


def test_zstd_skippable_frames_are_skipped() -> None:
    skippable = (0x184D2A5E).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"table"
    packed = zstandard.compress(b"a")
    assert unpack("zstd", [packed + skippable + packed + skippable]) == b"aa"
    with pytest.raises(InvalidData, match="cut short"):
        unpack("zstd", [packed + skippable[:-1]])
