"""``fusesnap mount``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import click

from fusesnap.cli import options
from fusesnap.errors import InvalidArgument, StorageFailure, Unsupported
from fusesnap.fuse_mount import mount_points


@click.command()
@click.argument("source")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where fetched paths are kept. "
    "Default: root of --config, else /var/lib/fusesnap, for others than root ~/.local/state/fusesnap",
)
@click.option(
    "--background",
    is_flag=True,
    help="Return once it is mounted; `umount` or `fusermount3 -u` ends it.",
)
@click.option("--log-descriptor", type=int, hidden=True)
@options.fetching
def mount(
    source: str,
    mountpoint: Path,
    state: Path | None,
    background: bool,
    log_descriptor: int | None,
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
    where = check_mountpoint(mountpoint)
    settings = options.settings(
        config,
        default_root=options.default_state(),
        root=str(state.absolute()) if state else None,
        substituters=substituters,
        trusted_public_keys=trusted_public_keys,
        store_dir=store_dir,
    )
    if background:
        start_in_background(mountpoint, settings.root)
        return
    import trio  # noqa: PLC0415

    from fusesnap.cli.progress import LiveLine  # noqa: PLC0415
    from fusesnap.daemon.standalone import mount_source  # noqa: PLC0415

    with LiveLine() as line:

        def ready() -> None:
            if log_descriptor is not None:
                os.dup2(log_descriptor, sys.stderr.fileno())
            line.say(f"{source} is mounted at {mountpoint}; Ctrl-C unmounts it")

        trio.run(mount_source, settings, source, where, ready, line.update, line.end)


def check_mountpoint(mountpoint: Path) -> Path:
    """An empty directory where nothing is mounted, and a machine with FUSE, or an error that names the mend.

    Returns the directory as the kernel's list of mounts will name it, without links.
    """
    where = Path(os.path.realpath(mountpoint))
    # /proc is asked first: a dead FUSE mount answers every other question with ENOTCONN.
    if str(where) in mount_points():
        raise InvalidArgument(
            f"{mountpoint}: something is mounted there already: `umount {mountpoint}` first"
        )
    try:
        entries = os.listdir(where)
    except FileNotFoundError:
        raise InvalidArgument(
            f"{mountpoint}: no such directory: `mkdir -p {mountpoint}` first"
        ) from None
    except NotADirectoryError:
        raise InvalidArgument(f"{mountpoint}: not a directory") from None
    except OSError as error:
        raise InvalidArgument(f"{mountpoint}: cannot be listed: {error.strerror}") from error
    if entries:
        raise InvalidArgument(f"{mountpoint}: not empty: the mount would hide what is in it")
    if not Path("/dev/fuse").exists():
        raise Unsupported("/dev/fuse is not there: load the kernel's FUSE module (modprobe fuse)")
    return where


def start_in_background(mountpoint: Path, state: Path) -> None:
    """Run the same command again, apart from this terminal, and wait for its line or its end.

    What it says goes to its log once it is mounted. Until then we keep it, in memory: its log may be on the disk that
    is full.
    """
    path = state / "mount.log"
    with open_log(path) as log, os.fdopen(os.memfd_create("said"), "w+b") as said:
        child = start_again(log, said)
        assert child.stdout is not None  # noqa: S101 - a pipe was asked for
        try:
            line = child.stdout.readline().decode()
        except BaseException:  # Ctrl-C: nobody would know of it
            child.terminate()
            child.wait()
            raise
        if line:
            ending = f"`umount {mountpoint}` ends it; its log is {path}"
            click.echo(line.replace("Ctrl-C unmounts it", ending), nl=False)
            return  # it goes on without us
        code = child.wait()
        said.seek(0)
        click.echo(said.read().decode(errors="replace"), nl=False, err=True)
    raise SystemExit(code or 1)  # 0 is SIGTERM's: it is not mounted


def open_log(path: Path) -> IO[bytes]:
    """Open a log for appending. Raises ``StorageFailure``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")
    except OSError as error:
        raise StorageFailure(f"cannot write {path}: {error.strerror}", error.errno or 0) from error


def start_again(log: IO[bytes], said: IO[bytes]) -> subprocess.Popen[bytes]:
    """This command in the foreground of a session of its own."""
    words = [word for word in sys.argv[2:] if word != "--background"]
    # -P: the working directory is no place to import from.
    program = [sys.executable, "-P", "-c", "from fusesnap.cli import main; main()"]
    return subprocess.Popen(
        [*program, "mount", f"--log-descriptor={log.fileno()}", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=said,
        pass_fds=[log.fileno()],
        start_new_session=True,
    )
