"""``fusesnap daemon`` and ``fusesnap daemon reload``."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import click

from fusesnap.cli import options
from fusesnap.config import DEFAULT_ROOT
from fusesnap.daemon.containerd_block import VERSIONS, Snapshotter, block
from fusesnap.daemon_lock import DaemonState, running_daemon
from fusesnap.errors import DeadlineExceeded, FusesnapError, Unavailable, Unsupported

POLL_SECONDS = 0.05


@click.group(invoke_without_command=True)
@options.root
@click.option(
    "--address",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="Unix socket to serve. Default: ROOT/fusesnap.sock",
)
@click.option(
    "--relay",
    type=click.Choice(["auto", "always", "never"]),
    help="Whether the supervisor stays between kernel and worker. Default: auto, where Linux is older than 6.9",
)
@click.option(
    "--complete/--no-complete",
    default=None,
    help="Whether to fetch the rest of running containers' closures while no program waits for anything, so that they "
    "no longer need the daemon. Default: --complete",
)
@click.option(
    "--check",
    is_flag=True,
    help="Only check options and configuration, and print the supervisor's command as JSON.",
)
@click.option(
    "--print-containerd-config",
    "containerd_version",
    type=click.Choice(VERSIONS),
    metavar="VERSION",
    help="Only print what containerd's configuration must say of us: 2 for containerd 1.6 and 1.7, "
    "3 for 2.0 and later.",
)
@options.fetching
@click.pass_context
def daemon(
    context: click.Context,
    config: Path | None,
    root: Path | None,
    address: Path | None,
    relay: str | None,
    complete: bool | None,
    check: bool,
    containerd_version: str | None,
    substituters: tuple[str, ...],
    trusted_public_keys: tuple[str, ...],
    store_dir: str | None,
) -> None:
    """Serve containerd as a snapshotter, until SIGTERM.

    Prints one line when it is ready. containerd finds it by what --print-containerd-config prints, put into
    /etc/containerd/config.toml, and uses it where an image is pulled and run with --snapshotter fusesnap, and for
    Kubernetes. `fusesnap doctor` says what of it is missing.

    SIGHUP, or `fusesnap daemon reload`, replaces the running daemon by what is installed and configured now.
    """
    if context.invoked_subcommand is not None:
        return
    if containerd_version is None and os.geteuid() != 0:
        raise Unsupported(
            "the daemon mounts overlays for containerd and must run as root; `fusesnap mount` need not"
        )
    settings = options.settings(
        config,
        root=str(root.absolute()) if root else None,
        address=str(address.absolute()) if address else None,
        relay=relay,
        substituters=substituters,
        trusted_public_keys=trusted_public_keys,
        store_dir=store_dir,
    )
    if complete is not None:
        fetch = settings.fetch.model_copy(update={"complete": complete})
        settings = settings.model_copy(update={"fetch": fetch})
    if containerd_version is not None:
        # containerd maps layers from 2.0 on; 1.6 would pass the labels on, and could not mount what they ask for.
        remap_ids = containerd_version == "3" and can_map_ids(settings.root)
        snapshotter = Snapshotter(settings.socket, settings.root, remap_ids)
        click.echo(block(containerd_version, snapshotter), nl=False)
        return
    given = settings.model_dump(mode="json", by_alias=True)
    given |= {"address": str(settings.socket), "readahead": settings.readahead_kib * 1024}
    # The supervisor is a process of its own kind, without what was imported to get here. -P: the working directory is
    # no place to import from.
    words = [sys.executable, "-P", "-m", "fusesnap.supervisor", json.dumps(given)]
    if check:
        from fusesnap.daemon.configured import check_caches  # noqa: PLC0415 - slow to import

        check_caches(settings)
        click.echo(json.dumps([*words, *own_command()]))
        return
    os.execv(sys.executable, [*words, *own_command()])  # noqa: S606


def can_map_ids(root: Path) -> bool:
    """Whether mounts can be ID-mapped here: only root can find out."""
    from fusesnap.daemon.idmap_probe import idmapping  # noqa: PLC0415 - slow to import

    return os.geteuid() == 0 and idmapping(root).remap_ids


def own_command() -> list[str]:
    """How we were called, to be called again at a reload: behind the same name there may be a newer program then."""
    program = Path(sys.argv[0]).absolute()
    start = [sys.executable, "-P", "-m", "fusesnap.cli.app"]
    if program.suffix != ".py" and os.access(program, os.X_OK):
        start = [str(program)]
    return [*start, *(word for word in sys.argv[1:] if word != "--check")]


@daemon.command()
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=DEFAULT_ROOT,
    show_default=True,
    metavar="DIR",
    help="State directory of the daemon.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait until the new daemon serves.",
)
def reload(root: Path, timeout: float) -> None:
    """Replace the running daemon by what is installed and configured now, without letting go of a mount.

    Readers do not notice. A configuration or a program that does not work is refused, and the running daemon goes on.
    """
    before = running(root)
    if before.state == "reloading":
        raise Unavailable(f"{root}: a reload of the daemon (pid {before.pid}) is under way already")
    os.kill(before.pid, signal.SIGHUP)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        now = running(root)
        if now.pid != before.pid:
            raise Unavailable(
                f"{root}: the daemon (pid {before.pid}) ended; now it is pid {now.pid}"
            )
        if now.reloads > before.reloads and now.state == "serving":
            click.echo(f"reloaded: the daemon (pid {now.pid}) serves")
            return
        if now.reloads > before.reloads and now.state == "failed":
            raise ReloadRefused(f"reload refused: {now.reason}")
        time.sleep(POLL_SECONDS)
    raise DeadlineExceeded(
        f"{root}: the new daemon (pid {before.pid}) does not serve after {timeout:g} s; see its log"
    )


class ReloadRefused(FusesnapError):
    """The running daemon could not be replaced, and goes on."""


def running(root: Path) -> DaemonState:
    """The daemon of ``root``. Raises ``Unavailable`` where there is none."""
    state = running_daemon(root)
    if state is None:
        raise Unavailable(f"{root}: no daemon runs there")
    return state
