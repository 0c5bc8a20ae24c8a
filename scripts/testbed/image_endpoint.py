"""A machine whose kubelet would ask fusesnap for images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from testbed.containerd import Containerd, containerd
from testbed.fusesnap_daemon import FusesnapDaemon, Source, fusesnap_daemon


@contextlib.contextmanager
def image_endpoint(
    directory: Path, source: Source, *, complete: bool = False, settings: str = ""
) -> Iterator[tuple[FusesnapDaemon, Containerd]]:
    """A daemon that pulls into a containerd of its own, below ``directory``; ``complete`` as for the daemon.

    ``settings`` are more lines of its configuration.
    """
    file = directory / "fusesnap.toml"
    file.write_text(f'containerd-address = "{directory}/c/containerd.sock"\n{settings}')
    options = ["--config", str(file)]
    with (
        fusesnap_daemon(
            directory / "s", source=source, options=options, complete=complete
        ) as daemon,
        containerd(directory / "c", proxy=daemon.address, cri=True) as client,
    ):
        yield daemon, client
