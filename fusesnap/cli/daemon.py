"""``fusesnap daemon``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from fusesnap.cli import options
from fusesnap.errors import Unsupported


@click.command()
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="State directory. Default: /var/lib/fusesnap",
)
@click.option(
    "--address",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="Unix socket to serve. Default: ROOT/fusesnap.sock",
)
@options.fetching
def daemon(
    config: Path | None,
    root: Path | None,
    address: Path | None,
    substituters: tuple[str, ...],
    trusted_public_keys: tuple[str, ...],
    store_dir: str | None,
) -> None:
    """Serve containerd as a snapshotter, until SIGTERM.

    Prints one line when it is ready. containerd finds it by this in /etc/containerd/config.toml:

    \b
      [proxy_plugins.fusesnap]
        type = "snapshot"
        address = "/var/lib/fusesnap/fusesnap.sock"

    and uses it where an image is pulled and run with --snapshotter fusesnap.
    """
    if os.geteuid() != 0:
        raise Unsupported(
            "the daemon mounts overlays for containerd and must run as root; `fusesnap mount` need not"
        )
    settings = options.settings(
        config,
        root=str(root.absolute()) if root else None,
        address=str(address.absolute()) if address else None,
        substituters=substituters,
        trusted_public_keys=trusted_public_keys,
        store_dir=store_dir,
    )
    given = settings.model_dump(mode="json", by_alias=True)
    given |= {"address": str(settings.socket), "readahead": settings.readahead_kib * 1024}
    # The supervisor is a process of its own kind, without what was imported to get here. -P: the working directory is
    # no place to import from.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "fusesnap.supervisor", json.dumps(given)])  # noqa: S606
