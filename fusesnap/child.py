"""The supervisor's children: started, watched, replaced.

Each has a line to us, one end of a socket pair, on which it says ``loaded`` when its code is imported, then waits for a
byte (its turn), and says ``ready`` when it serves. The worker then says something every second, or it hangs. So a
successor loads while its predecessor serves, and one that cannot even load does no harm.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

# A child that dies before it has served for so many seconds is dying young: the second time in a row, and from then on,
# it waits before it is started again. No longer than what brings it down needs: one that is killed now and then by
# others must not keep readers waiting.
YOUNG = 0.05
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0
# A child that is told to stop has this many seconds: one that hangs must not keep the node from stopping.
GRACE = 7.0
# To import, open the store and recover it. Generous: a node that boots has other things to do.
START_LIMIT = 60.0

# What concerns us alone is not for children: they would speak to systemd in our name.
OURS = frozenset(
    (
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_FDNAMES",
        "FDSTORE",
        "FUSESNAP_HANDOVER",
    )
)

Launch = Callable[[], tuple[list[str], tuple[int, ...]]]  # the command, and the descriptors it gets


def log(message: str) -> None:
    """A line for the journal. That nobody reads it, or the disk is full, must not end what holds the mount."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"fusesnap supervisor: {message}\n")
        sys.stderr.flush()


def spawn(command: list[str], descriptors: tuple[int, ...], output: int = -1) -> int:
    """Start a process with these descriptors, standard output and error to ``output`` if given. Returns its id.

    Exec, never only fork: a copy of us that holds the FUSE descriptor would turn our death into a hang.
    """
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)
    ]
    if output >= 0:
        actions += [(os.POSIX_SPAWN_DUP2, output, number) for number in (1, 2)]
    environment = {key: value for key, value in os.environ.items() if key not in OURS}
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    try:
        return os.posix_spawn(
            command[0], command, environment,
            file_actions=actions, setsigmask=[], setsigdef=[signal.SIGPIPE],
        )  # fmt: skip
    finally:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)


# sysexits.h: what a child ends with when it has said why it cannot go on, and trying again would not help.
REFUSALS = range(64, 79)


