"""``fusesnap doctor``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusesnap.cli import options
from fusesnap.errors import InvalidConfiguration

if TYPE_CHECKING:
    from fusesnap.daemon.doctor.examination import Examination, Section

# Sign, sign where the terminal has ASCII only, colour.
SIGNS = {"ok": ("✓", "+", "green"), "warning": ("!", "!", "yellow"), "failure": ("✗", "x", "red")}

WIDEST = 16  # subjects that are URLs stand out


@click.command()
@options.root
@click.option(
    "--address",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="Unix socket of the daemon. Default: ROOT/fusesnap.sock",
)
@click.option(
    "--containerd-address",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="Socket of containerd. Default: /run/containerd/containerd.sock, or what --containerd-config says",
)
@click.option(
    "--containerd-config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Configuration of containerd. Default: the one that the running containerd was started with",
)
@click.option("--sample", metavar="PATH", help="Store path that the caches are asked for.")
@click.option("--json", "as_json", is_flag=True, help="For scripts: one JSON object.")
@options.fetching
def doctor(
    config: Path | None,
    root: Path | None,
    address: Path | None,
    containerd_address: Path | None,
    containerd_config: Path | None,
    sample: str | None,
    as_json: bool,
    substituters: tuple[str, ...],
    trusted_public_keys: tuple[str, ...],
    store_dir: str | None,
) -> None:
    """Look whether this machine, the caches and containerd are as fusesnap needs them.

    Takes the daemon's options and configuration, and changes nothing. Each line that is not well names its mend.

    \b
    ✓  all is well
    !  it works, but not as well as it could, or could not be found out
    ✗  it does not work; the exit code is that of the first such line

    As root it tries the mounts that containers need, where nobody else sees them.
    """
    # All that can be examined is slow to import.
    from fusesnap.daemon.doctor.containerd import Where  # noqa: PLC0415
    from fusesnap.daemon.doctor.examination import examine, examine_without  # noqa: PLC0415

    try:
        settings = options.settings(
            config,
            root=str(root.absolute()) if root else None,
            address=str(address.absolute()) if address else None,
            substituters=substituters,
            trusted_public_keys=trusted_public_keys,
            store_dir=store_dir,
        )
    except InvalidConfiguration as error:
        examination = examine_without(error)
    else:
        configured = "containerd_address" in settings.model_fields_set
        address = containerd_address or (settings.containerd_address if configured else None)
        where = Where(address, containerd_config)
        why_not = why_no_id_mapping if os.geteuid() == 0 else None
        examination = examine(settings, where, sample=sample, idmapping=why_not)
    if as_json:
        click.echo(json.dumps(examination.as_json(), indent=2))
    else:
        click.echo("\n".join(lines(examination, can_show=can_show(sys.stdout.encoding))))
    sys.exit(examination.status)


def why_no_id_mapping(root: Path) -> str:
    """Why mounts of this state directory cannot be ID-mapped; empty if they can."""
    from fusesnap.daemon.idmap_probe import idmapping  # noqa: PLC0415

    found = idmapping(root)
    return found.state or found.fuse


def can_show(encoding: str) -> bool:
    """Whether the signs can be written in this encoding."""
    try:
        "✓✗→".encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def lines(examination: Examination, *, can_show: bool = True) -> list[str]:
    """The examination as a person reads it."""
    from fusesnap.daemon.doctor.findings import Level  # noqa: PLC0415

    failures, warnings = examination.count(Level.FAILURE), examination.count(Level.WARNING)
    return [
        *(line for each in examination.sections for line in section(each, can_show=can_show)),
        f"{failures} failing, {warnings} doubtful",
    ]


def section(given: Section, *, can_show: bool) -> list[str]:
    """A title, and a line for each finding, with its mend below."""
    longest = max((len(each.subject) for each in given.findings), default=0)
    width = min(longest, WIDEST)
    shown = [click.style(given.title, bold=True)]
    for each in given.findings:
        sign, plain, colour = SIGNS[each.level.value]
        marked = click.style(sign if can_show else plain, fg=colour, bold=True)
        shown.append(f"  {marked} {each.subject:<{width}}  {each.said}")
        if each.mend:
            arrow = click.style("→" if can_show else "->", dim=True)
            shown.append(f"    {'':<{width}}  {arrow} {each.mend}")
    return shown
