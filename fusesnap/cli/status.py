"""``fusesnap status``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fusesnap.config import DEFAULT_ROOT, SOCKET_NAME


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For scripts: one JSON object.")
@click.option(
    "--address",
    type=click.Path(path_type=Path),
    default=DEFAULT_ROOT / SOCKET_NAME,
    show_default=True,
    metavar="SOCKET",
    help="The daemon's socket.",
)
def status(as_json: bool, address: Path) -> None:
    """Show what the daemon has, what it fetches, and for whom."""
    from fusesnap.services.daemon_service import ask_status  # noqa: PLC0415 - grpc is slow to import

    answer = ask_status(address)
    click.echo(json.dumps(answer, indent=2) if as_json else "\n".join(lines(answer)))


def lines(answer: dict[str, Any]) -> list[str]:
    """The status as a person reads it."""
    paths = answer["paths"]
    shown = [
        f"state      {answer['state']}",
        f"serving    {answer['address']}",
        f"fuse       {answer['fuse_mount']} (worker pid {answer['worker']['pid']})",
        f"paths      {paths['valid']} valid, {paths['committed']} committed, {paths['missing']} missing",
    ]
    for cache in answer["caches"]:
        state = f"last error: {cache['last_error']}" if cache["last_error"] else "ok"
        shown.append(
            f"cache      {cache['url']}  {cache['narinfos']} narinfos, {size(cache['bytes'])}  {state}"
        )
    for flight in answer["fetching"]:
        readers = (
            ", ".join(f"{r['command']} ({r['pid']})" for r in flight["probable_readers"])
            or "nobody yet"
        )
        shown.append(
            f"fetching   {flight['path']}  {size(flight['received'])} of {size(flight['expected'])} "
            f"in {flight['seconds']:.1f} s, for {readers}"
        )
    return shown


STEP = 1000  # from one unit to the next


def size(count: int | None) -> str:
    """A number of bytes for people."""
    if count is None:
        return "?"
    amount, units = float(count), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while amount >= STEP and unit != "GB":
        amount, unit = amount / STEP, next(units)
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