@dataclass
class Process:
    """One running process, and what it has said."""

    name: str
    pid: int
    line: int  # our end; -1 when it has closed its own
    loaded: bool = False
    serves: bool = False
    has_turn: bool = False
    told: bool = False  # to stop
    silent: float = 0.0  # seconds without a word, counted while we were awake ourselves
    lived: float = 0.0
    served: float = 0.0  # seconds
    poll: select.epoll | None = None  # where the line is waited on

    @classmethod
    def start(cls, name: str, command: list[str], descriptors: tuple[int, ...]) -> Process:
        """Start it with the number of its line as last argument. Raises ``OSError``."""
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            try:
                pid = spawn([*command, str(number)], (*descriptors, number))
            except OSError:
                ours.close()
                raise
        ours.setblocking(False)
        return cls(name, pid, ours.detach())

    def wait_on(self, poll: select.epoll) -> None:
        """Have the line waited on."""
        poll.register(self.line, select.EPOLLIN)
        self.poll = poll

    def hear(self) -> None:
        """The line has something to say: words, or its end."""
        try:
            said = os.read(self.line, 4096)
        except BlockingIOError:
            return
        except ConnectionResetError:
            said = b""
        if not said:
            self.hang_up()
        self.silent = 0.0
        self.loaded = self.loaded or b"loaded" in said
        self.serves = self.serves or b"ready" in said

    def give_turn(self) -> None:
        """Nobody is before it any more."""
        self.has_turn, self.silent = True, 0.0
        with contextlib.suppress(OSError):  # it is dead, as will be seen
            os.write(self.line, b"g")

    def ended(self) -> int | None:
        """Its exit status (negative: the signal's number) once it has ended. It is gone then: ask no more."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        self.hang_up()
        return os.waitstatus_to_exitcode(status)

    def signal(self, number: int) -> None:
        """Send a signal to it; it is not yet waited for, so the number is still its own."""
        os.kill(self.pid, number)

    def tell_to_stop(self) -> None:
        """Once."""
        if not self.told:
            self.told, self.silent = True, 0.0
            self.signal(signal.SIGTERM)

    def hang_up(self) -> None:
        """Close the line.

        That alone would not end the waiting: a child that is being started shares our descriptors until its exec has
        closed them, and that may be after posix_spawn has returned.
        """
        if self.line >= 0:
            if self.poll is not None:
                self.poll.unregister(self.line)
            os.close(self.line)
            self.line = -1

    def hangs(self, watchdog: float) -> str:
        """Why it must be killed, or nothing."""
        if self.told:
            return f"did not stop within {GRACE:.0f} s" if self.silent > GRACE else ""
        if self.has_turn and not self.serves:
            return f"does not serve after {START_LIMIT:.0f} s" if self.silent > START_LIMIT else ""
        if self.serves and self.line >= 0 and 0 < watchdog < self.silent:
            return f"gave no sign of life for {watchdog:g} s: it hangs or is stopped"
        return ""


@dataclass
class Child:
    """A process that is to be there as long as we are, its predecessor during a reload, and a spare one.

    ``launch`` says how to start it; ``turn`` runs when a new process takes over; ``listen`` is told of a new line.
    """

    name: str
    launch: Launch
    watchdog: float = 0.0
    turn: Callable[[], None] = lambda: None
    listen: Callable[[Process], None] = lambda process: None
    keep_spare: bool = False
    process: Process | None = None
    old: Process | None = None  # serves until ``process`` is loaded
    spare: Process | None = None  # loaded, and waits for the death of ``process``
    young_deaths: int = 0  # in a row
    due: float = 0.0  # when it may be started
    failure: str = ""  # how the last one ended before it served
    refused: int = 0  # the exit code of one that said, before any ever served, that it cannot

    @property
    def serves(self) -> bool:
        """Whether the newest process serves."""
        return self.process is not None and self.process.serves

    @property
    def processes(self) -> list[Process]:
        """Those that run."""
        return [each for each in (self.process, self.old, self.spare) if each is not None]

    def tend(self, now: float, elapsed: float) -> None:
        """Bury, start, replace, kill what hangs. ``elapsed``: seconds since the last call."""
        self._bury(now)
        if self.process is None and self.due <= now:
            self.process, self.spare = self.spare or self._start(now), None
        elif self.keep_spare and self.serves and not (self.old or self.spare) and self.due <= now:
            self.spare = self._start(now)
        if self.process is not None and not self.process.has_turn:
            if self.old is None:
                self.turn()
                self.process.give_turn()
            elif self.process.loaded:
                self.old.tell_to_stop()
        for process in self.processes:
            process.silent += elapsed
            process.lived += elapsed
            process.served += elapsed if process.serves else 0.0
            if reason := process.hangs(self.watchdog):
                log(f"{self.name} (pid {process.pid}) {reason}: killed")
                process.signal(signal.SIGKILL)
                process.silent = 0.0

    def let_go_of_successor(self) -> None:
        """Before we become another program: only the one that serves is handed on."""
        for process in (self.spare, self.process if self.old is not None else None):
            if process is not None:
                process.signal(signal.SIGKILL)
                os.waitpid(process.pid, 0)
                process.hang_up()
        self.spare = None
        if self.old is not None:
            self.process = None

    def _start(self, now: float) -> Process | None:
        try:
            command, descriptors = self.launch()
            process = Process.start(self.name, command, descriptors)
        except OSError as error:
            self._put_off(now, f"could not be started: {error}")
            return None
        self.listen(process)
        return process

    def _bury(self, now: float) -> None:
        if self.old is not None and (status := self.old.ended()) is not None:
            log(f"{self.name} (pid {self.old.pid}) ended with {status} and is replaced")
            self.old = None
        if self.spare is not None and (status := self.spare.ended()) is not None:
            self._put_off(now, f"(spare, pid {self.spare.pid}) ended with {status}")
            self.spare = None
        if self.process is not None and (status := self.process.ended()) is not None:
            process, self.process = self.process, None
            if not process.serves:
                self.failure = f"{self.name} ended with {status} before it served"
                self.refused = status if status in REFUSALS else 0
            if process.served >= YOUNG:
                self.young_deaths = 0
            said = f"(pid {process.pid}) ended with {status} after {process.lived:.1f} s"
            self._put_off(now, said)

    def _put_off(self, now: float, said: str) -> None:
        """Start it again at once, or later if it keeps dying young."""
        wait = FIRST_WAIT * 2.0 ** (self.young_deaths - 1) if self.young_deaths else 0.0
        self.due = now + min(wait, LONGEST_WAIT)
        self.young_deaths = min(self.young_deaths + 1, 16)
        log(f"{self.name} {said}; starting it again in {self.due - now:.1f} s")


@dataclass
class Check:
    """A command that is run to its end beside us, and what it says on both streams."""

    process: Process
    output: int

    @classmethod
    def start(cls, command: list[str]) -> Check:
        """Raises ``OSError``."""
        output = os.memfd_create("fusesnap-check")
        try:
            return cls(Process("check", spawn(command, (), output), -1), output)
        except OSError:
            os.close(output)
            raise

    def ended(self, elapsed: float) -> tuple[list[str], str] | None:
        """Once it has ended: the command that it answered with, empty if it refused, and all that it said.

        It is killed when that takes too long.
        """
        self.process.lived += elapsed
        if self.process.lived > START_LIMIT:
            self.process.signal(signal.SIGKILL)
        status = self.process.ended()
        if status is None:
            return None
        said = os.pread(self.output, 1 << 20, 0).decode(errors="replace").strip()
        os.close(self.output)
        if status:
            return [], said or f"the check ended with {status}"
        return [str(word) for word in json.loads(said.splitlines()[-1])], said
