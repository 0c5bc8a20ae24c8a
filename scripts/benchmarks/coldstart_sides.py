"""The ways to start a container that the cold-start benchmark compares, each on a machine that has nothing yet."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from testbed.binary_cache import HttpCache, SigningKey
from testbed.containerd import Containerd, containerd
from testbed.fusesnap_daemon import FusesnapDaemon, Source, prefetch
from testbed.image_endpoint import image_endpoint
from testbed.link_process import RunningLink
from testbed.nix_store import CONFIGURATION, STORE_DIR
from testbed.processes import CommandFailed, run, run_until_output
from testbed.settling import settle

from benchmarks.coldstart_goals import NAMED, UPDATED
from benchmarks.coldstart_workloads import Built

START_SECONDS = 600
JOBS = 16  # substitutions at once of the eager side


@dataclass(frozen=True, slots=True)
class Started:
    """One start: seconds from the pull to the first output, and bytes over the link by then."""

    seconds: float
    crossed: int


@dataclass(frozen=True, slots=True)
class Before:
    """What an update finds on its machine: another generation of the closure, whose cache and image are near."""

    source: Source
    reference: str


@dataclass(frozen=True, slots=True)
class Scene:
    """What all starts of one workload share. ``references`` are of images by their kind, over the link; ``image`` is a
    store path that is the one with Nix layers.

    ``caches`` are the binary caches at its other end, by name.
    """

    built: Built
    link: RunningLink
    key: SigningKey
    references: dict[str, str]
    image: str
    local_source: Source
    local_reference: str
    caches: Mapping[str, HttpCache]
    before: Before | None = None

    def source(self, cache: str) -> Source:
        """A binary cache over the link."""
        return Source([self.link.url(cache)], [self.key.public])


class Side(ABC):
    """A way to start; ``cold``: nothing of it may be in the kernel's caches."""

    name: str
    cold = True

    @abstractmethod
    def machine(
        self, scene: Scene, directory: Path
    ) -> contextlib.AbstractContextManager[Callable[[], list[str]]]:
        """A machine that has nothing. What it gives fetches what is needed first and returns the command to run."""

    def first_output(self) -> None:  # noqa: B027 - most have nothing to do then
        """Called when the container has said something, and its time was taken."""


def start(side: Side, scene: Scene, directory: Path) -> Started:
    """Start once. Raises CommandFailed where the output is not what is expected."""
    directory.mkdir()
    with side.machine(scene, directory) as prepare:
        settle(directory)
        if side.cold:
            drop_caches()
        crossed, began = scene.link.down(), time.monotonic()
        ends: list[Started] = []

        def stop() -> None:
            seconds = time.monotonic() - began
            ends.append(Started(seconds, scene.link.down() - crossed))
            side.first_output()

        output = run_until_output(prepare(), stop, timeout=START_SECONDS)
    expected = scene.built.workload.output
    if expected not in output.split():
        raise CommandFailed(
            f"{side.name}: {scene.built.workload.name} said {output!r}, not {expected!r}"
        )
    return ends[0]


def drop_caches() -> None:
    """Have the kernel forget what it has read from disks (proc(5))."""
    run(["sync"], timeout=START_SECONDS)
    Path("/proc/sys/vm/drop_caches").write_text("3")


class Fusesnap(Side):
    """Ours, from the binary cache ``cache``. ``settings`` are more lines of the daemon's configuration.

    With ``complete`` closures are fetched whole when nothing else is, as it comes.
    """

    def __init__(self, name: str, cache: str, settings: str = "", *, complete: bool = True) -> None:
        self.name = name
        self.cache = cache
        self._settings = settings
        self._complete = complete

    @contextlib.contextmanager
    def machine(self, scene: Scene, directory: Path) -> Iterator[Callable[[], list[str]]]:
        """See Side."""
        source, settings = scene.source(self.cache), self._settings
        with image_endpoint(directory, source, complete=self._complete, settings=settings) as (
            daemon,
            client,
        ):
            yield lambda: _pulled(daemon, client, scene.references["nix"])


class Updated(Side):
    """Ours from the bundled cache, on a machine that has run a generation of which hardly more than names differs."""

    name = UPDATED

    @contextlib.contextmanager
    def machine(self, scene: Scene, directory: Path) -> Iterator[Callable[[], list[str]]]:
        """See Side."""
        if scene.before is None:
            raise ValueError("the generation before was not built")
        near, far = scene.before.source, scene.source("bundled")
        source = Source([*near.caches, *far.caches], near.keys)
        with image_endpoint(directory, source, complete=True) as (daemon, client):
            daemon.pull(scene.before.reference, timeout=START_SECONDS)
            client.run(scene.before.reference, "before", timeout=START_SECONDS)
            yield lambda: _pulled(daemon, client, scene.references["nix"])


