"""The demo: one image, started cold, warm and eagerly over a slow link, and a table of what each took."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from testbed.binary_cache import (
    CacheFiles,
    HttpCache,
    SigningKey,
    http_cache,
    signing_key,
    write_cache,
)
from testbed.closure import debian_closure
from testbed.containerd import Containerd, containerd
from testbed.fusesnap_daemon import FusesnapDaemon, Source, fusesnap_daemon, prefetch
from testbed.images import NixLayerManner, nix_layer, write_image
from testbed.link_process import RunningLink, slow_link
from testbed.nix_store import Closure, NixStore
from testbed.processes import CommandFailed, run_until_output
from testbed.registry import registry
from testbed.workplace import default_work, leftovers, sweep

IMAGE = "redis:latest"
# redis, and what an image usually has beside its program.
PACKAGES = (
    *("redis-server", "redis-tools"),
    *("bash", "coreutils", "findutils", "grep", "less", "openssl", "procps", "sed", "tzdata"),
)
VERSION = ("redis-server", "--version")
SERVER = ("redis-server", "--save", "", "--bind", "127.0.0.1")
PING = ("redis-cli", "PING")
START_SECONDS = 120  # how long a start over the slow link may take before the demo gives up
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOG_LINES = 20
OUTPUT_SHOWN = 24  # characters of a command's output: enough to see that it is redis
RETRY_SECONDS = 0.05  # between PINGs that find the server not listening yet
COLUMNS = (
    "start",
    "closure,\nas NARs",
    "closure,\ncompressed",
    "link bytes to\nfirst output",
    "ctr run to\nfirst output",
    "nothing to\nfirst output",
)
EXPLANATION = """\
Cold, what is read is fetched when it is read, verified, and kept. Warm, it is there.
Eager, everything is fetched before the container starts, read or not.
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """One start. Seconds to get ready for it, seconds from there to its first output, bytes over the link by then."""

    ready: float
    output: float
    crossed: int


class Watch:
    """Measures one start, from the moment of its making."""

    def __init__(self, link: RunningLink) -> None:
        self._link = link
        self._bytes = link.down()
        self._began = self._started = time.monotonic()
        self.figures = Figures(0, 0, 0)

    def start(self) -> None:
        """The container is started now; what was before is preparation."""
        self._started = time.monotonic()

    def stop(self) -> None:
        """There is the first output."""
        now = time.monotonic()
        crossed = self._link.down() - self._bytes
        self.figures = Figures(self._started - self._began, now - self._started, crossed)


@dataclass(frozen=True, slots=True)
class Scene:
    """What all starts share."""

    say: Console
    link: RunningLink
    cache: HttpCache
    key: SigningKey
    closure: Closure
    reference: str
    directory: Path
    report: Path | None

    @property
    def source(self) -> Source:
        """From where a node fetches, and whom it trusts."""
        return Source([self.link.url("cache")], [self.key.public])


@dataclass(frozen=True, slots=True)
class Node:
    """A machine: a fusesnap state of its own, and a containerd that uses it."""

    scene: Scene
    containerd: Containerd
    daemon: FusesnapDaemon

    @property
    def state(self) -> Path:
        """Its state directory."""
        return self.daemon.state


Start = Callable[[Node, str, Watch], str]


def show_version(node: Node, name: str, watch: Watch) -> str:
    """Run ``redis-server --version`` to its end."""
    command = node.containerd.run_command(node.scene.reference, name, *VERSION)
    watch.start()
    return run_until_output(command, watch.stop, timeout=START_SECONDS)


def answer_ping(node: Node, name: str, watch: Watch) -> str:
    """Start a redis that stays, and ask it from inside its container until it answers."""
    watch.start()
    deadline = time.monotonic() + START_SECONDS
    started = node.containerd.started(node.scene.reference, name, *SERVER, timeout=START_SECONDS)
    with started as server:
        while (answer := server.execute_unchecked(*PING, timeout=START_SECONDS)).returncode != 0:
            if time.monotonic() > deadline:
                raise CommandFailed(f"redis did not answer:\n{answer.stderr}{server.log_text()}")
            time.sleep(RETRY_SECONDS)
        watch.stop()
    return answer.stdout


STARTS: dict[str, Start] = {" ".join(VERSION): show_version, " ".join(PING): answer_ping}


