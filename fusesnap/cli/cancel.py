"""``fusesnap cancel``."""

from __future__ import annotations

from pathlib import Path

import click

from fusesnap.cli import options
from fusesnap.errors import NotFound


@click.command()
@click.argument("target", metavar="PATH|SNAPSHOT|PID")
@options.address
def cancel(target: str, address: Path) -> None:
    """Give readers that wait for a store path an error (EIO) at once.

    \b
    PATH      whoever waits for this store path, or for the one that the file is in
    SNAPSHOT  whoever waits in the container with this snapshot; its key as containerd
              has it (default/12/name), or the last part of it
    PID       whoever waits in this process

    `fusesnap status` shows what waits. The transfer itself goes on. Ends with 1 if nothing waited.
    """
    from fusesnap.services.daemon_service import ask_cancel  # noqa: PLC0415 - grpc is slow to import

    count = ask_cancel(address, target)
    if not count:
        raise NotFound(f"{target}: no request waits for it or in it")
    click.echo(f"{count} waiting request{'s' if count > 1 else ''} answered with EIO")
