from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fusesnap.errors import ContentMismatch, FusesnapError, InvalidData, StorageFailure
from fusesnap.images.layer import FileKind, LayerEntry, LayerTar

MakeTar = Callable[..., bytes]
OpenTar = Callable[[bytes], LayerTar]
BLOCK = 512


def info(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    for field, value in fields.items():
        setattr(made, field, value)
    return made


def header(**fields: object) -> bytes:
    """One ustar header, with whatever its fields are given."""
    return info("x", **fields).tobuf(tarfile.GNU_FORMAT)  # type: ignore[arg-type]


def pax(*records: bytes) -> bytes:
    """An extended header with these records, as they are."""
    data = b"".join(records)
    start = info("pax", tarfile.XHDTYPE, size=len(data)).tobuf(tarfile.USTAR_FORMAT)
    return start + data + bytes(-len(data) % BLOCK)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def entries(open_tar: OpenTar, data: bytes) -> list[LayerEntry]:
    with open_tar(data) as tar:
        return list(tar.entries())


def refusal(open_tar: OpenTar, data: bytes) -> str:
    with pytest.raises(InvalidData) as caught:
        entries(open_tar, data)
    assert str(caught.value).startswith("layer sha256:")
    return str(caught.value)


# ------------------------------------------------------------------ what is read


def test_kinds_and_metadata(make_tar: MakeTar, open_tar: OpenTar) -> None:
    items = [
        (info("d", tarfile.DIRTYPE, mode=0o40750, uid=7, gid=8, mtime=9), b""),
        (info("d/f", mode=0o104711), b"abc"),
        (info("d/s", tarfile.SYMTYPE, linkname="../f", mode=0o600), b""),
        (info("d/h", tarfile.LNKTYPE, linkname="./d//f"), b""),
        (info("c", tarfile.CHRTYPE, devmajor=1, devminor=300), b""),
        (info("b", tarfile.BLKTYPE, devmajor=8, devminor=1), b""),
        (info("p", tarfile.FIFOTYPE), b""),
    ]
    directory, file, link, hard, character, block, fifo = entries(open_tar, make_tar(items))
    assert directory == LayerEntry(b"d", FileKind.DIRECTORY, 0o750, 7, 8, 9 * 10**9, 0, 0)
    assert (file.kind, file.mode, file.size) == (FileKind.REGULAR, 0o4711, 3)
    assert (link.kind, link.mode, link.target) == (FileKind.SYMLINK, 0o777, b"../f")
    assert link.size == 4
    assert (hard.hard_link, hard.size) == (b"d/f", 0)
    assert (character.kind, character.rdev) == (FileKind.CHARACTER_DEVICE, os.makedev(1, 300))
    assert (block.kind, block.rdev) == (FileKind.BLOCK_DEVICE, os.makedev(8, 1))
    assert fifo.kind is FileKind.FIFO


@pytest.mark.parametrize(
    ("name", "path"),
    [("./a", b"a"), ("/a", b"a"), ("a/", b"a"), ("a//./b", b"a/b"), (".", b""), ("./", b"")],
)
def test_names_are_normalised(make_tar: MakeTar, open_tar: OpenTar, name: str, path: bytes) -> None:
    made = make_tar([(info(name, tarfile.DIRTYPE), b"")])
    assert [entry.path for entry in entries(open_tar, made)] == [path]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_bytes_that_are_no_text(
    make_tar: MakeTar, open_tar: OpenTar, tar_format: int
) -> None:
    long = "/".join(["d" * 200] * 10)
    odd = os.fsdecode(b"\xff\xfe")
    items = [
        (info(long), b"1"),
        (info("s", tarfile.SYMTYPE, linkname=long), b""),
        (info("h", tarfile.LNKTYPE, linkname=long), b""),
        (info(odd), b"2"),
    ]
    file, link, hard, strange = entries(open_tar, make_tar(items, tar_format))
    assert file.path == link.target == hard.hard_link == long.encode()
    assert strange.path == b"\xff\xfe"


def test_extended_attributes_and_times_are_exact(open_tar: OpenTar) -> None:
    capability = bytes(range(256))
    made = pax(
        record(b"SCHILY.xattr.security.capability", capability),
        record(b"SCHILY.xattr.user.a", b"line\n=x"),
        record(b"LIBARCHIVE.xattr.user.b", b"Zm9v"),
        record(b"mtime", b"1700000000.123456789123"),
        record(b"uid", b"3000000"),
    )
    (entry,) = entries(open_tar, made + header())
    assert dict(entry.xattrs) == {b"security.capability": capability, b"user.a": b"line\n=x"}
    assert entry.mtime_ns == 1_700_000_000_123_456_789
    assert entry.uid == 3_000_000


@pytest.mark.parametrize(
    ("mtime", "expected"),
    [
        (b"-1.5", -1_500_000_000),
        (b"5.", 5_000_000_000),
        (b"-62135596800", -(2**63)),
        (b"9" * 18, 2**63 - 1),
    ],
)
def test_times_of_other_ages(open_tar: OpenTar, mtime: bytes, expected: int) -> None:
    (entry,) = entries(open_tar, pax(record(b"mtime", mtime)) + header())
    assert entry.mtime_ns == expected


@pytest.mark.parametrize("data", [b"", bytes(512), bytes(1024), bytes(10240)])
def test_empty_tars(open_tar: OpenTar, data: bytes) -> None:
    assert entries(open_tar, data) == []


def test_a_tar_that_ends_without_zeros(open_tar: OpenTar) -> None:
    assert [entry.path for entry in entries(open_tar, header())] == [b"x"]


def test_what_follows_the_end_is_not_read(open_tar: OpenTar) -> None:
    assert len(entries(open_tar, header() + bytes(1024) + b"anything")) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--format=gnu"],
        ["--sparse-version=0.0"],
        ["--sparse-version=0.1"],
        ["--sparse-version=1.0"],
    ],
)
def test_sparse_files_as_gnu_tar_writes_them(
    open_tar: OpenTar, tmp_path: Path, arguments: list[str]
) -> None:
    pieces = {0: b"start", 300_000: b"middle" * 1000, 1_000_000: b"x", 5_000_000: b"end"}
    with (tmp_path / "sparse").open("wb") as file:
        for offset, piece in pieces.items():
            file.seek(offset)
            file.write(piece)
        file.truncate(6_000_000)
    (tmp_path / "after").write_bytes(b"after")
    command = ["tar", "-C", str(tmp_path), "--format=posix", *arguments, "-S", "-cf", "-"]
    done = subprocess.run([*command, "sparse", "after"], check=True, capture_output=True)
    with open_tar(done.stdout) as tar:
        sparse, after = tar.entries()
        assert sparse.path == b"sparse"
        assert sparse.size == 6_000_000
        assert sparse.segments is not None
        stored = sparse.offset
        for offset, size in sparse.segments:
            real = (tmp_path / "sparse").read_bytes()[offset : offset + size]
            assert tar.read(stored, size) == real
            stored += size
        assert tar.read(after.offset, after.size) == b"after"


