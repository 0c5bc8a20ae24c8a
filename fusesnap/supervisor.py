"""The process that holds the mount: it mounts, starts the others, and replaces what dies or hangs.

It is meant to be read in one sitting (with ``child``, ``fuse_mount`` and ``relay`` beside it), and to survive what
kills its children: standard library only, no thread, and no file below the mount is ever opened.

Started as ``python -m fusesnap.supervisor SETTINGS COMMAND...``: SETTINGS is the JSON object that ``fusesnap daemon``
made from its checked configuration, and is handed on to the children as it is; COMMAND is that ``fusesnap daemon``.

SIGTERM and SIGINT end it. SIGHUP replaces everything by what is installed and configured now: COMMAND with ``--check``
is run in a child, and only if it answers, we exec what it says. The mount, the lock and the children stay ours over
the exec. Then a new worker loads while the old one serves; when it is loaded, the old one is told to stop; when that
has ended, the new one joins the mount, and what the old one had taken and not answered is sent again, as after a death.
Two workers never read at once: a read of /dev/fuse blocks where the other was quicker, and libfuse knows no other read.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

from fusesnap import fuse_mount, handover
from fusesnap.child import GRACE, Check, Child, Process, log
from fusesnap.daemon_lock import DaemonLock, InUse, Unusable
from fusesnap.fuse_mount import Connection, MountFailure
from fusesnap.handover import Handover
from fusesnap.load import command_of
from fusesnap.relay import Relay
from fusesnap.systemd import ServiceManager

TICK = 1.0  # seconds between looks at who is silent
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Supervisor:
    """Holds the descriptor of the mount and keeps its children alive."""

    def __init__(self, settings: str, command: list[str], manager: ServiceManager) -> None:
        given = json.loads(settings)
        self.root = Path(given["root"]).resolve()  # as the kernel's list of mounts names it
        self.mountpoint = self.root / "lazy"
        self.readahead = int(given["readahead"])
        self.address = str(given["address"])
        self.relay_wanted = str(given["relay"])
        self.settings = settings
        self.command = command
        self.manager = manager
        self.control = select.epoll()
        self.lines: dict[int, Process] = {}
        self.relay: Relay | None = None
        self.connection: Connection
        self.memory = -1  # what is stored beside the FUSE descriptor
        self.lock: DaemonLock
        self.reloads = 0
        self.announced = self.failed = self.has_served = False
        self.check: Check | None = None
        self.worker = Child(
            "worker", self.launch_worker, float(given["watchdog"]), self.switch, self.listen,
            keep_spare=bool(given["spare-worker"]),
        )  # fmt: skip
        services = Child("services", self.launch_services, listen=self.listen)
        self.children = [self.worker, services]

    # ---------------------------------------------------------------- begin

    def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        wake, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write)
        for number in (signal.SIGCHLD, *HANDLED):
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)  # blocked over exec
        self.control.register(wake, select.EPOLLIN)
        handed = handover.received()
        if handed is not None:
            self.take_over(handed)
        else:
            self.lock = DaemonLock.take(self.root)
            self.attach()
        try:
            self.watch(wake)
        finally:
            self.stop(wake)

    def attach(self) -> None:
        """A mount: the one that the service manager has kept, or a new one instead of what a dead daemon has left."""
        kept = handover.kept(self.mountpoint)
        if kept is None:
            fuse_mount.detach(self.mountpoint)
            self.mountpoint.mkdir(exist_ok=True)
            self.connection = fuse_mount.mount(self.mountpoint, self.readahead)
            self.use_relay(
                self.relay_wanted == "always"
                or (self.relay_wanted == "auto" and not self.connection.can_resend)
            )
        else:
            log(f"{self.mountpoint}: taken over from the service manager")
            self.adopt(kept)
            if not kept.orderly:
                self.connection.resend()  # a worker would do so, but not behind our relay
        self.store()

    def adopt(self, state: Handover) -> None:
        """Use a connection that was begun before us."""
        self.connection = state.connection
        self.use_relay(state.relayed)
        if self.relay is not None:
            pending = [bytes.fromhex(request) for request in state.pending]
            self.relay.adopt(state.relay, pending, map(bytes.fromhex, state.unsent))

    def take_over(self, handed: Handover) -> None:
        """Be what the program before this one in our process was. Its children serve until ours are loaded."""
        self.lock, self.reloads = DaemonLock(handed.lock), handed.generation
        self.has_served = True
        self.adopt(handed)
        self.store()
        named = {child.name: child for child in self.children}
        for name, (pid, line) in handed.children.items():
            process = Process(name, pid, line, loaded=True, serves=True, has_turn=True)
            if name in named:
                named[name].old = process
                self.listen(process)
            else:
                process.tell_to_stop()

    def use_relay(self, wanted: bool) -> None:
        """Whether to stay between kernel and worker is decided once a mount."""
        self.relay = None
        if wanted:
            fuse, request = self.connection.fuse, self.connection.init_request
            self.relay = Relay(fuse, request, self.control.fileno())

    def store(self) -> None:
        """Have the mount kept while we do not run."""
        if self.manager.keeps:
            self.memory = os.memfd_create("fusesnap-state")
            self.state(orderly=False).write(self.memory)
            self.manager.store(self.connection.fuse, self.memory)

    # ------------------------------------------------------------- children

    def launch_worker(self) -> tuple[list[str], tuple[int, ...]]:
        """How to start a worker."""
        fuse = self.connection.fuse if self.relay is None else self.relay.offer()
        shown = str(fuse) if self.relay is None else f"relay:{fuse}"
        return self.room("worker", shown, self.connection.init_request.hex()), (fuse,)

    def launch_services(self) -> tuple[list[str], tuple[int, ...]]:
        """How to start the services process."""
        return self.room("services"), ()

    def room(self, name: str, *arguments: str) -> list[str]:
        """A child's command; the number of its line is appended."""
        return command_of(f"fusesnap.daemon.{name}", self.settings, *arguments)

    def switch(self) -> None:
        """A new worker takes over."""
        if self.relay is not None:
            self.relay.switch()

    def listen(self, process: Process) -> None:
        """Hear what a process says."""
        if process.line >= 0:
            self.lines[process.line] = process
            process.wait_on(self.control)

    # ----------------------------------------------------------------- work

    def watch(self, wake: int) -> None:
        """Start what is due, bury what died, kill what hangs, until told to stop."""
        last = time.monotonic()
        while True:
            now = time.monotonic()
            # A machine that slept, or whose processes were all frozen, has nobody who was silent for that long.
            elapsed, last = min(now - last, 2 * TICK), now
            for child in self.children:
                child.tend(now, elapsed)
            self.give_up()
            if self.connection.lost:
                self.mount_again()
            self.manager.beat(now)
            self.end_check(elapsed)
            self.announce()
            signals = self.wait(wake, now)
            if signal.SIGTERM in signals or signal.SIGINT in signals:
                return
            if signal.SIGHUP in signals:
                self.begin_reload()

    def wait(self, wake: int, now: float) -> bytes:
        """Until something happens or a tick is over. Returns the signals that came."""
        due = [child.due - now for child in self.children if child.process is None]
        timeout = max(0.0, min([TICK, *due]))
        if self.relay is not None:
            self.relay.forward(timeout)
            timeout = 0.0
        signals = b""
        for descriptor, _ in self.control.poll(timeout):
            if descriptor == wake:
                signals = os.read(wake, 64)
            else:
                self.lines[descriptor].hear()
        return signals

    def give_up(self) -> None:
        """End where a child has said, before the daemon ever served, that it cannot: somebody waits for an answer.

        Later, also after a reload, readers would lose the mount by that: then it is tried again and again.
        """
        for child in self.children:
            if child.refused and not self.has_served:
                raise SystemExit(child.refused)

    def mount_again(self) -> None:
        """Somebody has unmounted or aborted our mount. Who used it has got errors; others shall be served."""
        log(f"{self.mountpoint}: the mount is gone: mounting again")
        for process in self.worker.processes:
            process.signal(signal.SIGKILL)
        if self.relay is not None:
            self.relay.close()
        gone = self.connection
        self.attach()
        os.close(gone.fuse)

    def announce(self) -> None:
        """Say once that everything serves, or why a reload has not led there."""
        if self.announced:
            return
        if all(child.serves and child.old is None for child in self.children):
            self.announced = self.has_served = True
            said = f"serving {self.address} from {self.root}"
            with contextlib.suppress(OSError):  # whoever started us need not listen
                sys.stdout.write(f"ready: {said}\n")
                sys.stdout.flush()
            self.manager.say("READY=1", f"STATUS={said}")
            self.lock.tell(self.reloads, "serving")
            return
        failures = [child.failure for child in self.children if child.old and child.failure]
        if failures and not self.failed:
            self.manager.say("READY=1", f"STATUS=reload failed: {failures[0]}")
        self.failed = bool(failures)
        self.lock.tell(self.reloads, "failed" if failures else "starting", "; ".join(failures))

    # --------------------------------------------------------------- reload

    def begin_reload(self) -> None:
        """Ask what is installed now whether it can run with what is configured now."""
        if self.check or any(child.old and child.old.told for child in self.children):
            log("a reload is under way already")
            return
        self.reloads += 1
        self.lock.tell(self.reloads, "reloading")
        self.manager.reloading()
        try:
            self.check = Check.start([*self.command, "--check"])
        except OSError as error:
            self.refuse_reload(f"{self.command[0]}: {error.strerror}")

    def end_check(self, elapsed: float) -> None:
        """Go on with the reload when the check has ended."""
        ended = self.check.ended(elapsed) if self.check else None
        if ended is None:
            return
        self.check = None
        words, said = ended
        root = Path(json.loads(words[4])["root"]).resolve() if words else self.root
        if not words:
            self.refuse_reload(said)
        elif root != self.root:
            self.refuse_reload(f"{root}: another state directory than {self.root} needs a restart")
        else:
            self.become(words)

    def become(self, words: list[str]) -> None:
        """Exec the new supervisor, with everything that is ours."""
        for child in self.children:
            child.let_go_of_successor()
        log("reload: starting the new program")
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        self.state(children=True).keep_over_exec()
        try:
            os.execv(words[0], words)  # noqa: S606
        except OSError as error:
            handover.received()  # close for others what was left open for the new program
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
            self.refuse_reload(f"{words[0]}: {error.strerror}")

    def refuse_reload(self, reason: str) -> None:
        """Go on as before."""
        log(f"reload refused: {reason}")
        self.lock.tell(self.reloads, "failed", reason)
        self.manager.say("READY=1", f"STATUS=reload refused: {reason.splitlines()[-1]}")

    def state(self, *, orderly: bool = True, children: bool = False) -> Handover:
        """What the next supervisor must know; with ``children``, also what belongs to this process."""
        begun = self.connection
        state = Handover(begun.init_request.hex(), begun.device, self.relay is not None, orderly)
        if self.relay is not None:
            state.pending = [request.hex() for request in self.relay.pending.values()]
        if children:
            state.generation, state.lock = self.reloads, self.lock.descriptor
            state.fuse = self.connection.fuse
            if self.relay is not None:
                state.relay = self.relay.worker
                state.unsent = [request.hex() for request in self.relay.unsent]
            for child in self.children:
                if process := child.old or child.process:
                    state.children[child.name] = (process.pid, process.line)
        return state

    # ------------------------------------------------------------------ end

    def stop(self, wake: int) -> None:
        """End the children, all at once and within bounds, and the mount unless it is kept for the next of us."""
        self.manager.say("STOPPING=1")
        running = [process for child in self.children for process in child.processes]
        for process in running:
            process.tell_to_stop()
        running = self.reap(running, wake)
        for process in running:
            log(f"{process.name} (pid {process.pid}) did not stop within {GRACE:.0f} s: killed")
            process.signal(signal.SIGKILL)
        if self.manager.keeps:
            self.state().write(self.memory)
            return
        os.close(self.connection.fuse)
        # Readers get ENOTCONN: also a child of ours that waits for a page, which even SIGKILL would not end before.
        fuse_mount.detach(self.mountpoint, abort=True)
        fuse_mount.detach_below(self.root / "idmapped")  # the services process makes them anew
        self.reap(running, wake)

    def reap(self, running: list[Process], wake: int) -> list[Process]:
        """Wait for processes, but not for longer than the grace. Returns those that still run."""
        end = time.monotonic() + GRACE
        while True:
            running = [process for process in running if process.ended() is None]
            left = end - time.monotonic()
            if not running or left <= 0:
                return running
            if select.select([wake], [], [], left)[0]:
                os.read(wake, 64)


def main() -> None:
    """Run with the settings and the command that made them."""
    try:
        Supervisor(sys.argv[1], sys.argv[2:], ServiceManager(os.environ)).run()
    except (InUse, MountFailure, Unusable) as error:
        sys.stderr.write(f"fusesnap: {error}\n")
        raise SystemExit(error.status) from None


if __name__ == "__main__":
    main()
