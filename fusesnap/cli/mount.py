"""``fusesnap mount``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from fusesnap.cli import options
from fusesnap.errors import InvalidArgument, Unsupported
from fusesnap.fuse_mount import mount_points


@click.command()
@click.argument("source")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where fetched paths are kept. Default: /var/lib/fusesnap, for others than root ~/.local/state/fusesnap",
)
@click.option(
    "--background",
    is_flag=True,
    help="Return once it is mounted; `umount` or `fusermount3 -u` ends it.",
)
@options.fetching
def mount(
    source: str,
    mountpoint: Path,
    state: Path | None,
    background: bool,
    config: Path | None,
    substituters: tuple[str, ...],
    trusted_public_keys: tuple[str, ...],
    store_dir: str | None,
) -> None:
    """Show SOURCE at MOUNTPOINT, read-only, until Ctrl-C or SIGTERM.

    \b
    SOURCE is one of
      /nix/store/<hash>-<name>  a store path: its closure appears under nix/store
      oci-archive:FILE[:REF]    an image in a tar file, merged with the store
      oci:DIR[:REF]             an image layout in a directory, likewise
    """
    check_mountpoint(mountpoint)
    if background:
        start_in_background(mountpoint, state or options.default_state())
        return
    import trio  # noqa: PLC0415

    from fusesnap.cli.progress import LiveLine  # noqa: PLC0415
    from fusesnap.daemon.standalone import mount_source  # noqa: PLC0415

    settings = options.settings(
        config,
        root=str((state or options.default_state()).absolute()),
        substituters=substituters,
        trusted_public_keys=trusted_public_keys,
        store_dir=store_dir,
    )
    with LiveLine() as line:

        def ready() -> None:
            line.say(f"{source} is mounted at {mountpoint}; Ctrl-C unmounts it")

        trio.run(mount_source, settings, source, mountpoint.absolute(), ready, line.update)


def check_mountpoint(mountpoint: Path) -> None:
    """An empty directory where nothing is mounted, and a machine with FUSE, or an error that names the mend."""
    # /proc is asked first: a dead FUSE mount answers every other question with ENOTCONN.
    if str(mountpoint.absolute()) in mount_points():
        raise InvalidArgument(
            f"{mountpoint}: something is mounted there already: `umount {mountpoint}` first"
        )
    if not mountpoint.exists():
        raise InvalidArgument(f"{mountpoint}: no such directory: `mkdir -p {mountpoint}` first")
    if not mountpoint.is_dir():
        raise InvalidArgument(f"{mountpoint}: not a directory")
    if any(mountpoint.iterdir()):
        raise InvalidArgument(f"{mountpoint}: not empty: the mount would hide what is in it")
    if not Path("/dev/fuse").exists():
        raise Unsupported("/dev/fuse is not there: load the kernel's FUSE module (modprobe fuse)")


def start_in_background(mountpoint: Path, state: Path) -> None:
    """Run the same command again, apart from this terminal, and wait for its line or its end."""
    words = [word for word in sys.argv[1:] if word != "--background"]
    state.mkdir(parents=True, exist_ok=True)
    log = state / "mount.log"
    with log.open("ab") as errors:
        said_before = errors.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "fusesnap.cli.app", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    assert child.stdout is not None  # noqa: S101 - a pipe was asked for
    line = child.stdout.readline().decode()
    if line:
        ending = f"`umount {mountpoint}` ends it; its log is {log}"
        click.echo(line.replace("Ctrl-C unmounts it", ending), nl=False)
        return  # it goes on without us
    code = child.wait()
    click.echo(log.read_bytes()[said_before:].decode(errors="replace"), nl=False, err=True)
    raise SystemExit(code)
