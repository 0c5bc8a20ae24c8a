"""The real daemon, in both modes, while its parts die, hang, are replaced and come back; a reader goes on meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from testbed.fusesnap_daemon import PROGRAM, FusesnapDaemon, Source, fusesnap_daemon
from testbed.processes import run, run_unchecked, running, wait_for_process
from testbed.workplace import run_directory

from fusesnap.daemon_lock import running_daemon

from .reader import PATIENCE, Reader, reading, wait_until


@pytest.fixture
def work() -> Iterator[Path]:
    """A directory with a short path: unix sockets have 108 bytes."""
    with run_directory("fs-") as directory:
        yield directory


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "nix-cache-info").write_text("StoreDir: /nix/store\n")
    return Source([f"file://{tmp_path}"], [])


def configure(work: Path, text: str) -> Path:
    path = work / "fusesnap.toml"
    path.write_text(text)
    return path


@pytest.fixture(params=["never", "always"], ids=["direct", "relay"])
def relay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def daemon(work: Path, source: Source, relay: str) -> Iterator[FusesnapDaemon]:
    options = ["--config", str(configure(work, "watchdog = 4\n")), "--relay", relay]
    with fusesnap_daemon(work / "s", source=source, options=options) as started:
        yield started


@pytest.fixture
def reader(daemon: FusesnapDaemon, tmp_path: Path) -> Iterator[Reader]:
    with reading(daemon.state / "lazy", tmp_path / "said") as started:
        started.goes_on()
        yield started


def pid_of(daemon: FusesnapDaemon, part: str) -> int | None:
    """The part's process, if it can be known now."""
    said = run_unchecked([PROGRAM, "status", "--json", "--address", daemon.address])
    if said.returncode:
        return None
    found: int | None = json.loads(said.stdout).get(part, {}).get("pid")
    return found


def is_replaced(daemon: FusesnapDaemon, part: str, pid: int | None) -> bool:
    return pid_of(daemon, part) not in (None, pid)


def serving(daemon: FusesnapDaemon, part: str = "worker") -> int:
    found: list[int | None] = []

    def known() -> bool:
        found.append(pid_of(daemon, part))
        return found[-1] is not None

    wait_until(known)
    assert found[-1] is not None
    return found[-1]


def is_mounted(state: Path) -> bool:
    return f" {state}/lazy " in Path("/proc/self/mountinfo").read_text()


def reload_command(daemon: FusesnapDaemon) -> list[str | Path]:
    return [PROGRAM, "daemon", "reload", "--root", daemon.state]


def test_who_stands_between_kernel_and_worker(daemon: FusesnapDaemon, relay: str) -> None:
    words = Path(f"/proc/{serving(daemon)}/cmdline").read_text().split("\0")
    assert any(word.startswith("relay:") for word in words) is (relay == "always")


def test_a_killed_worker_is_not_noticed(daemon: FusesnapDaemon, reader: Reader) -> None:
    for _ in range(5):
        os.kill(serving(daemon), signal.SIGKILL)
        reader.goes_on()


def test_a_worker_that_hangs_is_replaced(daemon: FusesnapDaemon, reader: Reader) -> None:
    pid = serving(daemon)
    os.kill(pid, signal.SIGSTOP)
    wait_for_process(pid, timeout=PATIENCE)
    reader.goes_on()
    assert serving(daemon) != pid
    assert f"worker (pid {pid}) gave no sign of life for 4 s" in daemon.service.log_text()


def test_it_stops_also_when_its_worker_hangs(daemon: FusesnapDaemon, reader: Reader) -> None:
    os.kill(serving(daemon), signal.SIGSTOP)
    assert daemon.service.stop() == 0
    assert not is_mounted(daemon.state)
    # The reader waited for an answer that nobody gives any more.
    reader.is_told_of_the_end()


def test_a_reload_replaces_everything_but_the_mount(
    daemon: FusesnapDaemon, reader: Reader, work: Path
) -> None:
    worker, services = serving(daemon), serving(daemon, "services")
    configure(work, "watchdog = 4\nrecognise-by-content = false\n")
    said = run(reload_command(daemon), timeout=PATIENCE)
    assert f"the daemon (pid {daemon.service.pid}) serves" in said
    wait_for_process(worker)
    wait_for_process(services)
    assert serving(daemon) != worker
    commands = Path(f"/proc/{serving(daemon)}/cmdline").read_text()
    assert '"recognise-by-content": false' in commands
    reader.goes_on()
    os.kill(serving(daemon), signal.SIGKILL)
    reader.goes_on()