def test_contents_are_skipped(open_tar: OpenTar, tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(header(size=1 << 40))
        file.seek(1 << 40, io.SEEK_CUR)
        file.write(header())
        file.truncate(file.tell() + 1024)
    with open_tar(b"") as tar:
        found = LayerTar(os.open(path, os.O_RDONLY), tar.diff_id, "large")
    with found:
        assert [entry.size for entry in found.entries()] == [1 << 40, 0]


# ------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["..", "a/../b", "/../x", "a/.."])
def test_traversal(make_tar: MakeTar, open_tar: OpenTar, name: str) -> None:
    assert f"name '{name}' has a component '..'" in refusal(open_tar, make_tar([(info(name), b"")]))


def test_traversal_by_a_hard_link(make_tar: MakeTar, open_tar: OpenTar) -> None:
    items = [(info("a", tarfile.LNKTYPE, linkname="../../etc/shadow"), b"")]
    assert "name '../../etc/shadow' has a component '..'" in refusal(open_tar, make_tar(items))


def test_names_that_no_file_system_takes(make_tar: MakeTar, open_tar: OpenTar) -> None:
    assert "component of more than 255 bytes" in refusal(
        open_tar, make_tar([(info("n" * 256), b"")])
    )
    assert "expected at most 4096 bytes" in refusal(
        open_tar, make_tar([(info("/".join(["n"] * 2049)), b"")])
    )
    assert "has a NUL byte" in refusal(open_tar, pax(record(b"path", b"a\0b")) + header())


@pytest.mark.parametrize("target", [b"", b"a\0b", b"t" * 4096])
def test_link_targets_that_no_file_system_takes(open_tar: OpenTar, target: bytes) -> None:
    made = pax(record(b"linkpath", target)) + header(kind=tarfile.SYMTYPE)
    assert "entry 'x': expected a link target of 1 to 4095 bytes" in refusal(open_tar, made)


@pytest.mark.parametrize("kind", [b"D", b"V", b"Z"])
def test_unknown_types(open_tar: OpenTar, kind: bytes) -> None:
    assert f"entry 'x' of type {kind!r}: expected a file" in refusal(open_tar, header(kind=kind))


def test_a_root_that_is_no_directory(make_tar: MakeTar, open_tar: OpenTar) -> None:
    made = make_tar([(info(".", tarfile.SYMTYPE, linkname="/etc"), b"")])
    assert "is the root: expected a directory" in refusal(open_tar, made)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (b"uid", b"x", "expected a number as uid, got 'x'"),
        (b"gid", b"-1", "expected a number as gid, got '-1'"),
        (b"uid", b"4294967295", "expected uid 0 to 4294967294, got 4294967295"),
        (b"size", b"-512", "has size -512"),
        (b"mtime", b"never", "expected a decimal number as mtime, got 'never'"),
        (b"SCHILY.xattr.", b"x", "expected a name of 1 to 255 bytes"),
        (b"SCHILY.xattr." + b"u" * 256, b"x", "expected a name of 1 to 255 bytes"),
        (b"SCHILY.xattr.user.x", b"x" * 65_537, "expected at most 65536 bytes, got 65537"),
    ],
)
def test_extended_headers_that_lie(
    open_tar: OpenTar, key: bytes, value: bytes, reason: str
) -> None:
    said = refusal(open_tar, pax(record(key, value)) + header())
    assert "entry 'x'" in said
    assert reason in said