class Named(Side):
    """Ours, of an image that no registry has: its reference names a store path that is the image."""

    name = NAMED

    @contextlib.contextmanager
    def machine(self, scene: Scene, directory: Path) -> Iterator[Callable[[], list[str]]]:
        """See Side."""
        with image_endpoint(directory, scene.source("bundled"), complete=True) as (daemon, client):
            yield lambda: _named(daemon, client, scene.image)


class Ordinary(Side):
    """An image that carries everything, in containerd's overlayfs."""

    def __init__(self, compression: str) -> None:
        self.name = f"OCI pull, {compression}"
        self._kind = compression

    @contextlib.contextmanager
    def machine(self, scene: Scene, directory: Path) -> Iterator[Callable[[], list[str]]]:
        """See Side."""
        with containerd(directory / "c", cri=True) as client:

            def prepare() -> list[str]:
                client.cri_pull(scene.references[self._kind], timeout=START_SECONDS)
                return client.run_command(scene.references[self._kind], "one")

            yield prepare


class Eager(Side):
    """The closure is realised by real Nix and bound into the container, a mount a store path, as nix-snapshotter does.

    ``copying`` uses ``nix copy``, which substitutes in its own way.
    """

    def __init__(self, *, copying: bool = False) -> None:
        self.name = "nix copy, bind mounts" if copying else "nix-store --realise, bind mounts"
        self._copying = copying

    @contextlib.contextmanager
    def machine(self, scene: Scene, directory: Path) -> Iterator[Callable[[], list[str]]]:
        """See Side."""
        nix = directory / "nix"
        with containerd(directory / "c", cri=True) as client:

            def prepare() -> list[str]:
                client.cri_pull(scene.references["nix"], timeout=START_SECONDS)
                self._realise(scene, nix)
                options = [word for path in scene.built.closure.paths for word in _bind(nix, path)]
                return client.run_command(
                    scene.references["nix"], "one", options=["--rm", *options]
                )

            yield prepare

    def _realise(self, scene: Scene, nix: Path) -> None:
        store = f"local?store={STORE_DIR}&real={nix}/store&state={nix}/var&log={nix}/log"
        url, root = scene.link.url("stock"), scene.built.closure.root
        if self._copying:
            command = ["nix", "copy", "--from", url, "--to", store, root]
        else:
            command = ["nix-store", "--store", store, "--realise", root, "--max-jobs", str(JOBS)]
            command += ["--option", "substituters", url]
        command += ["--option", "trusted-public-keys", scene.key.public]
        run(command, env=CONFIGURATION, timeout=START_SECONDS)


class Warm(Side):
    """Ours with everything local and warm: the part of a start that no fetching can save."""

    name = "fusesnap, all local and warm"
    cold = False

    @contextlib.contextmanager
    def machine(self, scene: Scene, directory: Path) -> Iterator[Callable[[], list[str]]]:
        """See Side; the closure is there, and a container of it has run."""
        source, reference = scene.local_source, scene.local_reference
        with image_endpoint(directory, source) as (daemon, client):
            root = scene.built.closure.root
            prefetch(daemon.state, [root], source=source, timeout=START_SECONDS)
            daemon.pull(reference, timeout=START_SECONDS)
            client.run(reference, "before", timeout=START_SECONDS)
            client.ctr("images", "rm", "--sync", *client.images())
            yield lambda: _pulled(daemon, client, reference)


class WarmNamed(Side):
    """The same as Warm for an image that its store path alone names."""

    name = "fusesnap, nix:0, all local and warm"
    cold = False

    @contextlib.contextmanager
    def machine(self, scene: Scene, directory: Path) -> Iterator[Callable[[], list[str]]]:
        """See Side."""
        source, root = scene.local_source, scene.image
        with image_endpoint(directory, source) as (daemon, client):
            prefetch(daemon.state, [root], source=source, timeout=START_SECONDS)
            run_until_output(_named(daemon, client, root), lambda: None, timeout=START_SECONDS)
            client.remove("one")
            client.ctr("images", "rm", "--sync", *client.images())
            yield lambda: _named(daemon, client, root)


def _named(daemon: FusesnapDaemon, client: Containerd, image: str) -> list[str]:
    daemon.pull(f"nix:0{image}", timeout=START_SECONDS)
    return client.run_command(f"nix:0{image}:latest", "one")


def _pulled(daemon: FusesnapDaemon, client: Containerd, reference: str) -> list[str]:
    """As where a kubelet has us as its endpoint for images."""
    daemon.pull(reference, timeout=START_SECONDS)
    return client.run_command(reference, "one")


def _bind(nix: Path, path: str) -> list[str]:
    source = nix / "store" / Path(path).name
    return ["--mount", f"type=bind,src={source},dst={path},options=rbind:ro"]
