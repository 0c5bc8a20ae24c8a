"""Headers that another reader of tar takes for what they say."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.snapshots.tar_header import (
    CHARACTER_DEVICE,
    DIRECTORY,
    END,
    HARD_LINK,
    REGULAR,
    TarHeader,
    padded,
)

CAPABILITY = b"SCHILY.xattr.security.capability"
# Around where a name stops to fit into its field, and into field and prefix together.
names = st.lists(
    st.text(
        st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"])
        | st.sampled_from("ab"),
        min_size=1,
        max_size=160,
    ).filter(lambda name: name not in (".", "..")),
    min_size=1,
    max_size=5,
).map("/".join)
numbers = st.sampled_from([0, 1, 8**7 - 1, 8**7, 2**32 - 1])
times = st.sampled_from([0, 1, -1, 8**11 - 1, 8**11]) | st.integers(-(2**33), 2**35)


def read(header: bytes) -> tarfile.TarInfo:
    return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")


def members(*headers: TarHeader) -> list[tarfile.TarInfo]:
    data = b"".join(header.to_bytes() for header in headers) + END
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as tar:
        return tar.getmembers()


@given(names, names, numbers, numbers, times, st.booleans())
def test_a_reader_finds_what_was_written(
    name: str, link: str, uid: int, gid: int, mtime: int, capable: bool
) -> None:
    records = {CAPABILITY: b"\1\0=\n\xff"} if capable else {}
    header = TarHeader(
        name.encode(),
        HARD_LINK,
        mode=0o4711,
        uid=uid,
        gid=gid,
        mtime=mtime,
        link=link.encode(),
        records=records,
    )
    (found,) = members(header)
    assert (found.name, found.linkname, found.type) == (name, link, HARD_LINK)
    assert (found.mode, found.uid, found.gid, found.mtime) == (0o4711, uid, gid, mtime)
    assert (CAPABILITY.decode() in found.pax_headers) is capable


@given(names, st.sampled_from([0, 1, 511, 512, 8**11 - 1, 8**11, 2**40]))
def test_a_size_of_any_width(name: str, size: int) -> None:
    header = TarHeader(name.encode(), REGULAR, size=size).to_bytes()
    assert len(header) % 512 == 0
    last = read(header[-512:])
    assert last.size == (size if size < 8**11 else 0)
    assert (b" size=%d\n" % size in header) is (size >= 8**11)


def test_directories_and_devices() -> None:
    directory, device = members(
        TarHeader(b"d" * 120 + b"/", DIRECTORY),
        TarHeader(b"null", CHARACTER_DEVICE, major=1, minor=3),
    )
    assert (directory.name, directory.isdir()) == ("d" * 120, True)
    assert (device.ischr(), device.devmajor, device.devminor) == (True, 1, 3)


# Each digest is that of what Go's archive/tar wrote for the same header, in its FormatPAX.
@pytest.mark.parametrize(
    ("header", "digest"),
    [
        (TarHeader(b"p" * 155 + b"/" + b"n" * 100), "d4d3dde77bacc9ef9a276cd3b48881b0"),
        (TarHeader(b"p" * 156 + b"/" + b"n" * 100, mtime=-1), "4cc325b2072cfb63609ba5312e39a407"),
        (
            TarHeader(b"p" * 99 + b"/", DIRECTORY, mode=0o1777, uid=8**7),
            "20690251906ef97a09f6162f78b2a426",
        ),
        (TarHeader(b"p" * 98 + b"\xff//more/", DIRECTORY), "3ab9654a84b0150313b228176dd615db"),
        (TarHeader("ä/file".encode(), size=8**11, mtime=8**11), "fc81684c8dd0ab517b9dec793be43523"),
        (
            TarHeader(b"a", HARD_LINK, link=b"l" * 101, mode=0o644),
            "f55fff9f1cbc2e0efbb733416bd9be7b",
        ),
        (
            TarHeader(b"a" * 101, records={CAPABILITY: b"\0\1\n"}),
            "2a3ba8ca43cf3665aab75a5d0d57f860",
        ),
    ],
)
def test_headers_are_gos_to_the_byte(header: TarHeader, digest: str) -> None:
    assert hashlib.sha256(header.to_bytes()).hexdigest().startswith(digest)


def test_data_is_filled_up_to_blocks() -> None:
    assert [len(padded(bytes(size))) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]
