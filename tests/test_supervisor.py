"""The supervisor's answer to FUSE_INIT, and how it treats what dies."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap import supervisor


def init_request(minor: int, flags: int, flags2: int, readahead: int = 131072) -> bytes:
    body = struct.pack("<IIIII44x", 7, minor, readahead, flags, flags2)
    size = supervisor.IN_HEADER.size + len(body)
    return supervisor.IN_HEADER.pack(size, 26, 77, 0, 0, 0, 0, 0, 0) + body


@given(minor=st.integers(31, 60), flags=st.integers(0, 2**32 - 1), flags2=st.integers(0, 2**32 - 1))
def test_only_what_the_kernel_offers_is_asked_for(minor: int, flags: int, flags2: int) -> None:
    answer = supervisor.answer_init(init_request(minor, flags, flags2), 16384)
    length, error, unique = supervisor.OUT_HEADER.unpack_from(answer)
    assert (length, error, unique) == (len(answer), 0, 77)
    fields = supervisor.INIT_OUT.unpack_from(answer, supervisor.OUT_HEADER.size)
    assert fields[0] == 7
    assert fields[1] <= min(minor, supervisor.PROTOCOL_MINOR)
    assert fields[2] == 16384
    assert fields[3] & ~flags == 0
    assert fields[10] & ~flags2 == 0


def test_readahead_is_never_more_than_the_kernel_offers() -> None:
    answer = supervisor.answer_init(init_request(40, 0, 0, readahead=4096), 1 << 20)
    assert supervisor.INIT_OUT.unpack_from(answer, supervisor.OUT_HEADER.size)[2] == 4096


def test_another_request_than_init_ends_it_with_a_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    request = bytearray(init_request(40, 0, 0))
    struct.pack_into("<I", request, 4, 15)
    with pytest.raises(SystemExit):
        supervisor.answer_init(bytes(request), 0)
    assert "opcode 15, not 26" in capsys.readouterr().err


def child(tmp_path: Path, *command: str) -> supervisor.Child:
    return supervisor.Child("test", [sys.executable, "-c", *command])


def test_a_child_says_that_it_serves(tmp_path: Path) -> None:
    one = child(
        tmp_path, "import os, sys; os.write(int(sys.argv[1]), b'ready\\n'); sys.stdin.read()"
    )
    one.start()
    one.note_ready()
    assert one.serves
    one.stop()
    assert one.process is not None
    assert one.process.returncode is not None


def test_a_child_that_dies_without_a_word_does_not_count_as_serving(tmp_path: Path) -> None:
    one = child(tmp_path, "pass")
    one.start()
    one.note_ready()
    assert not one.serves
    one.stop()


def test_a_child_that_keeps_dying_young_waits_longer_each_time(tmp_path: Path) -> None:
    one = child(tmp_path, "raise SystemExit(3)")
    waits: list[float] = []
    for _ in range(4):
        one.start()
        assert one.process is not None
        one.process.wait()
        assert one.buried()
        assert one.process is None
        waits.append(one.wait)
    assert waits == sorted(waits)
    assert waits[-1] > waits[0]
    assert not one.buried()


def test_it_imports_nothing_that_can_wedge_it() -> None:
    code = (
        "import sys; import fusesnap.supervisor; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'pyfuse3', 'trio', 'httpx', 'grpc', 'pydantic', 'click', 'rich', 'nacl', 'asyncio', 'ssl'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_second_daemon_is_kept_out_and_told_who_is_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = f'{{"root": "{tmp_path}", "readahead": 16384, "address": "{tmp_path}/s"}}'
    lock = supervisor.Supervisor(settings).lock()
    with pytest.raises(SystemExit) as caught:
        supervisor.Supervisor(settings).lock()
    assert caught.value.code == 75
    assert f"in use by another daemon (pid {os.getpid()})" in capsys.readouterr().err
    os.close(lock)
    os.close(supervisor.Supervisor(settings).lock())


@pytest.mark.parametrize(
    ("listed", "name"),
    [("/a\\040b", "/a b"), ("/a\\011b", "/a\tb"), ("/a\\012b", "/a\nb"), ("/a\\134040", "/a\\040")],
)
def test_names_in_the_kernels_list_of_mounts_are_unescaped(listed: str, name: str) -> None:
    assert supervisor.unescaped(listed) == name
