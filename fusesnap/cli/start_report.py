"""``fusesnap start-report``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from fusesnap.cli import options
from fusesnap.cli.status import table
from fusesnap.errors import FusesnapError, InvalidData, StorageFailure


def complete(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The containers and snapshots whose starts are known, for a shell."""
    from fusesnap.services.daemon_service import ask_starts  # noqa: PLC0415 - grpc is slow to import

    try:
        starts = ask_starts(Path(context.params.get("address") or options.DEFAULT_ADDRESS))
    except FusesnapError:
        return []
    keys = dict.fromkeys(str(start["key"]) for start in starts)
    names = [key if "/" in incomplete else key.rpartition("/")[2] for key in keys]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@click.command("start-report")
@click.argument("target", required=False, metavar="[CONTAINER|SNAPSHOT]", shell_complete=complete)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a page with the picture and all figures.",
)
@click.option(
    "--svg",
    "picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the picture alone.",
)
@click.option("--json", "as_json", is_flag=True, help="For scripts: one JSON object.")
@click.option(
    "--number",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Which start, of a container that waited again after half a minute of quiet.",
)
@options.address
def start_report(
    target: str | None,
    html: Path | None,
    picture: Path | None,
    as_json: bool,
    number: int,
    address: Path,
) -> None:
    """Show what the start of a container waited for, and why it took so long.

    CONTAINER is its id or how that begins, SNAPSHOT the key of its snapshot. Without either, the starts that are known
    are listed; they are kept for a week, also when the container is gone.

    \b
    Each line is a store path: when it was asked for, by which process, and how
    it came. The longest chain of waits, one after another, is marked: what is on
    it made the start slow, what is not cost it nothing.
    """
    from fusesnap.services.daemon_service import (  # noqa: PLC0415 - grpc is slow to import
        ask_start_report,
        ask_starts,
    )

    if target is None:
        if html or picture or number != 1:
            raise click.UsageError("name a container or a snapshot, of which to draw the start")
        starts = ask_starts(address)
        click.echo(json.dumps(starts, indent=2) if as_json else "\n".join(listing(starts)))
        return
    answer = ask_start_report(address, target, number)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    draw(answer, html, picture, say=not as_json)


def draw(answer: dict[str, Any], html: Path | None, picture: Path | None, *, say: bool) -> None:
    """Write the files that were asked for; without any, print. Raises ``InvalidData``, ``StorageFailure``."""
    from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415 - slow to import
    from rich.console import Console  # noqa: PLC0415

    from fusesnap.cli.waterfall.chart import chart  # noqa: PLC0415
    from fusesnap.cli.waterfall.page import page  # noqa: PLC0415
    from fusesnap.cli.waterfall.svg import svg  # noqa: PLC0415
    from fusesnap.cli.waterfall.text import show  # noqa: PLC0415
    from fusesnap.daemon.telemetry.start import Start  # noqa: PLC0415

    try:
        shown = chart(TypeAdapter(Start).validate_python(answer["start"]))
    except (ValidationError, KeyError) as error:
        raise InvalidData(
            f"the daemon's answer is not understood: is it of another release? {error}"
        ) from error
    for file, text in ((html, page), (picture, svg)):
        if file is not None:
            write(file, text(shown))
            if say:
                click.echo(f"{file}: {shown.verdict} {shown.why}".rstrip())
    if say and html is None and picture is None:
        show(shown, Console(highlight=False))


def write(file: Path, text: str) -> None:
    """Raises ``StorageFailure``."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageFailure(f"cannot write {file}: {error.strerror}", error.errno or 0) from error


def listing(starts: list[dict[str, Any]]) -> list[str]:
    """The starts that are known, the newest first."""
    if not starts:
        return ["no container was started with fusesnap of late"]
    rows = [[click.style(word, dim=True) for word in ("STARTED", "SNAPSHOT", "WAS", "IMAGE")]]
    rows += [
        [
            time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(start["began"])),
            start["key"],
            "cold" if start["fuse"] else "complete",
            start["image"],
        ]
        for start in starts
    ]
    return table(rows)