@contextlib.contextmanager
def new_node(scene: Scene, name: str) -> Iterator[Node]:
    """A machine that has nothing yet."""
    directory = scene.directory / name
    directory.mkdir()
    state = directory / "state"
    with (
        fusesnap_daemon(state, source=scene.source) as daemon,
        containerd(directory / "containerd", proxy=daemon.address) as runtime,
    ):
        try:
            yield Node(scene, runtime, daemon)
        except CommandFailed as failure:
            log = "\n".join(daemon.service.log_text().splitlines()[-LOG_LINES:])
            raise CommandFailed(f"{failure}\n\nfusesnap's log ends with:\n{log}") from None


def measure(node: Node, command: str, kind: str) -> Figures:
    """Do one start of the kind cold, warm or eager, and tell what came of it."""
    scene = node.scene
    scene.cache.clear_requests()
    watch = Watch(scene.link)
    with scene.say.status(command):
        if kind == "eager":
            prefetch(node.state, [scene.closure.root], source=scene.source, timeout=START_SECONDS)
        if kind != "warm":
            node.containerd.pull(scene.reference, timeout=START_SECONDS)
        output = STARTS[command](node, f"{kind}-redis", watch)
    fetched = scene.cache.requested_nars(scene.closure.paths)
    figures = watch.figures
    tell(
        scene.say,
        f"$ {command}",
        f"[green]{textwrap.shorten(output, OUTPUT_SHOWN, placeholder='')}[/]",
        f"in {seconds(figures.ready + figures.output)}, of which the container took"
        f" {seconds(figures.output)}; fetched {len(fetched)} of {len(scene.closure.paths)} store paths",
    )
    return figures


def measure_all(scene: Scene) -> dict[str, dict[str, Figures]]:
    """Every command cold, warm and eager: figures by command and kind."""
    taken: dict[str, dict[str, Figures]] = {command: {} for command in STARTS}
    with contextlib.ExitStack() as machines:
        heading(scene.say, "4. Cold: pull and run, each on a machine that has nothing yet")
        nodes: dict[str, Node] = {}
        for command in STARTS:
            nodes[command] = machines.enter_context(new_node(scene, f"cold-{len(nodes)}"))
            taken[command]["cold"] = measure(nodes[command], command, "cold")
        if scene.report is not None:
            draw_report(nodes[" ".join(PING)], scene.report)
        heading(scene.say, "5. Warm: the same on the same machines, in new containers")
        for command, node in nodes.items():
            taken[command]["warm"] = measure(node, command, "warm")
    heading(scene.say, "6. Eager: new machines, and the whole closure before the container")
    for number, command in enumerate(STARTS):
        with new_node(scene, f"eager-{number}") as node:
            taken[command]["eager"] = measure(node, command, "eager")
    return taken


def draw_report(node: Node, file: Path) -> None:
    """What the cold start of the server waited for: a picture, or a page where ``file`` is called so."""
    kind = "html" if file.suffix == ".html" else "svg"
    said = node.daemon.start_report("cold-redis", f"--{kind}", file)
    tell(node.scene.say, *(escape(line) for line in said.splitlines()))


def result_table(scene: Scene, command: str, taken: dict[str, Figures]) -> Table:
    """What each kind of start cost, for one command."""
    table = Table(
        title=f"[bold]{command}[/]", title_justify="left", title_style="", box=box.SIMPLE_HEAD
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == COLUMNS[0] else "right")
    compressed = scene.cache.files.compressed_size(scene.closure.paths)
    for kind, figures in taken.items():
        table.add_row(
            kind,
            megabytes(scene.closure.nar_size),
            megabytes(compressed),
            megabytes(figures.crossed),
            seconds(figures.output),
            "-" if kind == "warm" else seconds(figures.ready + figures.output),
        )
    return table


def prepare(say: Console, work: Path) -> tuple[NixStore, Closure, CacheFiles, SigningKey]:
    """The closure and its signed cache; both stay in ``work`` for the next time."""
    heading(say, "1. A closure, built by real Nix from Debian's packages, one store path a package")
    with say.status("building (the first time only)"):
        store = NixStore(work / "store")
        closure = debian_closure(store, "redis-image", PACKAGES)
    tell(say, f"{', '.join(PACKAGES)}")
    tell(
        say, f"with what they need: {len(closure.paths)} store paths, {megabytes(closure.nar_size)}"
    )

    heading(
        say, "2. A binary cache: signed, compressed with xz, written by nix copy, served by nginx"
    )
    with say.status("compressing (the first time only)"):
        key = signing_key(work / "keys")
        files = write_cache(store, [closure.root], work / "cache-demo", key=key)
    tell(say, f"{megabytes(files.compressed_size(closure.paths))} on the cache, key {key.public}")
    return store, closure, files, key


