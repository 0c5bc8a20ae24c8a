"""``fusesnap store``: the local store by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fusesnap.cli import options
from fusesnap.cli.status import size as bytes_for_people
from fusesnap.config import parse_size


def checked_size(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> int | None:
    """An option's value as a number of bytes, see ``parse_size``."""
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.group()
def store() -> None:
    """Look after the store paths that are on this machine."""


@store.command()
@click.option(
    "--max-size",
    callback=checked_size,
    metavar="SIZE",
    help="Stop when the store has at most this size, as 50G; without it all garbage is removed.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="For scripts: one JSON object.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="State directory; a running daemon's is fine. "
    "Default: root of --config, else /var/lib/fusesnap, for others than root ~/.local/state/fusesnap",
)
@options.store_dir
@options.config
def gc(
    max_size: int | None,
    dry_run: bool,
    as_json: bool,
    state: Path | None,
    store_dir: str | None,
    config: Path | None,
) -> None:
    """Remove store paths that nothing needs, the least recently used first.

    What the images on this node stand for is needed, and all that it references; so is what a mount, a prefetch or a
    transfer is at, and what a root in STATE/nix/gcroots names. It is safe at any time, beside a running daemon, and
    beside Nix. Paths that are needed again are fetched again.
    """
    from fusesnap.cli.progress import CollectProgress  # noqa: PLC0415
    from fusesnap.daemon.collection import collect_garbage  # noqa: PLC0415

    settings = options.settings(
        config,
        default_root=options.default_state(),
        root=str(state.absolute()) if state else None,
        store_dir=store_dir,
    )
    with CollectProgress() as progress:
        report = collect_garbage(settings, max_size, progress.update, dry_run=dry_run)
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(lines(report)))


def lines(report: dict[str, Any]) -> list[str]:
    """What was done, for people."""
    removed, dry_run = report["removed"], report["dry_run"]
    would = "would be freed" if dry_run else "freed"
    return [
        *(removed if dry_run else []),
        f"{would}: {bytes_for_people(report['freed'])} in {len(removed)} paths",
        f"{'there' if dry_run else 'left'}: {bytes_for_people(report['size'])} in "
        f"{report['paths']} paths, {bytes_for_people(report['collectable_size'])} of it not in use",
    ]
