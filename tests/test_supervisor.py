"""The supervisor's parts: the answer to FUSE_INIT, what dies or hangs, the lock, the handover, the service manager."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap import fuse_mount
from fusesnap.child import LONGEST_WAIT, START_LIMIT, Child, Process
from fusesnap.daemon_lock import DaemonLock, DaemonState, InUse, running_daemon
from fusesnap.fuse_mount import Connection, MountFailure, unescaped
from fusesnap.handover import Handover
from fusesnap.systemd import ServiceManager, stored


def init_request(minor: int, flags: int, flags2: int, readahead: int = 131072) -> bytes:
    body = struct.pack("<IIIII44x", 7, minor, readahead, flags, flags2)
    size = fuse_mount.IN_HEADER.size + len(body)
    return fuse_mount.IN_HEADER.pack(size, 26, 77, 0, 0, 0, 0, 0, 0) + body


@given(minor=st.integers(31, 60), flags=st.integers(0, 2**32 - 1), flags2=st.integers(0, 2**32 - 1))
def test_only_what_the_kernel_offers_is_asked_for(minor: int, flags: int, flags2: int) -> None:
    answer = fuse_mount.answer_init(init_request(minor, flags, flags2), 16384)
    length, error, unique = fuse_mount.OUT_HEADER.unpack_from(answer)
    assert (length, error, unique) == (len(answer), 0, 77)
    fields = fuse_mount.INIT_OUT.unpack_from(answer, fuse_mount.OUT_HEADER.size)
    assert fields[0] == 7
    assert fields[1] <= min(minor, fuse_mount.PROTOCOL_MINOR)
    assert fields[2] == 16384
    assert fields[3] & ~flags == 0
    assert fields[10] & ~flags2 == 0


def test_readahead_is_never_more_than_the_kernel_offers() -> None:
    answer = fuse_mount.answer_init(init_request(40, 0, 0, readahead=4096), 1 << 20)
    assert fuse_mount.INIT_OUT.unpack_from(answer, fuse_mount.OUT_HEADER.size)[2] == 4096


def test_another_request_than_init_is_refused_with_a_reason() -> None:
    request = bytearray(init_request(40, 0, 0))
    struct.pack_into("<I", request, 4, 15)
    with pytest.raises(MountFailure, match=r"opcode 15, not 26"):
        fuse_mount.answer_init(bytes(request), 0)


def test_mounts_below_a_directory_are_taken_away(tmp_path: Path) -> None:
    for name in ("below/1", "below/1/2", "beside"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path / name], check=True)
        (tmp_path / name / "2").mkdir()
    fuse_mount.detach_below(tmp_path / "below")
    left = {point for point in fuse_mount.mount_points() if point.startswith(str(tmp_path))}
    assert left == {f"{tmp_path}/beside"}
    fuse_mount.detach(tmp_path / "beside")


@pytest.mark.parametrize(("flags2", "can"), [(0, False), (fuse_mount.HAS_RESEND, True)])
def test_whether_the_kernel_can_resend_is_in_its_first_request(flags2: int, can: bool) -> None:
    assert Connection(-1, init_request(40, 0, flags2), "0:1").can_resend is can


# ------------------------------------------------------------------- children

SPEAKS = "import os, sys; line = int(sys.argv[1]); os.write(line, b'loaded\\n'); "
SERVES = SPEAKS + "os.read(line, 1); os.write(line, b'ready\\n'); sys.stdin.read(); "
LIVES = SERVES + "os.read(line, 1)"


@pytest.fixture
def made() -> Iterator[list[Child]]:
    """Children, whose processes are gone afterwards."""
    children: list[Child] = []
    yield children
    for each in children:
        for process in each.processes:
            process.signal(signal.SIGKILL)
            os.waitpid(process.pid, 0)
            process.hang_up()


def child(made: list[Child], code: str, **options: float) -> Child:
    one = Child("test", lambda: ([sys.executable, "-c", code], ()), **options)  # type: ignore[arg-type]
    made.append(one)
    return one


def tend_until(one: Child, condition: Callable[[], bool], *, elapsed: float = 0.0) -> None:
    """Do what the supervisor's loop does, on a clock that does not move unless ``elapsed`` says so.

    Where it does not, it is late: whatever is to be started is due.
    """
    now = 0.0 if elapsed else 1e9
    while not condition():
        now += elapsed
        one.tend(now, elapsed)
        lines = [process.line for process in one.processes if process.line >= 0]
        select.select(lines, [], [], 0.01)
        for process in one.processes:
            if process.line >= 0:
                process.hear()


def test_a_child_says_that_it_serves(made: list[Child]) -> None:
    one = child(made, LIVES)
    tend_until(one, lambda: one.serves)


def test_a_child_that_closes_its_line_after_that_is_left_alone(made: list[Child]) -> None:
    one = child(made, SERVES + "os.close(line); import signal; signal.pause()", watchdog=5.0)
    tend_until(one, lambda: one.process is not None and one.serves and one.process.line < 0)
    process = one.process
    assert process is not None
    for now in range(100):
        one.tend(float(now), 1.0)
    assert one.process is process
    assert process.ended() is None


def test_the_line_of_a_dead_one_is_not_waited_on_while_a_new_one_shares_it(
    made: list[Child],
) -> None:
    poll = select.epoll()
    one = child(made, SPEAKS)
    one.listen = lambda process: process.wait_on(poll)
    one.tend(1e9, 0.0)
    assert one.process is not None
    shared = os.dup(one.process.line)  # as between fork and exec
    try:
        pid = one.process.pid
        tend_until(one, lambda: one.process is None or one.process.pid != pid)
        for process in one.processes:
            process.hang_up()
        assert poll.poll(0) == []
    finally:
        os.close(shared)
        poll.close()


def test_a_child_that_keeps_dying_young_waits_longer_each_time(
    made: list[Child], capfd: pytest.CaptureFixture[str]
) -> None:
    one = child(made, "raise SystemExit(3)")
    waits: list[float] = []
    now = 0.0
    for _ in range(10):
        one.tend(now, 0.0)
        while one.process is not None:
            one.tend(now, 0.0)
            if one.process is not None:
                select.select([one.process.line], [], [], 0.01)
            if one.due > now:
                break
        waits.append(round(one.due - now, 6))
        now = max(now, one.due)
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_WAIT
    assert "test ended with 3 before it served" in one.failure
    assert "starting it again in 10.0 s" in capfd.readouterr().err


def test_a_child_that_cannot_be_started_is_tried_again(
    made: list[Child], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = Child("test", lambda: ([str(tmp_path / "none")], ()))
    for now in range(3):
        one.tend(float(now), 0.0)
    assert one.process is None
    assert "test could not be started: " in capfd.readouterr().err


def test_a_child_that_falls_silent_is_killed_and_replaced(
    made: list[Child], capfd: pytest.CaptureFixture[str]
) -> None:
    one = child(made, LIVES, watchdog=10.0)
    tend_until(one, lambda: one.serves)
    first = one.process
    assert first is not None
    tend_until(one, lambda: one.process is not first, elapsed=1.0)
    tend_until(one, lambda: one.serves)
    assert f"(pid {first.pid}) gave no sign of life for 10 s" in capfd.readouterr().err


def test_a_child_that_speaks_is_not_silent(made: list[Child]) -> None:
    one = child(made, SERVES + "[os.write(line, b'.') for _ in iter(int, 1)]", watchdog=10.0)
    tend_until(one, lambda: one.serves)
    first = one.process
    assert first is not None
    for now in range(100):
        select.select([first.line], [], [])
        first.hear()
        one.tend(float(now), 1.0)
    assert one.process is first


def test_a_child_that_never_serves_is_killed(
    made: list[Child], capfd: pytest.CaptureFixture[str]
) -> None:
    one = child(made, SPEAKS + "import signal; signal.pause()")
    tend_until(one, lambda: one.failure != "", elapsed=1.0)
    assert f"does not serve after {START_LIMIT:.0f} s" in capfd.readouterr().err


def test_a_spare_one_takes_over(made: list[Child]) -> None:
    one = child(made, LIVES, keep_spare=True)
    tend_until(one, lambda: one.spare is not None and one.spare.loaded)
    first, spare = one.process, one.spare
    assert first is not None
    assert spare is not None
    assert not spare.serves
    first.signal(signal.SIGKILL)
    tend_until(one, lambda: one.process is spare and one.serves)
    tend_until(one, lambda: one.spare is not None)


def test_a_successor_waits_until_its_predecessor_has_ended(made: list[Child]) -> None:
    one = child(made, LIVES)
    tend_until(one, lambda: one.serves)
    old, one.old, one.process = one.process, one.process, None
    assert old is not None
    tend_until(one, lambda: one.old is not None and one.old.told)
    assert one.process is not None
    assert one.process.loaded
    assert not one.process.has_turn
    tend_until(one, lambda: one.old is None and one.serves)


def test_a_successor_that_cannot_load_does_no_harm(
    made: list[Child], capfd: pytest.CaptureFixture[str]
) -> None:
    one = child(made, LIVES)
    tend_until(one, lambda: one.serves)
    old, one.old, one.process = one.process, one.process, None
    one.launch = lambda: ([sys.executable, "-c", "raise SystemExit(3)"], ())
    tend_until(one, lambda: one.failure != "")
    assert one.old is old
    assert old is not None
    assert not old.told
    assert old.ended() is None
    assert "ended with 3" in capfd.readouterr().err


def test_children_do_not_get_what_is_the_supervisors_alone(
    made: list[Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    one = child(made, SPEAKS + "assert 'NOTIFY_SOCKET' not in os.environ; " + LIVES)
    tend_until(one, lambda: one.serves)


def test_a_child_whose_supervisor_is_gone_before_its_turn_ends(made: list[Child]) -> None:
    code = "import sys; from fusesnap.daemon.turn import wait_for_turn; wait_for_turn(int(sys.argv[1]))"
    process = Process.start("test", [sys.executable, "-c", code], ())
    process.hang_up()
    _, status = os.waitpid(process.pid, 0)
    assert status == 0


# ----------------------------------------------------------------- the process


def test_it_imports_nothing_that_can_wedge_it() -> None:
    code = (
        "import sys; import fusesnap.supervisor; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'pyfuse3', 'trio', 'httpx', 'grpc', 'pydantic', 'click', 'rich', 'nacl', 'asyncio', 'ssl'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_second_daemon_is_kept_out_and_told_who_is_in(tmp_path: Path) -> None:
    lock = DaemonLock.take(tmp_path)
    with pytest.raises(InUse, match=rf"in use by another daemon \(pid {os.getpid()}\)"):
        DaemonLock.take(tmp_path)
    lock.tell(2, "failed", "for a reason")
    assert running_daemon(tmp_path) == DaemonState(os.getpid(), 2, "failed", "for a reason")
    os.close(lock.descriptor)
    assert running_daemon(tmp_path) is None
    os.close(DaemonLock.take(tmp_path).descriptor)


def test_where_there_never_was_a_daemon_there_is_none(tmp_path: Path) -> None:
    assert running_daemon(tmp_path) is None


def test_a_lock_that_an_earlier_version_wrote_still_names_its_process(tmp_path: Path) -> None:
    lock = DaemonLock.take(tmp_path)
    os.truncate(lock.descriptor, 0)
    os.pwrite(lock.descriptor, b"77\n", 0)
    assert running_daemon(tmp_path) == DaemonState(77, 0, "starting", "")
    os.close(lock.descriptor)


def test_what_is_handed_over_survives_another_version(tmp_path: Path) -> None:
    memory = os.memfd_create("test")
    handover = Handover("00ff", "0:57", relayed=True, pending=["aa"], children={"worker": (7, 9)})
    handover.write(memory)
    said = json.loads(os.pread(memory, 4096, 0))
    os.pwrite(memory, json.dumps({**said, "of a later version": 1}).encode(), 0)
    read = Handover.read(memory)
    assert read.pending == ["aa"]
    assert tuple(read.children["worker"]) == (7, 9)
    assert read.connection == Connection(-1, b"\x00\xff", "0:57")
    os.close(memory)


def test_messages_and_descriptors_reach_the_service_manager(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        to = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "notify"), "FDSTORE": "4"})
        to.say("READY=1", "STATUS=well")
        assert manager.recv(100) == b"READY=1\nSTATUS=well"
        read_end, write_end = os.pipe()
        to.say("FDSTORE=1", "FDNAME=x", descriptors=(read_end,))
        _, (copy,), _, _ = socket.recv_fds(manager, 100, 1)
        os.write(write_end, b"same")
        assert os.read(copy, 10) == b"same"
        for descriptor in (read_end, write_end, copy):
            os.close(descriptor)


def test_its_own_signs_of_life_come_twice_in_the_given_time(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        to = ServiceManager(
            {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "20000000"}
        )
        for now in range(100, 120):
            to.beat(float(now))
        assert [manager.recv(100), manager.recv(100)] == [b"WATCHDOG=1", b"WATCHDOG=1"]
        with pytest.raises(BlockingIOError):
            manager.recv(100)


def test_without_a_service_manager_nothing_is_said() -> None:
    manager = ServiceManager({})
    manager.say("READY=1")
    assert not manager.keeps


def test_a_service_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "none")}).say("READY=1")


def test_descriptors_meant_for_another_process_are_not_taken() -> None:
    assert (
        stored({"LISTEN_FDS": "2", "LISTEN_PID": "1", "LISTEN_FDNAMES": "fuse:fusesnap-state"})
        == {}
    )
    assert stored({}) == {}


@pytest.mark.parametrize(
    ("listed", "name"),
    [("/a\\040b", "/a b"), ("/a\\011b", "/a\tb"), ("/a\\012b", "/a\nb"), ("/a\\134040", "/a\\040")],
)
def test_names_in_the_kernels_list_of_mounts_are_unescaped(listed: str, name: str) -> None:
    assert unescaped(listed) == name
