"""The slow link as a program: ``slow-link run`` and ``slow-link stats``, and a context manager that runs it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import trio

from testbed.processes import running
from testbed.slow_link import Link, SlowLink, Traffic

HOST = "127.0.0.1"
READY = "ready "
WEATHER = ("silence", "cut", "mend")  # methods of SlowLink


@dataclass(frozen=True, slots=True)
class Forward:
    """A port of loopback that leads over the link to another; ``listen`` 0 means any free one."""

    name: str
    listen: int
    target: int

    @classmethod
    def parse(cls, text: str) -> Forward:
        """Read ``NAME=LISTEN:TARGET``."""
        name, _, ports = text.partition("=")
        listen, _, target = ports.partition(":")
        if not (name and listen.isdecimal() and target.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=LISTEN_PORT:TARGET_PORT")
        return cls(name, int(listen), int(target))


async def serve(link: Link, forwards: Sequence[Forward], control: Path | None) -> None:
    """Run the link until SIGINT or SIGTERM; prints a line with the ports once it listens."""
    slow = SlowLink(link)
    ports: dict[str, int] = {}
    async with contextlib.AsyncExitStack() as stack, trio.open_nursery() as nursery:
        for forward in forwards:
            slow.traffic[forward.name] = Traffic()
            (listener,) = await trio.open_tcp_listeners(forward.listen, host=HOST)
            ports[forward.name] = listener.socket.getsockname()[1]
            connect = partial(trio.open_tcp_stream, HOST, forward.target)
            relay = partial(slow.relay, forward.name, connect=connect)
            nursery.start_soon(trio.serve_listeners, relay, [listener])
        if control is not None:
            listener = await stack.enter_async_context(_listening(control))
            nursery.start_soon(trio.serve_listeners, partial(_tell, slow), [listener])
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            print(READY + json.dumps(ports), flush=True)
            await anext(signals)
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def _listening(path: Path) -> AsyncIterator[trio.SocketListener]:
    """Listen on a unix socket, which is removed afterwards."""
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(str(path))
    listening.listen()
    try:
        async with trio.SocketListener(listening) as listener:
            yield listener
    finally:
        path.unlink()  # noqa: ASYNC240 - one system call, at the end


async def _tell(slow: SlowLink, asker: trio.SocketStream) -> None:
    """Do what a connection to the control socket says in a word, and answer with the traffic so far, as JSON."""
    async with asker:
        with contextlib.suppress(trio.BrokenResourceError):
            word = bytes(await asker.receive_some(64)).decode().strip()
            if word in WEATHER:
                getattr(slow, word)()
            traffic = {name: asdict(each) for name, each in slow.traffic.items()}
            await asker.send_all(json.dumps(traffic).encode() + b"\n")


def ask(control: Path, word: str = "stats") -> dict[str, Traffic]:
    """What crossed each forward of a running link so far; before, ``word`` of WEATHER is done."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(10)
        link.connect(str(control))
        link.sendall(word.encode() + b"\n")
        with link.makefile("rb") as answer:
            return {name: Traffic(**each) for name, each in json.loads(answer.read()).items()}


class RunningLink:
    """A slow link that runs as a program."""

    def __init__(self, ports: Mapping[str, int], control: Path) -> None:
        self._ports = ports
        self._control = control

    def port(self, name: str) -> int:
        """The port of 127.0.0.1 that leads over the link to the target of that name."""
        return self._ports[name]

    def url(self, name: str) -> str:
        return f"http://{HOST}:{self.port(name)}"

    def traffic(self) -> dict[str, Traffic]:
        """What crossed so far, by target; ``down`` is what clients were given."""
        return ask(self._control)

    def silence(self) -> None:
        """See ``SlowLink``."""
        ask(self._control, "silence")

    def cut(self) -> None:
        """See ``SlowLink``."""
        ask(self._control, "cut")

    def mend(self) -> None:
        """See ``SlowLink``."""
        ask(self._control, "mend")

    def down(self) -> int:
        """Bytes that clients were given over the link so far, from all targets together."""
        return sum(each.down for each in self.traffic().values())


@contextlib.contextmanager
def slow_link(
    targets: Mapping[str, int], work: Path, *, rate: float = 20e6, round_trip: float = 0.08
) -> Iterator[RunningLink]:
    """Run a link for the time of the context.

    ``targets`` maps names to ports of 127.0.0.1. ``rate`` is in bits a second each way, shared by all targets;
    ``round_trip`` in seconds. ``work`` is a directory with a short path, for the control socket and the log.
    """
    control = work / "slow-link.sock"
    command = [sys.executable, "-m", "testbed.link_process", "run", "--control", str(control)]
    command += ["--rate", str(rate / 1e6), "--round-trip", str(round_trip * 1e3)]
    command += [f"{name}=0:{port}" for name, port in targets.items()]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    with running(command, log=work / "slow-link.log", env=environment) as service:
        ports = json.loads(service.wait_for_line(READY).removeprefix(READY))
        yield RunningLink(ports, control)


def main() -> None:
    """The command line."""
    arguments = _parser().parse_args()
    if arguments.command in ("stats", *WEATHER):
        for name, traffic in ask(arguments.control, arguments.command).items():
            print(json.dumps({"name": name, **asdict(traffic)}))
    else:
        # It stands for a line and for machines at its other end, which do not share this one's processors.
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -15)
        link = Link(
            arguments.rate * 1e6,
            arguments.round_trip / 1e3,
            reset=arguments.reset / 100,
            seed=arguments.seed,
        )
        trio.run(serve, link, arguments.forward, arguments.control)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slow-link",
        description="Relay TCP ports of loopback over an emulated slow link that all of them share.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run", help="relay until Ctrl-C; prints 'ready' and the ports as JSON"
    )
    run.add_argument(
        "forward",
        nargs="+",
        type=Forward.parse,
        help="NAME=LISTEN_PORT:TARGET_PORT on 127.0.0.1; listen port 0 means any free one",
    )
    run.add_argument(
        "--rate", type=float, default=20, metavar="MBIT", help="Mbit/s each way (default 20)"
    )
    run.add_argument(
        "--round-trip", type=float, default=80, metavar="MS", help="round trip in ms (default 80)"
    )
    run.add_argument(
        "--reset",
        type=float,
        default=0,
        metavar="PERCENT",
        help="share of connections that are reset (default 0)",
    )
    run.add_argument("--seed", type=int, default=1, help="makes the same ones be chosen again")
    run.add_argument("--control", type=Path, metavar="SOCKET", help="where 'stats' can ask")
    stats = commands.add_parser(
        "stats", help="print what crossed each forward, a JSON object a line"
    )
    stats.add_argument("control", type=Path, metavar="SOCKET")
    for word, help_ in (
        ("silence", "let nothing cross from now on, and tell nobody"),
        ("cut", "reset every connection from now on"),
        ("mend", "let everything cross again"),
    ):
        weather = commands.add_parser(word, help=help_)
        weather.add_argument("control", type=Path, metavar="SOCKET")
    return parser


if __name__ == "__main__":
    main()
