"""``fusesnap status``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fusesnap.cli import options

# Seconds without a byte after which a transfer is shown as slow, and as stalled.
SLOW, STALLED = 2.0, 10.0
STEP = 1000  # from one unit to the next
HEADINGS = ("waited", "reader", "asks", "for", "got", "rate", "idle", "path")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For scripts: one JSON object.")
@click.option(
    "--watch",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    help="Show it again every so many seconds, until Ctrl-C.",
)
@options.address
def status(as_json: bool, watch: float | None, address: Path) -> None:
    """Show what waits, what is fetched, and which containers depend on it.

    \b
    waiting   requests of programs that are blocked, the longest wait first: who
              asks (or who last opened the file: "cat?"), for what it waits, what
              has come of it, how fast, and for how long nothing came
    fetching  paths on their way, and how urgent each is: "reader" while a program
              is blocked on it; what is less urgent is paused meanwhile
    link      what was measured of it; how many paths will come when it is free
    on fuse   containers whose store paths are not all here yet: they need the
              daemon to run; the others would not notice its end
    errors    what readers were given instead of data
    """
    from fusesnap.services.daemon_service import ask_status  # noqa: PLC0415 - grpc is slow to import

    while True:
        answer = ask_status(address)
        if watch is not None:
            click.clear()
        click.echo(json.dumps(answer, indent=2) if as_json else "\n".join(lines(answer)))
        if watch is None:
            return
        time.sleep(watch)


def lines(answer: dict[str, Any]) -> list[str]:
    """The status as a person reads it."""
    paths = answer["paths"]
    return [
        f"state      {answer['state']}",
        f"serving    {answer['address']} (services pid {answer['services']['pid']})",
        f"fuse       {answer['fuse_mount']} ({worker(answer['worker'])})",
        f"paths      {paths['valid']} valid, {paths['committed']} committed, {paths['missing']} missing",
        f"store      {store(answer['store'])}",
        *section("cache", [cache(each) for each in answer["caches"]]),
        *section("on fuse", [[key] for key in answer["depend_on_fuse"]]),
        *section("fetching", [fetching(each) for each in answer["fetching"]]),
        *section("link", link(answer)),
        *section("errors", [error(each) for each in answer["errors"]]),
        *waiting(answer),
    ]


def worker(answer: dict[str, Any]) -> str:
    """How the worker is."""
    if answer["pid"] is not None:
        return f"worker pid {answer['pid']}"
    return click.style(f"no worker answers: {answer['error']}", fg="red")


def store(answer: dict[str, Any]) -> str:
    """How much of the disk the store takes, and may take."""
    limits = [
        f"{word} {size(answer[key])}"
        for word, key in (("at most", "max_size"), ("at least free:", "min_free"))
        if answer[key]
    ]
    told = f" ({', '.join(limits)})" if limits else ""
    line = (
        f"{size(answer['size'])}{told}, {size(answer['collectable_size'])} in "
        f"{answer['collectable_paths']} paths not in use; {size(answer['free'])} free on the disk"
    )
    return line + beyond(answer)


def beyond(answer: dict[str, Any]) -> str:
    """What is to be said where the store is beyond its limits."""
    over = answer["over"]
    if not over:
        return ""
    if over <= answer["collectable_size"]:
        return f"; {size(over)} beyond its limits, to be removed"
    return click.style(
        f"; {size(over)} BEYOND ITS LIMITS, and too much is in use: delete images", fg="red"
    )


def cache(each: dict[str, Any]) -> list[str]:
    """A line about a substituter."""
    return [
        each["url"],
        f"{each['narinfos']} narinfos",
        size(each["bytes"]),
        breaker(each),
        condition(each),
    ]


def breaker(each: dict[str, Any]) -> str:
    """Whether requests go to a substituter: ``closed`` is that they do."""
    if each["breaker"] == "closed":
        return "closed" if not each["retry_in"] else f"silent for {each['retry_in']:.0f} s"
    after = f", tried in {each['retry_in']:.1f} s" if each["breaker"] == "open" else ""
    return click.style(f"{each['breaker']}{after}", fg="red")


def condition(each: dict[str, Any]) -> str:
    """What was last wrong with a substituter."""
    last = each["last_error"]
    if not last:
        return "ok"
    avoided = f"avoided for {each['avoided_for']:.0f} s, " if each["avoided_for"] else ""
    return click.style(f"{avoided}last error: {last}", fg="yellow")


def fetching(each: dict[str, Any]) -> list[str]:
    """A line about a transfer."""
    count = each["waiting"]
    return [
        each["priority"],
        got(each),
        rate(each),
        idle(each),
        f"in {each['seconds']:.1f} s",
        f"{count} waiting" if count else "",
        each["path"],
    ]


def link(answer: dict[str, Any]) -> list[list[str]]:
    """What was measured of the link, and what will be fetched when it is free."""
    measured = answer["link"]
    if measured is None or not measured["rate"]:
        return []
    times = [f"{url} {each * 1e3:.0f} ms" for url, each in measured["round_trips"].items() if each]
    later = [f"{count} for {name}" for name, count in answer["requested"].items()]
    return [
        [f"carried up to {size(round(measured['rate']))}/s; round trips: {', '.join(times)}"],
        *([["later: " + ", ".join(later)]] if later else []),
    ]


def error(each: dict[str, Any]) -> list[str]:
    """A line about a kind of errors."""
    return [str(each["count"]), each["kind"], each["cache"] or "-", f"last: {each['last']}"]


def waiting(answer: dict[str, Any]) -> list[str]:
    """A table of the requests that wait."""
    waits = sorted(answer["waiting"], key=lambda each: -float(each["seconds"]))
    if not waits:
        return ["waiting    nobody"]
    rows = [[click.style(word.upper(), dim=True) for word in HEADINGS], *map(waiting_row, waits)]
    patience = f"an error after {answer['stall_timeout']:g} s without progress"
    return [f"waiting    {len(waits)}, {patience}", *("  " + line for line in table(rows))]


def waiting_row(each: dict[str, Any]) -> list[str]:
    """A request that waits."""
    doubt = "" if each["asked"] else "?"
    readers = ", ".join(f"{r['command']}{doubt} ({r['pid']})" for r in each["probable_readers"])
    inside = f" in {', '.join(each['snapshots'])}" if each["snapshots"] else ""
    return [
        click.style(f"{each['seconds']:.1f} s", bold=True),
        (readers or "unknown") + inside,
        each["operation"],
        each["for"],
        got(each),
        rate(each),
        idle(each),
        "/".join(filter(None, (each["path"], each["file"]))),
    ]


def got(each: dict[str, Any]) -> str:
    """How much of a transfer is here."""
    if each["for"] not in ("transfer", "pause"):
        return each["for"] if "operation" not in each else "-"
    paused = ", paused" if each["for"] == "pause" else ""
    return f"{size(each['received'])} of {size(each['expected'])}{paused}"


def rate(each: dict[str, Any]) -> str:
    """How fast a transfer is."""
    return f"{size(round(each['rate']))}/s" if each["for"] == "transfer" else "-"


def idle(each: dict[str, Any]) -> str:
    """For how long nothing came."""
    seconds = each["idle"]
    shown = f"{seconds:.1f} s"
    if seconds < SLOW:
        return shown
    return click.style(shown, fg="red" if seconds >= STALLED else "yellow")


def section(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned rows with a title in front of the first."""
    return [f"{title if number == 0 else '':<11}{line}" for number, line in enumerate(table(rows))]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with their columns aligned; escape sequences take no room."""
    widths = [
        max(len(click.unstyle(cell)) for cell in column) for column in zip(*rows, strict=True)
    ]
    return [
        "  ".join(
            cell + " " * (width - len(click.unstyle(cell)))
            for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def size(count: int | None) -> str:
    """A number of bytes for people."""
    if count is None:
        return "?"
    amount, units = float(count), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while amount >= STEP and unit != "GB":
        amount, unit = amount / STEP, next(units)
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