def image_archive(store: NixStore, closure: Closure, directory: Path) -> Path:
    """The image: one Nix layer, an empty placeholder for each store path."""
    layer = nix_layer(store, closure, NixLayerManner.PATHS)
    return write_image(
        directory / "image.tar",
        [layer],
        name=IMAGE,
        command=SERVER,
        environment={"PATH": f"{closure.root}/bin"},
    )


def play(say: Console, arguments: argparse.Namespace, directory: Path, ports: list[int]) -> None:
    """The whole demo. ``ports`` is given the ports on which something listens meanwhile."""
    store, closure, files, key = prepare(say, arguments.work)
    with contextlib.ExitStack() as servers:
        cache = servers.enter_context(http_cache(files, directory / "nginx"))
        images = servers.enter_context(registry(directory))
        targets = {"cache": cache.port, "registry": images.port}
        figures = {"rate": arguments.rate * 1e6, "round_trip": arguments.round_trip / 1e3}
        link = servers.enter_context(slow_link(targets, directory, **figures))
        ports += [cache.port, images.port, *(link.port(name) for name in targets)]

        heading(
            say, "3. An image that names the store paths instead of carrying them, in a registry"
        )
        archive = image_archive(store, closure, directory)
        images.push(archive, IMAGE)
        tell(say, f"{IMAGE}, {archive.stat().st_size / 1e3:.0f} kB")
        reference = images.reference(IMAGE, port=link.port("registry"))
        tell(say, "from here on, cache and registry are reached over the slow link alone")

        scene = Scene(say, link, cache, key, closure, reference, directory, arguments.report)
        taken = measure_all(scene)
        say.print()
        for command, kinds in taken.items():
            say.print(result_table(scene, command, kinds))
        say.print(EXPLANATION)


def main() -> int:
    """The command line; returns the exit status."""
    arguments = _arguments()
    say = Console(highlight=False, soft_wrap=True)
    say.print(
        f"[bold]fusesnap[/]: starting an image of Nix packages over a link of {arguments.rate:g} Mbit/s"
        f" and {arguments.round_trip:g} ms round trip"
    )
    _interrupt_once()
    ports: list[int] = []
    status = 0
    directory = Path(tempfile.mkdtemp(prefix="fusesnap-demo-"))  # a short path, for unix sockets
    try:
        play(say, arguments, directory, ports)
    except KeyboardInterrupt:
        say.print("\nStopped.")
        status = 128 + signal.SIGINT
    except CommandFailed as failure:
        say.print(f"\nThe demo failed. {failure}", markup=False)
        status = 1
    finally:
        _ignore_interrupts()
        sweep(directory)
    left = leftovers(directory, ports)
    say.print("Left behind:" if left else "Nothing is left mounted, running or listening.")
    say.print(*left, sep="\n", end="\n" if left else "", markup=False)
    return 1 if left else status


def heading(say: Console, text: str) -> None:
    say.print(f"\n[bold]{text}[/]")


def tell(say: Console, *lines: str) -> None:
    for line in lines:
        say.print(f"   {line}")


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def seconds(time_taken: float) -> str:
    return f"{time_taken:.2f} s"


def _interrupt_once() -> None:
    """Make SIGTERM and a closed terminal what Ctrl-C is, and let none of them disturb the cleaning up."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        _ignore_interrupts()
        raise KeyboardInterrupt

    for each in INTERRUPTS:
        signal.signal(each, interrupt)


def _ignore_interrupts() -> None:
    for each in INTERRUPTS:
        signal.signal(each, signal.SIG_IGN)


def _arguments() -> argparse.Namespace:
    """The options that ``scripts/demo --help`` describes."""
    parser = argparse.ArgumentParser(prog="scripts/demo")
    parser.add_argument("--rate", type=float, default=20)
    parser.add_argument("--round-trip", type=float, default=80)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--work", type=Path, default=default_work())
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
