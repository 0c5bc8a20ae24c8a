"""Options that several commands share, and what they mean together."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fusesnap.config import (
    DEFAULT_KEY,
    DEFAULT_ROOT,
    DEFAULT_SUBSTITUTER,
    SOCKET_NAME,
    Settings,
    load,
)

DEFAULT_ADDRESS = DEFAULT_ROOT / SOCKET_NAME

F = TypeVar("F", bound=Callable[..., Any])

substituter = click.option(
    "-s",
    "--substituter",
    "substituters",
    multiple=True,
    metavar="URL",
    help="Binary cache to read: https://, http:// or file://. May be given several times. "
    f"Default: {DEFAULT_SUBSTITUTER}",
)
trusted_public_key = click.option(
    "--trusted-public-key",
    "trusted_public_keys",
    multiple=True,
    metavar="KEY",
    help="Key that may vouch for store paths, as NAME:BASE64. May be given several times. "
    f"Default, if no --substituter is given: {DEFAULT_KEY}",
)
config = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="TOML file with the same settings; options on the command line come on top.",
)
store_dir = click.option(
    "--store-dir",
    metavar="DIR",
    default=None,
    help="Store directory that paths are named by. Default: /nix/store",
)
state = click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="State directory; a running daemon's is fine. "
    "Default: root of --config, else /var/lib/fusesnap, for others than root ~/.local/state/fusesnap",
)
root = click.option(
    "--root",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help=f"State directory. Default: {DEFAULT_ROOT}",
)
address = click.option(
    "--address",
    type=click.Path(path_type=Path),
    default=DEFAULT_ADDRESS,
    show_default=True,
    metavar="SOCKET",
    help="The daemon's socket.",
)


def fetching(command: F) -> F:
    """The options of every command that fetches."""
    for option in (store_dir, config, trusted_public_key, substituter):
        command = option(command)
    return command


def default_state() -> Path:
    """Where a command without a daemon keeps its store: the node's for root, a user's own otherwise."""
    if os.geteuid() == 0:
        return DEFAULT_ROOT
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "fusesnap"


def settings(
    config: Path | None, *, default_root: Path = DEFAULT_ROOT, **overrides: Any
) -> Settings:
    """The checked settings from a file and the options that were given. Raises ``InvalidConfiguration``.

    ``default_root`` is the state directory where neither names one.
    """
    named = {key.replace("_", "-"): value for key, value in overrides.items()}
    for many in ("substituters", "trusted-public-keys"):
        if many in named:
            named[many] = list(named[many])
    return load(config, named, root=default_root.absolute())
