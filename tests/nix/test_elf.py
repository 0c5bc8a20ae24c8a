"""What the loader will want: of the real thing, of what a compiler makes, and of nonsense."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.nix.elf import Dynamic, Range, read_dynamic


def look(data: bytes) -> Dynamic | None:
    """Let the reader see ``data``."""
    reader: Generator[Range, bytes, Dynamic | None] = read_dynamic()
    wanted = next(reader)
    try:
        while True:
            wanted = reader.send(data[wanted.offset : wanted.offset + wanted.size])
    except StopIteration as end:
        found: Dynamic | None = end.value
        return found


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A program that needs two libraries, by a compiler and linker."""
    directory = tmp_path_factory.mktemp("elf")
    (directory / "program.c").write_text("int main(void) { return 0; }\n")
    (directory / "lib.c").write_text("int unused;\n")
    library = directory / "libexample.so.1"
    compiler = ["gcc", "-o"]
    soname = "-Wl,-soname,libexample.so.1"
    subprocess.run([*compiler, library, "-shared", soname, directory / "lib.c"], check=True)
    options = [
        "-Wl,--no-as-needed",
        "-Wl,--dynamic-linker,/nix/store/loader/ld.so",
        "-Wl,-rpath,/nix/store/a/lib:/nix/store/b/lib",
        "-Wl,--enable-new-dtags",
    ]
    built = directory / "program"
    subprocess.run([*compiler, built, *options, directory / "program.c", library], check=True)
    return built.read_bytes()


def test_a_program(program: bytes) -> None:
    found = look(program)
    assert found is not None
    assert found.interpreter == b"/nix/store/loader/ld.so"
    assert found.needed == (b"libexample.so.1", b"libc.so.6")
    assert found.search == (b"/nix/store/a/lib", b"/nix/store/b/lib")


def test_tables_are_what_precedes_the_code_and_what_may_be_written() -> None:
    file = Path("/bin/ls")
    listing = subprocess.run(
        ["readelf", "--segments", "--wide", file], check=True, capture_output=True, text=True
    ).stdout
    loaded = [line.split() for line in listing.splitlines() if line.split()[:1] == ["LOAD"]]
    expected = tuple(
        Range(int(words[1], 16), int(words[4], 16))
        for words in loaded
        if "E" not in words and ("RW" in words or int(words[1], 16) == 0)
    )
    found = look(file.read_bytes())
    assert found is not None
    assert len(expected) == 2
    assert found.tables == expected


def test_what_readelf_finds_this_finds_too() -> None:
    for file in (Path("/bin/ls"), Path("/bin/bash"), *Path("/usr/lib").glob("*/libssl.so.3")):
        listing = subprocess.run(
            ["readelf", "--dynamic", "--wide", file], check=True, capture_output=True, text=True
        ).stdout
        expected = tuple(
            line.split("[")[1].rstrip("]").encode()
            for line in listing.splitlines()
            if "(NEEDED)" in line
        )
        found = look(file.read_bytes())
        assert found is not None
        assert found.needed == expected


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"#!/bin/sh\n", b"\x7fELF\x09\x09" + bytes(60)])
def test_what_is_no_elf_file_is_nothing(data: bytes) -> None:
    assert look(data) is None


@given(st.data())
def test_damage_is_nothing_or_something_but_no_error(program: bytes, data: st.DataObject) -> None:
    damaged = bytearray(program)
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, 1023) | st.integers(0, len(program) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(program)))
    look(bytes(damaged[:cut]))


def test_big_endian_and_32_bits_are_read() -> None:
    """One of each, by hand: a header, PT_LOAD over all, PT_DYNAMIC with NEEDED and RUNPATH."""
    strings = b"\0libx.so\0/nix/store/a/lib\0"
    for wide, order in ((False, "<"), (False, ">"), (True, ">")):
        head = 64 if wide else 52
        program_header = struct.Struct(order + ("IIQQQQQQ" if wide else "IIIIIIII"))
        entry = struct.Struct(order + ("QQ" if wide else "II"))
        dynamic_at = head + 2 * program_header.size
        table = [(1, 1), (29, 9), (5, 0x1000 + dynamic_at + 4 * entry.size), (0, 0)]
        dynamic = b"".join(entry.pack(*each) for each in table)
        total = dynamic_at + len(dynamic) + len(strings)
        ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2]) + bytes(10)
        header = bytearray(ident + bytes(head - 16))
        struct.pack_into(order + ("Q" if wide else "I"), header, 32 if wide else 28, head)
        struct.pack_into(order + "HH", header, 54 if wide else 42, program_header.size, 2)

        def segment(kind: int, offset: int, size: int, *, wide: bool = wide) -> tuple[int, ...]:
            address = 0x1000 + offset
            if wide:
                return kind, 0, offset, address, 0, size, size, 0
            return kind, offset, address, 0, size, size, 0, 0

        segments = [segment(1, 0, total), segment(2, dynamic_at, len(dynamic))]
        body = b"".join(program_header.pack(*each) for each in segments)
        found = look(bytes(header) + body + dynamic + strings)
        tables = (Range(0, total),)
        assert found == Dynamic(b"", (b"libx.so",), (b"/nix/store/a/lib",), tables)
