"""Programs: run to their end, or kept running and then surely ended."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

POLL_SECONDS = 0.02
LOWEST_PORT = 10_000  # below are ports of well-known services
END_SECONDS = 5  # from SIGTERM to SIGKILL


class CommandFailed(Exception):
    """A program ended with another status than 0, ran out of time, or did not become ready."""


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
) -> str:
    """Run a program and return its standard output.

    ``timeout`` is in seconds. Bytes that are not UTF-8 come as surrogates. Raises CommandFailed with what the program
    said on both streams.
    """
    done = run_unchecked(argv, timeout=timeout, env=env, cwd=cwd, stdin=stdin)
    if done.returncode != 0:
        raise CommandFailed(
            f"{_shown(argv)} ended with status {done.returncode}:\n{done.stderr}{done.stdout}".rstrip()
        )
    return done.stdout


def run_unchecked(
    argv: Sequence[str | Path],
    *,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever its status. Raises CommandFailed only when time runs out."""
    # A session of its own, so that Ctrl-C at a terminal reaches us alone and we end things in order.
    process = subprocess.Popen(
        [str(word) for word in argv],
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="surrogateescape",
        env=None if env is None else {**os.environ, **env},
        cwd=cwd,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(stdin, timeout)
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"{_shown(argv)} did not end within {timeout:g} s") from None
    finally:
        _end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run_until_output(
    argv: Sequence[str | Path], on_output: Callable[[], None], *, timeout: float = 60
) -> str:
    """Run a program to its end; ``on_output`` is called as soon as its standard output has something.

    Returns the standard output. Raises CommandFailed when the program fails, says nothing, or takes longer.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        try:
            readable = _wait_readable(process.stdout, timeout)
            if readable:
                on_output()
                output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            readable = False
        finally:
            _end(process)
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    if not readable:
        raise CommandFailed(f"{_shown(argv)} did not end within {timeout:g} s:\n{said}")
    if process.returncode != 0 or not output:
        raise CommandFailed(f"{_shown(argv)} ended with status {process.returncode}:\n{said}")
    return output.decode(errors="surrogateescape")


def _end(process: subprocess.Popen[Any]) -> None:
    """End a program that has not ended by itself, with time to end what it has started (Nix its builders)."""
    if process.returncode is not None:
        return
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=END_SECONDS)
    kill_group(process.pid)
    process.communicate()


def _wait_readable(stream: IO[bytes] | None, timeout: float) -> bool:
    return bool(stream and select.select([stream], [], [], timeout)[0])


class Service:
    """A program that is kept running; its output goes to ``log``."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, stop_timeout: float) -> None:
        self._process = process
        self._stop_timeout = stop_timeout
        self.log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def log_text(self) -> str:
        """What the program has said so far, on both streams."""
        return self.log.read_text(errors="surrogateescape")

    def wait_until(self, ready: Callable[[], bool], *, timeout: float = 30) -> None:
        """Wait until ``ready()``. Raises CommandFailed with the log when the program ends or ``timeout`` s pass."""
        name = _shown(self._words())
        deadline = time.monotonic() + timeout
        while not ready():
            if not self.alive:
                status = self._process.returncode
                raise CommandFailed(f"{name} ended with status {status}:\n{self.log_text()}")
            if time.monotonic() > deadline:
                raise CommandFailed(f"{name} was not ready in {timeout:g} s:\n{self.log_text()}")
            time.sleep(POLL_SECONDS)

    def wait_for_line(self, prefix: str, *, timeout: float = 30) -> str:
        """Wait until a whole line of the log starts with ``prefix``, and return it without its end."""
        found: list[str] = []

        def ready() -> bool:
            lines = self.log_text().splitlines(keepends=True)
            found.extend(line for line in lines if line.startswith(prefix) and line.endswith("\n"))
            return bool(found)

        self.wait_until(ready, timeout=timeout)
        return found[0].rstrip("\n")

    def stop(self) -> int:
        """Ask the program to end (SIGTERM), then end its whole process group. Returns its exit status."""
        try:
            if self.alive:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(self._stop_timeout)
        finally:
            status = self.kill()
        return status

    def kill(self) -> int:
        """End the program and its process group with SIGKILL, and wait until they are gone."""
        kill_group(self.pid)
        status = self._process.wait()
        wait_for_group(self.pid)
        return status

    def _words(self) -> list[str]:
        return [str(word) for word in self._process.args]  # type: ignore[union-attr]


@contextlib.contextmanager
def running(
    argv: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stop_timeout: float = 15,
) -> Iterator[Service]:
    """Keep a program running for the time of the context; its process group is gone afterwards.

    ``stop_timeout`` is how many seconds it has to end by itself after SIGTERM.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=None if env is None else {**os.environ, **env},
            cwd=cwd,
            start_new_session=True,
        )
    service = Service(process, log, stop_timeout)
    try:
        yield service
    finally:
        service.stop()


def kill_group(group: int) -> None:
    """SIGKILL to every process of the group, if there still is one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def wait_for_group(group: int, *, timeout: float = 10) -> None:
    """Wait until the group has no process. Raises CommandFailed when ``timeout`` s do not suffice."""
    _wait_until_gone(lambda: os.killpg(group, 0), f"process group {group}", timeout)


def wait_for_process(pid: int, *, timeout: float = 10) -> None:
    """Wait until a process that need not be our child is gone. Raises CommandFailed after ``timeout`` s."""
    _wait_until_gone(lambda: os.kill(pid, 0), f"process {pid}", timeout)


def _wait_until_gone(probe: Callable[[], None], what: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with contextlib.suppress(ProcessLookupError):
        while True:
            probe()
            if time.monotonic() > deadline:
                raise CommandFailed(f"{what} is still there {timeout:g} s after SIGKILL")
            time.sleep(POLL_SECONDS)


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nothing listens.

    It is below those that the kernel gives to connections by itself (ip(7)): one of them may else take it before a
    server does, or while the server is stopped.
    """
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = LOWEST_PORT + secrets.randbelow(max(given - LOWEST_PORT, LOWEST_PORT))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def listens(port: int) -> bool:
    """Whether something accepts connections on that port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _shown(argv: Sequence[str | Path]) -> str:
    return " ".join(str(word) for word in argv)
