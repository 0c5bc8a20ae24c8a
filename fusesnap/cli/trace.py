"""``fusesnap trace``: what starts read, recorded, looked at, and carried to other nodes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from fusesnap.cli import options
from fusesnap.cli.trace_tables import head, listed, shown, summary, trace_json
from fusesnap.errors import FusesnapError, InvalidData, StorageFailure
from fusesnap.fetch.traces.database import NAME, Origin, TraceDatabase
from fusesnap.fetch.traces.naming import chosen, names
from fusesnap.fetch.traces.search import file_name
from fusesnap.nix.signature import SecretKey
from fusesnap.nix.startup_trace import StartupTrace, merge_traces
from fusesnap.nix.startup_trace_text import (
    MAX_TRACE_SIZE,
    format_trace,
    parse_trace,
    sign_trace,
)
from fusesnap.nix.trace_labels import trace_labels

STDIN = "-"

state_option = click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="State directory; a running daemon's is fine. "
    "Default: /var/lib/fusesnap, for others than root ~/.local/state/fusesnap",
)
output_option = click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Where to write it. Default: standard output.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="For scripts: JSON.")


def complete_name(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The closures of which there are traces."""
    try:
        with opened(context.params.get("state")) as database:
            found = names(database.traces())
    except FusesnapError:
        return []
    return [
        CompletionItem(digits, help=title)
        for digits, title in found
        if digits.startswith(incomplete)
    ]


def checked_env(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    """``NAME=VALUE`` words as a dictionary."""
    wrong = [value for value in values if value.find("=") < 1]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r}: expected NAME=VALUE")
    return dict(value.split("=", 1) for value in values)


@click.group()
def trace() -> None:
    """What starts of images read, in which order.

    Every start of a container whose store paths are not all here is recorded; the next start of an image with the same
    store paths is fetched in that order before it asks. NAME is the first digits of a closure's digest as
    `fusesnap trace list` shows it, a store path that the start touches, or the name of what it ran.
    """


@trace.command()
@click.argument("source")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--idle",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="A program that goes on is killed when it has read nothing new for so long.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a start may take.",
)
@click.option(
    "--env", "-e", "environment", multiple=True, metavar="NAME=VALUE", callback=checked_env
)
@output_option
@state_option
@options.fetching
def record(
    source: str,
    command: tuple[str, ...],
    idle: float,
    time_limit: float,
    environment: dict[str, str],
    output: Path | None,
    state: Path | None,
    config: Path | None,
    substituters: tuple[str, ...],
    trusted_public_keys: tuple[str, ...],
    store_dir: str | None,
) -> None:
    """Record a start of COMMAND in SOURCE, completely, whatever is in the store already.

    \b
    SOURCE is what `fusesnap mount` takes:
      /nix/store/<hash>-<name>  a store path: COMMAND is looked for in its bin/
      oci-archive:FILE[:REF]    an image in a tar file, with what Nix layers stand for
      oci:DIR[:REF]             an image layout in a directory, likewise

    \b
    fusesnap trace record /nix/store/<hash>-redis-7.2 -- redis-server
    fusesnap trace record oci-archive:image.tar -- /bin/sh -c 'exec server'

    The command runs apart, in a root that it may write to and that is thrown away, with this machine's network. The
    trace is kept in place of what was recorded of the same store paths before; with --output it is written too.
    """
    import trio  # noqa: PLC0415 - slow to import

    from fusesnap.cli.progress import LiveLine  # noqa: PLC0415
    from fusesnap.daemon.trace_record import Command  # noqa: PLC0415
    from fusesnap.daemon.trace_record import record as record_start  # noqa: PLC0415
    from fusesnap.fetch.traces.recorder import Bounds  # noqa: PLC0415

    settings = options.settings(
        config,
        default_root=options.default_state(),
        root=str(state.absolute()) if state else None,
        substituters=substituters,
        trusted_public_keys=trusted_public_keys,
        store_dir=store_dir,
    )
    own = f"{source}/bin:" if source.startswith("/") else ""
    wanted = Command(command, {"PATH": f"{own}/bin:/usr/bin:/sbin:/usr/sbin", **environment})
    bounds = Bounds(idle=idle, seconds=time_limit)
    with LiveLine() as line:
        found = trio.run(record_start, settings, source, wanted, bounds, line.update)
    if output is not None:
        write(output, format_trace(found))
    click.echo("\n".join(head(found)), err=True)


@trace.command("list")
@json_option
@state_option
def list_(state: Path | None, as_json: bool) -> None:
    """List the traces of this node."""
    with opened(state) as database:
        stored = database.traces()
    if as_json:
        click.echo(json.dumps([summary(each) for each in stored], indent=2))
    else:
        click.echo("\n".join(listed(stored)))


@trace.command()
@click.argument("name", shell_complete=complete_name)
@click.option("--extents", is_flag=True, help="Also each piece that was read, in order.")
@json_option
@state_option
def show(name: str, state: Path | None, as_json: bool, extents: bool) -> None:
    """Show the trace NAME: store paths and files in order of first use, and how much of each.

    NAME may also be a file with a trace, or - for standard input.
    """
    found = find(name, state)
    if as_json:
        click.echo(json.dumps(trace_json(found), indent=2))
    else:
        click.echo("\n".join(shown(found, extents=extents)))