def test_numbers_below_zero(open_tar: OpenTar) -> None:
    assert "expected uid 0 to 4294967294, got -1" in refusal(open_tar, header(uid=-1))
    assert "has size -512" in refusal(open_tar, header(size=-512) + bytes(1024))
    device = header(kind=tarfile.CHRTYPE, devmajor=-1)
    assert "expected a device's numbers, got -1 and 0" in refusal(open_tar, device)


def test_an_extension_header_of_negative_size(open_tar: OpenTar) -> None:
    made = header(kind=tarfile.GNUTYPE_LONGNAME, size=-1024) + header()
    assert "has a negative size" in refusal(open_tar, made)


def test_an_extension_header_too_large(open_tar: OpenTar) -> None:
    comment = pax(record(b"comment", b"c" * (1 << 20)))
    assert "expected at most 1048576 bytes of headers for one entry" in refusal(
        open_tar, comment + header()
    )


def test_extension_headers_of_extension_headers(open_tar: OpenTar) -> None:
    said = refusal(open_tar, pax(record(b"comment", b"c")) * 900 + header())
    assert "damaged tar" in said
    assert "extension headers" in said or "bytes of headers" in said


def test_too_many_global_records(open_tar: OpenTar) -> None:
    records = pax(*(record(b"k%d" % number, b"v") for number in range(65)))
    made = info("g", tarfile.XGLTYPE, size=len(records) - BLOCK).tobuf(tarfile.USTAR_FORMAT)
    said = refusal(open_tar, made + records[BLOCK:] + header())
    assert "expected at most 64 records in global headers, got 65" in said


