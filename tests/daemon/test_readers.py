"""What /proc says of readers: on written files, and on real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fusesnap.daemon.readers import identify, is_dying, is_thread_of, snapshots_of


def write_status(proc: Path, pid: int, own: str, shared: str) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "status").write_text(
        f"Name:\tcat\nSigQ:\t0/1\nSigPnd:\t{own}\nShdPnd:\t{shared}\nSigBlk:\t0000000000000100\n"
    )


@pytest.mark.parametrize(
    ("own", "shared", "dying"),
    [
        ("0000000000000000", "0000000000000000", False),
        ("0000000000000100", "0000000000000000", True),
        ("0000000000000000", "0000000000000100", True),
        ("0000000000004000", "0000000000014002", False),  # SIGTERM and others may be caught
        ("0000000000004100", "0000000000000000", True),
    ],
)
def test_only_a_pending_sigkill_is_fatal(
    tmp_path: Path, own: str, shared: str, dying: bool
) -> None:
    write_status(tmp_path, 7, own, shared)
    assert is_dying(7, tmp_path) is dying


def test_a_process_that_is_gone_is_dead_and_nameless(tmp_path: Path) -> None:
    assert is_dying(8, tmp_path)
    assert identify(8, tmp_path).command == "?"


def test_a_living_process_is_named_and_alive() -> None:
    assert not is_dying(os.getpid())
    assert identify(os.getpid()).command == Path("/proc/self/comm").read_text().strip()


def test_a_stopped_process_with_a_signal_for_later_is_not_dying() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # of two pending signals the lower number comes first
        process.send_signal(signal.SIGTERM)
        assert not is_dying(process.pid)
        process.kill()


def test_threads_belong_to_their_process() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        assert is_thread_of(thread.native_id, os.getpid())
        assert is_thread_of(os.getpid(), os.getpid())
        assert not is_thread_of(thread.native_id, os.getppid())
    finally:
        done.set()
        thread.join()


def test_a_process_is_in_the_snapshot_that_its_root_is(tmp_path: Path) -> None:
    head = "30 20 0:40 / {} rw - overlay overlay rw,lowerdir=/s/1/fs,upperdir={},workdir=/w\n"
    mounts = {
        1: head.format("/", "/s/2/fs"),
        2: head.format("/mnt", "/s/2/fs"),  # mounted there, but not its root
        3: "30 20 8:1 / / rw - ext4 /dev/sda rw\n" + head.format("/mnt", "/s/2/fs"),
        4: head.format("/", "/s/9/fs"),
    }
    for pid, text in mounts.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "mountinfo").write_text(text)
    found = snapshots_of([1, 2, 3, 4, 5], {"/s/2/fs": "default/2/two"}, tmp_path)
    assert found == {1: "default/2/two"}
