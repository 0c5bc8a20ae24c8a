"""``fusesnap prefetch``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusesnap.cli import options
from fusesnap.cli.status import size
from fusesnap.daemon.unpackers import LINGER, started_unpackers
from fusesnap.load import for_good

if TYPE_CHECKING:
    from fusesnap.daemon.prefetch import Prefetched


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH|IMAGE...")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="State directory; a running daemon's is fine. "
    "Default: root of --config, else /var/lib/fusesnap, for others than root ~/.local/state/fusesnap",
)
@options.fetching
def prefetch(
    paths: tuple[str, ...],
    state: Path | None,
    config: Path | None,
    substituters: tuple[str, ...],
    trusted_public_keys: tuple[str, ...],
    store_dir: str | None,
) -> None:
    """Realise store paths with all that they reference, and the closures of images, before somebody needs them.

    Containers that start when their closure is complete run without FUSE and ask no cache.

    \b
    An IMAGE is one of
      nix:0/nix/store/<hash>-…       a store path, as Kubernetes is told it
      FILE or DIR                    an archive or a layout, see `fusesnap image --help`
      registry.example.org/redis:7   an image that containerd has
    """
    settings = options.settings(
        config,
        default_root=options.default_state(),
        root=str(state.absolute()) if state else None,
        substituters=substituters,
        trusted_public_keys=trusted_public_keys,
        store_dir=store_dir,
    )
    # They load while we do.
    with started_unpackers(settings, LINGER) as unpackers:
        with for_good():
            import trio  # noqa: PLC0415

            from fusesnap.cli.progress import FetchProgress  # noqa: PLC0415
            from fusesnap.daemon.prefetch import prefetch_closures  # noqa: PLC0415

        with FetchProgress() as progress:
            done = trio.run(prefetch_closures, settings, paths, progress.update, unpackers)
    click.echo(total(done))


def total(done: Prefetched) -> str:
    """What came of it, in a line."""
    came = ""
    if done.received and done.seconds > 0:
        rate = size(round(done.received / done.seconds))
        came = f"; {size(done.received)} came in {done.seconds:.1f} s ({rate}/s)"
    return (
        f"{done.paths} paths, {size(done.nar_bytes)} of NARs{came}: "
        f"{done.fetched} fetched, the rest was there"
    )