def test_a_sparse_map_that_lies(open_tar: OpenTar) -> None:
    for sparse_map in (b"5,2,0,2", b"0,5,4,2", b"0,11", b"90,5"):
        made = pax(record(b"GNU.sparse.map", sparse_map), record(b"GNU.sparse.size", b"10"))
        said = refusal(open_tar, made + header(size=512) + bytes(512))
        assert "entry 'x': expected a sparse map in order within 10 bytes" in said


def test_a_sparse_file_that_leads_back(open_tar: OpenTar) -> None:
    """Its size is in another field, so that the negative one shows only in where tarfile goes on."""
    sparse = bytearray(header(kind=tarfile.GNUTYPE_SPARSE, size=-512))
    sparse[483:495] = b"%011o\0" % 10
    sparse[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(sparse))[0]  # type: ignore[attr-defined]
    assert "entry 'x' has size 10" in refusal(open_tar, header() + bytes(sparse) + bytes(1024))


def test_a_sparse_file_whose_stored_size_tarfile_would_lose(open_tar: OpenTar) -> None:
    made = pax(
        record(b"GNU.sparse.map", b"0,5"),
        record(b"GNU.sparse.size", b"10"),
        record(b"size", b"5"),
    )
    assert "is not supported" in refusal(open_tar, made + header(size=5) + bytes(512))


def test_a_damaged_header(make_tar: MakeTar, open_tar: OpenTar) -> None:
    made = make_tar([(info("a"), b""), (info("b"), b"")])
    assert "damaged tar" in refusal(open_tar, b"not a tar" * 100)
    # tarfile alone would end quietly at the second.
    damaged = made[:BLOCK] + b"X" + made[BLOCK + 1 :]
    assert "the header at offset 512 is not one" in refusal(open_tar, damaged)
    one_zero_block = made[:BLOCK] + bytes(BLOCK) + made[BLOCK:]
    assert "the header at offset 512 is not one" in refusal(open_tar, one_zero_block)


@pytest.mark.parametrize("size", [100, 512 + 100, 2 * 512 + 200, 3 * 512 + 100])
def test_a_tar_cut_short(make_tar: MakeTar, open_tar: OpenTar, size: int) -> None:
    made = make_tar([(info("a"), b"x" * 600), (info("b"), b"")])
    assert "damaged tar" in refusal(open_tar, made[:size])


def test_too_many_entries(
    make_tar: MakeTar, open_tar: OpenTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusesnap.images.layer.MAX_ENTRIES", 2)
    made = make_tar([(info(name), b"") for name in "abc"])
    assert "expected at most 2 entries, got more" in refusal(open_tar, made)


def test_reading_past_the_end(open_tar: OpenTar) -> None:
    with (
        open_tar(bytes(1024)) as tar,
        pytest.raises(ContentMismatch, match="expected 1000 bytes at offset 100, got 924"),
    ):
        tar.read(100, 1000)


def test_reading_after_closing(open_tar: OpenTar) -> None:
    tar = open_tar(bytes(1024))
    tar.close()
    tar.close()
    for use in (lambda: tar.read(0, 1), lambda: list(tar.entries())):
        with pytest.raises(StorageFailure, match="Bad file descriptor"):
            use()


def test_any_damage_is_an_error_of_ours(make_tar: MakeTar, open_tar: OpenTar) -> None:
    """Every third byte of the headers, flipped: read differently or refused, never another exception."""
    made = make_tar(
        [(info("a" * 120, mtime=1.5), b"x"), (info("s", tarfile.SYMTYPE, linkname="t" * 120), b"")]
    )
    outcomes = set()
    for position in range(0, len(made), 3):
        damaged = made[:position] + bytes([made[position] ^ 0x15]) + made[position + 1 :]
        try:
            outcomes.add(len(entries(open_tar, damaged)))
        except FusesnapError:
            outcomes.add(-1)
    assert outcomes == {-1, 2}