@trace.command()
@click.argument("name", shell_complete=complete_name)
@output_option
@click.option(
    "--secret-key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Sign it with this key, in the form of `nix key generate-secret`.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Put it into this binary cache, where nodes that trust the key find it.",
)
@click.option(
    "--annotations",
    is_flag=True,
    help="Write it as annotations for the image's Nix layer: a JSON object.",
)
@state_option
def export(
    name: str,
    output: Path | None,
    secret_key_file: Path | None,
    cache: Path | None,
    annotations: bool,
    state: Path | None,
) -> None:
    """Write the trace NAME, to be imported on another node, or to go with the image.

    A binary cache has it as trace/<digest of the closure>; an image may carry it in annotations of its Nix layer. Of
    both, nodes use only what a key that they trust has signed.
    """
    found = find(name, state)
    if secret_key_file is not None:
        found = sign_trace(found, read_key(secret_key_file))
    for option, given in (("--cache", cache is not None), ("--annotations", annotations)):
        if given and not found.signatures:
            raise click.UsageError(f"{option}: nodes would not trust it without --secret-key-file")
    if cache is not None:
        write(make_parent(cache / file_name(found.closure)), format_trace(found))
    if annotations:
        write(output, json.dumps(trace_labels(found), indent=2).encode() + b"\n")
    elif cache is None or output is not None:
        write(output, format_trace(found))


@trace.command("import")
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE...",
    type=click.Path(path_type=Path, allow_dash=True),
)
@state_option
def import_(files: tuple[Path, ...], state: Path | None) -> None:
    """Have the next start of an image follow the trace in FILE; - is standard input.

    What you import is your word: it need not be signed.
    """
    found = [read(file) for file in files]
    with opened(state) as database:
        for each in found:
            database.put(each, Origin.IMPORTED, int(time.time()))
            click.echo(f"{each.closure}: {len(each.paths)} paths, {each.size} bytes")


@trace.command()
@click.argument(
    "sources", nargs=-1, required=True, metavar="NAME|FILE...", shell_complete=complete_name
)
@output_option
@state_option
def merge(sources: tuple[str, ...], output: Path | None, state: Path | None) -> None:
    """Make one trace of several of the same closure.

    It reads what the first reads, in its order, then what the others read besides, and lacks what all of them lack.
    """
    write(output, format_trace(merge_traces(find(source, state) for source in sources)))


@trace.command()
@click.argument("name", shell_complete=complete_name)
@state_option
def remove(name: str, state: Path | None) -> None:
    """Forget all traces of the closure that NAME means: its next start is recorded anew."""
    with opened(state) as database:
        closure = chosen(database.traces(), name).trace.closure
        count = database.remove(closure)
    click.echo(f"{closure}: {count} forgotten")


@contextmanager
def opened(state: Path | None) -> Iterator[TraceDatabase]:
    """The traces of a state directory. Raises ``StorageFailure``."""
    database = TraceDatabase((state or options.default_state()) / NAME)
    try:
        yield database
    finally:
        database.close()


def find(name: str, state: Path | None) -> StartupTrace:
    """The trace that ``name`` means: of the node, or in a file."""
    if name == STDIN or Path(name).is_file():
        return read(Path(name))
    with opened(state) as database:
        return chosen(database.traces(), name).trace


def read(file: Path) -> StartupTrace:
    """The trace in ``file``. Raises ``InvalidData`` and ``StorageFailure``, which name it."""
    try:
        if str(file) == STDIN:
            data = sys.stdin.buffer.read(MAX_TRACE_SIZE + 1)
        else:
            with file.open("rb") as stream:
                data = stream.read(MAX_TRACE_SIZE + 1)
        return parse_trace(data)
    except OSError as error:
        raise StorageFailure(f"cannot read {file}: {error.strerror}", error.errno or 0) from error
    except InvalidData as error:
        raise InvalidData(f"{file}: {error}") from error


def read_key(file: Path) -> SecretKey:
    """The secret key in ``file``. Raises ``InvalidData`` and ``StorageFailure``, which name it."""
    try:
        return SecretKey.parse(file.read_text(encoding="ascii"))
    except OSError as error:
        raise StorageFailure(f"cannot read {file}: {error.strerror}", error.errno or 0) from error
    except (InvalidData, UnicodeDecodeError) as error:
        raise InvalidData(f"{file}: {error}") from error


def make_parent(file: Path) -> Path:
    """``file``, in a directory that is there. Raises ``StorageFailure``."""
    try:
        file.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise StorageFailure(
            f"cannot create {file.parent}: {error.strerror}", error.errno or 0
        ) from error
    return file


def write(output: Path | None, data: bytes) -> None:
    """Write to a file, which is there whole or not at all, or to standard output. Raises ``StorageFailure``."""
    if output is None or str(output) == STDIN:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    fresh = output.with_name(f".{output.name}.new")
    try:
        fresh.write_bytes(data)
        fresh.rename(output)
    except OSError as error:
        raise StorageFailure(
            f"cannot write {output}: {error.strerror}", error.errno or 0
        ) from error