def test_sighup_reloads_too_and_many_times(daemon: FusesnapDaemon, reader: Reader) -> None:
    for count in range(1, 4):
        worker = serving(daemon)
        os.kill(daemon.service.pid, signal.SIGHUP)
        wait_for_process(worker, timeout=PATIENCE)
        reader.goes_on()
        # One that comes while another is under way is the same.
        wait_until(partial(has_reloaded, daemon, count))


def has_reloaded(daemon: FusesnapDaemon, count: int) -> bool:
    """Whether everything is replaced since it was asked for the time ``count``."""
    state = running_daemon(daemon.state)
    return state is not None and (state.reloads, state.state) == (count, "serving")


def test_a_worker_that_cannot_start_after_a_reload_is_tried_again(
    daemon: FusesnapDaemon, reader: Reader
) -> None:
    worker, views = serving(daemon), daemon.state / "views.sqlite"
    kept = {file: file.read_bytes() for file in daemon.state.glob("views.sqlite*")}
    for file in kept:
        file.rename(file.with_name(f"kept-{file.name}"))
    views.write_bytes(b"not a database" * 1000)
    os.kill(daemon.service.pid, signal.SIGHUP)
    wait_until(lambda: "worker (pid" in daemon.service.log_text().rpartition("is replaced")[2])
    assert daemon.service.alive
    for file, data in kept.items():
        file.write_bytes(data)
    assert serving(daemon) != worker
    reader.goes_on()


def test_a_configuration_that_does_not_work_is_refused_and_harms_nobody(
    daemon: FusesnapDaemon, reader: Reader, work: Path
) -> None:
    worker = serving(daemon)
    path = configure(work, "wotchdog = 4\n")
    done = run_unchecked(reload_command(daemon), timeout=PATIENCE)
    assert done.returncode == 1
    assert f"{path}: unknown key 'wotchdog'" in done.stderr
    configure(work, f'netrc-file = "{work}/none"\n')
    done = run_unchecked(reload_command(daemon), timeout=PATIENCE)
    assert done.returncode == 1
    assert f"{work}/none cannot be read" in done.stderr
    assert serving(daemon) == worker
    reader.goes_on()
    configure(work, "watchdog = 5\n")
    run(reload_command(daemon), timeout=PATIENCE)
    wait_for_process(worker)
    reader.goes_on()


def test_another_state_directory_needs_a_restart(work: Path, source: Source) -> None:
    path = configure(work, f'root = "{work}/s"\n')
    command: list[str | Path] = [PROGRAM, "daemon", "--config", path, *source.options]
    with running(command, log=work / "log") as service:
        service.wait_for_line("ready")
        configure(work, f'root = "{work}/t"\n')
        done = run_unchecked([PROGRAM, "daemon", "reload", "--root", work / "s"], timeout=PATIENCE)
        assert done.returncode == 1
        assert f"{work}/t: another state directory than {work}/s needs a restart" in done.stderr
        assert service.stop() == 0


def test_there_is_nothing_to_reload_where_no_daemon_runs(work: Path) -> None:
    done = run_unchecked([PROGRAM, "daemon", "reload", "--root", work])
    assert done.returncode == 69
    assert f"{work}: no daemon runs there" in done.stderr


def test_a_mount_that_somebody_took_away_is_made_again(
    daemon: FusesnapDaemon, tmp_path: Path
) -> None:
    worker = serving(daemon)
    run(["umount", "--lazy", daemon.state / "lazy"])
    wait_until(lambda: is_mounted(daemon.state))
    wait_for_process(worker, timeout=PATIENCE)
    with reading(daemon.state / "lazy", tmp_path / "later") as reader:
        reader.goes_on()


def test_a_new_daemon_leaves_readers_of_a_killed_supervisor_to_their_worker(
    work: Path, source: Source, tmp_path: Path
) -> None:
    state = work / "s"
    with (
        fusesnap_daemon(state, source=source) as first,
        reading(state / "lazy", tmp_path / "said") as reader,
    ):
        worker, services = serving(first), serving(first, "services")
        os.kill(first.service.pid, signal.SIGKILL)
        wait_for_process(services)
        reader.goes_on()
        command: list[str | Path] = [PROGRAM, "daemon", "--root", state, *source.options]
        with running(command, log=work / "second.log") as service:
            service.wait_for_line("ready")
            second = FusesnapDaemon(service, state, first.address)
            assert serving(second) != worker
            with reading(state / "lazy", tmp_path / "new") as new_reader:
                new_reader.goes_on()
                reader.goes_on()
            os.kill(worker, 0)
            reader.end()
            wait_for_process(worker, timeout=PATIENCE)  # nothing is left of its mount
            assert service.stop() == 0


