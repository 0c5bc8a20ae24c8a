"""``fusesnap prefetch``."""

from __future__ import annotations

from pathlib import Path

import click

from fusesnap.cli import options


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
    import trio  # noqa: PLC0415

    from fusesnap.cli.progress import FetchProgress  # noqa: PLC0415
    from fusesnap.daemon.prefetch import prefetch_closures  # noqa: PLC0415

    settings = options.settings(
        config,
        default_root=options.default_state(),
        root=str(state.absolute()) if state else None,
        substituters=substituters,
        trusted_public_keys=trusted_public_keys,
        store_dir=store_dir,
    )
    with FetchProgress() as progress:
        done = trio.run(prefetch_closures, settings, paths, progress.update)
    click.echo(
        f"{done.paths} paths, {done.nar_bytes} bytes of NARs: {done.fetched} fetched, the rest was there"
    )
