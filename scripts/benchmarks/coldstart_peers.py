"""Other snapshotters than ours, as sides of the cold-start benchmark: programs that somebody has built."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from testbed.containerd import containerd
from testbed.debian import containerd_release
from testbed.nix_store import CONFIGURATION, PRIVATE_NIX
from testbed.processes import running

from benchmarks.coldstart_sides import START_SECONDS, Scene, Side

SETTINGS = """\
address = "{address}"
root = "{root}"
[image_service]
enable = false
"""


class NixSnapshotter(Side):
    """``program`` is nix-snapshotter: it realises store paths with Nix, and has them bound into the container.

    Containerd's CRI pulls, which tells it what a Nix layer stands for. Store paths are in /nix of a mount namespace.
    """

    name = "nix-snapshotter, stock cache"

    def __init__(self, program: Path) -> None:
        self._program = program

    @contextlib.contextmanager
    def machine(self, scene: Scene, directory: Path) -> Iterator[Callable[[], list[str]]]:
        """See Side."""
        address = directory / "nix-snapshotter.sock"
        settings = directory / "nix-snapshotter.toml"
        settings.write_text(SETTINGS.format(address=address, root=directory / "r"))
        inside: list[str | Path] = [PRIVATE_NIX, directory / "n"]
        command = [*inside, self._program, "--config", settings]
        source = scene.source("stock")
        lines = [CONFIGURATION["NIX_CONFIG"], f"extra-substituters = {' '.join(source.caches)}"]
        lines.append(f"trusted-public-keys = {' '.join(source.keys)}")
        environment = {**CONFIGURATION, "NIX_CONFIG": "\n".join(lines)}
        with running(command, log=directory / "nix-snapshotter.log", env=environment) as service:
            service.wait_until(address.exists)
            # Its mounts have targets, which containerd has known since 1.7.
            release = containerd_release("2")
            with containerd(
                directory / "c", proxy=address, cri=True, inside=inside, release=release
            ) as client:

                def prepare() -> list[str]:
                    client.cri_pull(scene.references["nix"], timeout=START_SECONDS)
                    # ctr looks into the image, and must have it mounted where containerd has its store paths.
                    there = [
                        "nsenter",
                        "--target",
                        str(client.service.pid),
                        "--mount",
                        "--root",
                        "--",
                    ]
                    return [*there, *client.run_command(scene.references["nix"], "one")]

                yield prepare