class ServiceManager:
    """What systemd does for a service, as far as its descriptors and its messages go."""

    def __init__(self, work: Path) -> None:
        self.address = work / "notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.address))
        self.socket.settimeout(PATIENCE)
        self.store: dict[str, int] = {}
        self.said: list[str] = []

    def wait_for(self, line: str) -> None:
        """Take messages until one holds the line."""
        lines: list[str] = []
        while line not in lines:
            message, descriptors, _, _ = socket.recv_fds(self.socket, 4096, 4)
            lines = message.decode().splitlines()
            self.said += lines
            names = [each.partition("=")[2] for each in lines if each.startswith("FDNAME=")]
            if "FDSTOREREMOVE=1" in lines and names[0] in self.store:
                os.close(self.store.pop(names[0]))
            self.store.update(zip(names, descriptors, strict=False))

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start the service with what is stored for it, in the place where the protocol wants it."""
        launcher = (
            "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid());"
            "numbers = [os.dup(int(n)) for n in sys.argv[1].split()];"
            "[os.dup2(n, 60 + i, True) for i, n in enumerate(numbers)];"
            "[os.dup2(60 + i, 3 + i, True) for i in range(len(numbers))];"
            "os.closerange(3 + len(numbers), 100); os.execv(sys.argv[2], sys.argv[2:])"
        )
        given = " ".join(map(str, self.store.values()))
        environment = {**os.environ, "NOTIFY_SOCKET": str(self.address), "FDSTORE": "8"}
        if self.store:
            environment |= {
                "LISTEN_FDS": str(len(self.store)),
                "LISTEN_FDNAMES": ":".join(self.store),
            }
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-c", launcher, given, *command], stdout=output, stderr=output,
                env=environment, pass_fds=tuple(self.store.values()), start_new_session=True,
            )  # fmt: skip

    def close(self) -> None:
        for descriptor in self.store.values():
            os.close(descriptor)
        self.store.clear()
        self.socket.close()


@pytest.fixture
def service_manager(work: Path) -> Iterator[ServiceManager]:
    made = ServiceManager(work)
    yield made
    made.close()


def test_under_systemd_a_restart_keeps_the_mount(
    work: Path, source: Source, relay: str, service_manager: ServiceManager, tmp_path: Path
) -> None:
    state, log = work / "s", work / "s.log"
    command = [str(PROGRAM), "daemon", "--root", str(state), "--relay", relay, *source.options]
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: is_mounted(state) and run(["umount", "--lazy", state / "lazy"]))
        service = service_manager.start(command, log)
        stack.callback(
            lambda: os.killpg(service.pid, signal.SIGKILL) if service.poll() is None else 0
        )
        service_manager.wait_for("READY=1")
        assert set(service_manager.store) == {"fuse", "fusesnap-state"}
        reader = stack.enter_context(reading(state / "lazy", tmp_path / "said"))
        reader.goes_on()
        service.send_signal(signal.SIGTERM)
        service_manager.wait_for("STOPPING=1")
        assert service.wait(PATIENCE) == 0
        assert is_mounted(state)
        killed = service_manager.start(command, log)
        stack.callback(
            lambda: os.killpg(killed.pid, signal.SIGKILL) if killed.poll() is None else 0
        )
        reader.goes_on()
        service_manager.wait_for("READY=1")
        os.killpg(
            killed.pid, signal.SIGKILL
        )  # as systemd does with what a killed supervisor leaves
        killed.wait()
        again = service_manager.start(command, log)
        stack.callback(lambda: os.killpg(again.pid, signal.SIGKILL) if again.poll() is None else 0)
        reader.goes_on()
        service_manager.wait_for("READY=1")
        again.send_signal(signal.SIGHUP)
        service_manager.wait_for("RELOADING=1")
        service_manager.wait_for("READY=1")
        reader.goes_on()
        again.send_signal(signal.SIGTERM)
        assert again.wait(PATIENCE) == 0
        service_manager.close()  # as at `systemctl stop`: nobody holds the connection any more
        reader.is_told_of_the_end()


def test_what_was_kept_of_a_mount_that_is_gone_is_not_used(
    work: Path, source: Source, service_manager: ServiceManager
) -> None:
    state, log = work / "s", work / "s.log"
    command = [str(PROGRAM), "daemon", "--root", str(state), *source.options]
    service = service_manager.start(command, log)
    service_manager.wait_for("READY=1")
    service.terminate()
    assert service.wait(PATIENCE) == 0
    run(["umount", "--lazy", state / "lazy"])
    again = service_manager.start(command, log)
    service_manager.wait_for("STOPPING=1")
    service_manager.wait_for("READY=1")
    assert is_mounted(state)
    again.terminate()
    assert again.wait(PATIENCE) == 0
    run(["umount", "--lazy", state / "lazy"])
