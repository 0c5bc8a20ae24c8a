"""``fusesnap publish``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusesnap.cli import options
from fusesnap.errors import InvalidConfiguration, InvalidData

if TYPE_CHECKING:
    from fusesnap.config import Settings
    from fusesnap.daemon.publish import Publication
    from fusesnap.publish.bundles import PublishedBundle
    from fusesnap.publish.check import Checked
    from fusesnap.publish.check_bundles import CheckedBundle
    from fusesnap.publish.publisher import Published

EPILOG = """\b
Publish a system's closure from the local Nix store, and look whether all is well:
  nix key generate-secret --key-name cache.example.org-1 > secret
  fusesnap publish --to /srv/cache --secret-key-file secret --closure /nix/store/<hash>-system
  fusesnap publish --check --to /srv/cache --secret-key-file secret

\b
With what its start reads, so that a node gets that by one request (a trace is recorded by `fusesnap trace record`):
  fusesnap publish --to /srv/cache --secret-key-file secret --closure --trace start /nix/store/<hash>-redis

Passwords, tokens and certificate authorities of servers are those of --config (keys netrc-file, token-files, ca-file);
a bucket's are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.

\b
Serve the directory with any web server that answers Range requests. Interrupted, the same command goes on where it was.
"""


@click.command(epilog=EPILOG)
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option(
    "--to",
    "target",
    required=True,
    metavar="DIR|URL",
    help="The cache to write: a directory, a URL of a server that takes PUT, or a bucket: "
    "s3://BUCKET[/PREFIX][?endpoint=HOST&region=NAME&scheme=http].",
)
@click.option(
    "--from",
    "source",
    default="/",
    show_default=True,
    metavar="DIR|URL",
    help="Where the paths are: the root directory of a Nix store, a state directory of fusesnap's, or the URL of a "
    "binary cache, whose paths must be signed by a --trusted-public-key.",
)
@click.option(
    "--secret-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The key that signs, as `nix key generate-secret` writes it.",
)
@click.option(
    "--closure",
    is_flag=True,
    help="Publish all that the paths reference, too, and a bundle for each path's closure and for that of all: one "
    "file with its narinfos and indexes.",
)
@click.option(
    "--trace",
    "traces",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A startup trace, as `fusesnap trace export` writes it: the closure's bundle gets what it says is read. "
    "Several of one closure are merged. Default: the trace that the cache has, else what the bundle there has.",
)
@click.option(
    "--allow-partial",
    is_flag=True,
    help="Take a trace that does not have all that its start read.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Publish nothing: read the whole cache, or the given paths, and verify every byte, signature and index.",
)
@click.option(
    "--level", type=click.IntRange(1, 22), default=19, show_default=True, help="Level of zstd."
)
@click.option(
    "--chunk-size",
    type=click.IntRange(16, 512),
    default=64,
    show_default=True,
    metavar="KIB",
    help="How much of a NAR is compressed, and so fetched, at a time.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 1024),
    default=None,
    help="Threads that compress. Default: one for each processor.",
)
@click.option(
    "--priority",
    type=click.IntRange(0),
    default=40,
    show_default=True,
    help="For the nix-cache-info of a new cache; lower is asked first.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print what became of each path and bundle as JSON."
)
@options.config
@options.trusted_public_key
@options.store_dir
def publish(
    paths: tuple[str, ...],
    target: str,
    source: str,
    secret_key_file: Path | None,
    check: bool,
    as_json: bool,
    config: Path | None,
    trusted_public_keys: tuple[str, ...],
    store_dir: str | None,
    closure: bool,
    traces: tuple[Path, ...],
    allow_partial: bool,
    level: int,
    chunk_size: int,
    jobs: int | None,
    priority: int,
) -> None:
    """Write store paths into a binary cache that any Nix reads, and fusesnap by the chunk.

    NARs are compressed in chunks that can be fetched alone, and each has a signed index. What is there already is kept.
    """
    from fusesnap.daemon.publish import Publication  # noqa: PLC0415

    settings = options.settings(
        config, trusted_public_keys=trusted_public_keys, store_dir=store_dir
    )
    if config is not None:
        trusted_public_keys = tuple(settings.trusted_public_keys)
    if check:
        _check(settings, target, secret_key_file, trusted_public_keys, paths, as_json=as_json)
        return
    if secret_key_file is None:
        raise click.UsageError(
            "Missing option '--secret-key-file': narinfos and indexes are signed."
        )
    if not paths:
        raise click.UsageError("Missing argument 'PATH...'.")
    if traces and not closure:
        raise click.UsageError("--trace needs --closure: what a start reads belongs to a closure.")
    publication = Publication(
        source,
        target,
        paths,
        closure,
        level,
        chunk_size * 1024,
        jobs or 0,
        priority,
        traces,
        allow_partial,
    )
    _publish(settings, publication, secret_key_file, as_json=as_json)


def _publish(
    settings: Settings, publication: Publication, key_file: Path, *, as_json: bool
) -> None:
    import trio  # noqa: PLC0415

    from fusesnap.cli.progress import PublishProgress  # noqa: PLC0415
    from fusesnap.daemon.publish import publish_paths, read_secret_key  # noqa: PLC0415

    key = read_secret_key(key_file)
    with PublishProgress("publishing") as progress:
        results, bundles = trio.run(
            publish_paths,
            settings,
            publication,
            key,
            lambda infos: progress.plan(sum(info.nar_size for info in infos)),
            lambda done: progress.advance(done.store_path.name, done.nar_size),
        )
    if as_json:
        said = {
            "paths": [*map(_published, results)],
            "bundles": [*map(_published_bundle, bundles)],
        }
        click.echo(json.dumps(said, indent=2))
        return
    kept = sum(result.kept for result in results)
    click.echo(
        f"{len(results)} paths, {sum(r.nar_size for r in results)} bytes of NARs as"
        f" {sum(r.file_size for r in results)}, indexes {sum(r.index_size for r in results)}:"
        f" {sum(r.uploaded for r in results)} bytes written, {kept} paths were there"
    )
    for bundle in bundles:
        there = "was there" if bundle.kept else f"{bundle.uploaded} bytes written"
        click.echo(
            f"{bundle.names[-1]}: closure {bundle.closure}, {bundle.paths} paths, {bundle.extents} extents,"
            f" {bundle.size} bytes: {there}"
        )


def _published(result: Published) -> dict[str, Any]:
    return {
        "path": result.store_path.base_name,
        "kept": result.kept,
        "narSize": result.nar_size,
        "fileSize": result.file_size,
        "indexSize": result.index_size,
        "uploaded": result.uploaded,
    }


def _published_bundle(bundle: PublishedBundle) -> dict[str, Any]:
    return {
        "names": list(bundle.names),
        "closure": bundle.closure.hex,
        "kept": bundle.kept,
        "paths": bundle.paths,
        "indexes": bundle.indexes,
        "extents": bundle.extents,
        "size": bundle.size,
        "uploaded": bundle.uploaded,
    }


def _check(
    settings: Settings,
    target: str,
    key_file: Path | None,
    trusted_public_keys: Sequence[str],
    paths: Sequence[str],
    *,
    as_json: bool,
) -> None:
    import trio  # noqa: PLC0415

    from fusesnap.cli.progress import PublishProgress  # noqa: PLC0415
    from fusesnap.daemon.publish import check_cache, read_secret_key  # noqa: PLC0415
    from fusesnap.nix.signature import PublicKey  # noqa: PLC0415

    keys = [PublicKey.parse(text) for text in trusted_public_keys]
    if key_file is not None:
        keys.append(read_secret_key(key_file).public_key())
    if not keys:
        raise InvalidConfiguration(
            "nothing can be checked without a key: give --trusted-public-key, or --secret-key-file"
        )
    with PublishProgress("checking") as progress:
        results, bundles = trio.run(
            check_cache,
            settings,
            target,
            keys,
            paths,
            lambda done: progress.advance(done.name, done.nar_size),
        )
    _report(results, bundles, as_json=as_json)
    bad = sum(bool(result.faults) for result in results)
    bad_bundles = sum(bool(bundle.faults) for bundle in bundles)
    if bad or bad_bundles:
        raise InvalidData(
            f"{target}: {bad} of {len(results)} paths and {bad_bundles} of {len(bundles)} bundles"
            " are not as they must be"
        )


def _report(results: Sequence[Checked], bundles: Sequence[CheckedBundle], *, as_json: bool) -> None:
    if as_json:
        said = {
            "paths": [*map(_checked, results)],
            "bundles": [*map(_checked_bundle, bundles)],
        }
        click.echo(json.dumps(said, indent=2))
        return
    for result in results:
        for fault in result.faults:
            click.echo(f"{result.store_path or result.name}: {fault}")
    for bundle in bundles:
        for fault in bundle.faults:
            click.echo(f"{bundle.name}: {fault}")
    plain = sum(not result.indexed for result in results)
    absent = {path for result in results for path in result.missing}
    sys.stdout.write(
        f"{len(results)} paths, {sum(result.nar_size for result in results)} bytes of NARs:"
        f" {sum(not result.faults for result in results)} are well, {plain} have no index,"
        f" {len(absent)} paths that they reference are not in this cache\n"
    )
    if bundles:
        well = sum(not bundle.faults for bundle in bundles)
        click.echo(f"{len(bundles)} bundles: {well} are well")


def _checked(result: Checked) -> dict[str, Any]:
    return {
        "narinfo": result.name,
        "path": result.store_path.base_name if result.store_path else None,
        "narSize": result.nar_size,
        "indexed": result.indexed,
        "faults": list(result.faults),
        "missingReferences": [path.base_name for path in result.missing],
    }


def _checked_bundle(bundle: CheckedBundle) -> dict[str, Any]:
    return {
        "name": bundle.name,
        "closure": bundle.closure.hex if bundle.closure else None,
        "paths": bundle.paths,
        "extents": bundle.extents,
        "size": bundle.size,
        "faults": list(bundle.faults),
    }
