"""``fusesnap image``: images without a registry, and into one."""

from __future__ import annotations

import json
import os
import platform as machine
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusesnap.cli import options
from fusesnap.cli.status import size as bytes_for_people
from fusesnap.config import Settings

if TYPE_CHECKING:
    from fusesnap.daemon.image_build import Order

_PORT = re.compile(r"[0-9]{1,5}(?:/(?:tcp|udp|sctp))?", re.ASCII)


# Anything goes; a shell completes the names of files.
FILE = click.Path()

as_json = click.option("--json", "as_json", is_flag=True, help="For scripts: one JSON object.")


@click.group()
def image() -> None:
    """Make images of store paths, look at them, and bring them where they are wanted.

    \b
    An IMAGE is one of
      FILE or DIR               an OCI archive or layout, or what `docker save` writes, also compressed
      oci-archive:FILE[:REF]    the same, and which of its images; also oci:DIR[:REF], docker-archive:FILE[:REF]
      /nix/store/<hash>-<name>  such a file in a binary cache; of any other package an image is made
      nix:0/nix/store/<hash>-…  the same, as Kubernetes is told it
    """


def pairs(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    """``NAME=VALUE`` options as a dictionary."""
    for value in values:
        if "=" not in value or value.startswith("="):
            raise click.BadParameter(f"{value!r}: NAME=VALUE is expected")
    return dict(value.partition("=")[::2] for value in values)


def ports(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> frozenset[str]:
    """Checked ``PORT[/PROTOCOL]`` options."""
    for value in values:
        if not _PORT.fullmatch(value) or not 0 < int(value.partition("/")[0]) < 65536:  # noqa: PLR2004
            raise click.BadParameter(f"{value!r}: a port is expected, as 6379 or 53/udp")
    return frozenset(value if "/" in value else f"{value}/tcp" for value in values)


def absolute(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> frozenset[str]:
    """Checked paths in a container."""
    for value in values:
        if not value.startswith("/"):
            raise click.BadParameter(f"{value!r}: an absolute path is expected")
    return frozenset(values)


@image.command()
@click.argument("paths", nargs=-1, required=True, type=FILE, metavar="PATH...")
@click.option(
    "-o",
    "--output",
    type=FILE,
    required=True,
    metavar="FILE",
    help="Where the image goes: FILE or oci-archive:FILE for an archive, oci:DIR for a layout.",
)
@click.option(
    "-t", "--tag", metavar="NAME", help="The image's name, as registry.example.org/redis:7."
)
@click.option(
    "--entrypoint",
    multiple=True,
    metavar="WORD",
    help="What a container starts; once for each word. Default: the only program of the first "
    "PATH, or the one that is named like it.",
)
@click.option(
    "--cmd", multiple=True, metavar="WORD", help="Arguments that a user may replace; once for each."
)
@click.option(
    "-e", "--env", multiple=True, callback=pairs, metavar="NAME=VALUE", help="Environment."
)
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Who the container runs as.")
@click.option("-w", "--workdir", metavar="DIR", help="Where it starts.")
@click.option("-l", "--label", multiple=True, callback=pairs, metavar="NAME=VALUE", help="Label.")
@click.option(
    "-p", "--expose", multiple=True, callback=ports, metavar="PORT", help="Port, as 6379 or 53/udp."
)
@click.option("-v", "--volume", multiple=True, callback=absolute, metavar="DIR", help="Volume.")
@click.option(
    "--copy-to-root",
    multiple=True,
    metavar="PATH",
    help="Store path whose files appear in the root too, as links; may be given several times.",
)
@click.option("--from", "base", type=FILE, metavar="IMAGE", help="Image that this one is built on.")
@click.option(
    "--arch",
    metavar="ARCH[/VARIANT]",
    help="Architecture of the packages, as amd64 or arm64. Default: this machine's.",
)
@click.option(
    "--closure-list",
    metavar="PATH",
    help="Store path whose file store-paths lists the closure (closureInfo of nixpkgs): named as nix-closure too.",
)
@click.option(
    "--realise",
    is_flag=True,
    help="Fetch and verify the closure, instead of reading the first bytes of each NAR.",
)
@as_json
@options.state
@options.fetching
def build(paths: tuple[str, ...], output: str, as_json: bool, **given: Any) -> None:
    """Build an image of the closures of store paths, a few KiB large.

    It names the store paths instead of carrying them: they are fetched where it runs, by fusesnap or nix-snapshotter.
    No Nix is needed, and nothing of the closure but narinfos and the first bytes of NARs is fetched. The same command
    gives the same bytes.

    \b
    fusesnap image build /nix/store/<hash>-redis-7.0.15 --entrypoint redis-server -p 6379 -o redis.tar
    """
    import trio  # noqa: PLC0415

    from fusesnap.cli.progress import LiveLine  # noqa: PLC0415
    from fusesnap.daemon.image_build import build_image  # noqa: PLC0415

    order = order_of(paths, output, given)
    with LiveLine() as line:
        built = trio.run(build_image, settings_of(given), order, line.update)
    if as_json:
        click.echo(json.dumps({"output": str(order.output), **asdict(built)}, indent=2))
        return
    if built.remark is not None:
        click.echo(f"note: {built.remark}", err=True)
    size = bytes_for_people(built.layer_size)
    click.echo(f"{order.output}: {built.digest}, {built.paths} store paths in a layer of {size}")


def order_of(paths: tuple[str, ...], output: str, given: dict[str, Any]) -> Order:
    """What ``image build`` is to build, by its options, which are taken out of ``given``."""
    from fusesnap.daemon.image_build import Order  # noqa: PLC0415
    from fusesnap.images.run_config import RunConfig  # noqa: PLC0415

    place, as_layout = output_place(output)
    run = RunConfig(
        entrypoint=given.pop("entrypoint") or None,
        command=given.pop("cmd") or None,
        environment=given.pop("env"),
        user=given.pop("user"),
        working_directory=given.pop("workdir"),
        labels=given.pop("label"),
        ports=given.pop("expose"),
        volumes=given.pop("volume"),
    )
    return Order(
        paths=paths,
        run=run,
        platform=platform_of(given.pop("arch")),
        output=place,
        as_layout=as_layout,
        tag=given.pop("tag"),
        copy_to_root=given.pop("copy_to_root"),
        base=given.pop("base"),
        closure_list=given.pop("closure_list"),
        realise=given.pop("realise"),
    )


def settings_of(fetching: dict[str, Any]) -> Settings:
    """The settings that the options of ``options.state`` and ``options.fetching`` give."""
    state = fetching.pop("state")
    return options.settings(
        fetching.pop("config"),
        default_root=options.default_state(),
        root=str(state.absolute()) if state else None,
        **fetching,
    )


def output_place(text: str) -> tuple[Path, bool]:
    """Where an image goes, and whether as a layout."""
    transport, colon, rest = text.partition(":")
    if colon and transport in ("oci", "oci-archive"):
        if not rest:
            raise click.BadParameter(f"{text!r}: a path is expected after {transport}:")
        return Path(rest), transport == "oci"
    return Path(text), False


def platform_of(arch: str | None) -> Any:
    """The platform of an architecture, as images or uname(2) name it; this machine's where None is given."""
    from fusesnap.errors import InvalidConfiguration  # noqa: PLC0415
    from fusesnap.images.platform import Platform  # noqa: PLC0415

    try:
        return Platform.of_machine(arch or machine.machine())
    except InvalidConfiguration:
        if arch is None:
            raise
        return Platform.parse(f"linux/{arch}")


architecture = click.option(
    "--arch",
    metavar="ARCH[/VARIANT]",
    help="Which image of several, as amd64 or arm64. Default: this machine's.",
)


@image.command()
@click.argument("name", type=FILE, metavar="IMAGE")
@click.argument("reference", required=False, metavar="[REF]")
@architecture
@click.option(
    "--plain-http",
    is_flag=True,
    help="No TLS. For a registry on this machine none is expected anyway.",
)
@as_json
@options.state
@options.fetching
def push(
    name: str,
    reference: str | None,
    arch: str | None,
    plain_http: bool,
    as_json: bool,
    **fetching: Any,
) -> None:
    """Push IMAGE to a registry as REF, registry.example.org/redis:7 for instance.

    Without REF the image goes where its own name says. Blobs that are there are not sent again. Passwords are those of
    `docker login` or `podman login`, credential helpers included.

    \b
    fusesnap image push redis.tar registry.example.org/redis:7
    fusesnap image push nix:0/nix/store/<hash>-redis-7.0.15 registry.example.org/redis:7
    """
    import trio  # noqa: PLC0415

    from fusesnap.cli.progress import FetchProgress  # noqa: PLC0415
    from fusesnap.daemon.image_push import PushOrder, push_image  # noqa: PLC0415
    from fusesnap.registry.reference import parse_registry_reference  # noqa: PLC0415

    settings = settings_of(fetching)
    target = parse_registry_reference(reference if reference is not None else own_name(name))
    order = PushOrder(name, target, platform_of(arch), credential_files(), plain_http)
    with FetchProgress() as progress:
        done = trio.run(push_image, settings, order, progress.update)
    if as_json:
        report = {"reference": str(target), **asdict(done), "digest": str(done.digest)}
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(
        f"{target}@{done.digest}: {done.sent} blobs with {bytes_for_people(done.sent_bytes)} sent,"
        f" {done.present} were there"
    )


@image.command()
@click.argument("name", type=FILE, metavar="IMAGE")
@click.argument("reference", required=False, metavar="[NAME]")
@architecture
@click.option(
    "-n",
    "--namespace",
    default="default",
    show_default=True,
    metavar="NAME",
    help="containerd's namespace; k8s.io for Kubernetes.",
)
@click.option(
    "--containerd-address",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="containerd's socket. Default: containerd-address of --config, else /run/containerd/containerd.sock",
)
@click.option(
    "--address",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="The daemon's socket. Default: address of --config, else fusesnap.sock in the state directory",
)
@as_json
@options.state
@options.fetching
def load(
    name: str,
    reference: str | None,
    arch: str | None,
    namespace: str,
    as_json: bool,
    containerd_address: Path | None,
    address: Path | None,
    **fetching: Any,
) -> None:
    """Load IMAGE into containerd, where `fusesnap daemon` serves snapshots, and unpack it.

    It is called NAME there, else as IMAGE itself says.

    \b
    fusesnap image load redis.tar
    ctr run --rm --snapshotter fusesnap registry.example.org/redis:7 r1
    """
    import trio  # noqa: PLC0415

    from fusesnap.cli.progress import LiveLine  # noqa: PLC0415
    from fusesnap.daemon.image_load import LoadOrder, load_image  # noqa: PLC0415
    from fusesnap.registry.reference import parse_registry_reference  # noqa: PLC0415

    for key, place in (("containerd_address", containerd_address), ("address", address)):
        fetching[key] = None if place is None else str(place.absolute())
    settings = settings_of(fetching)
    full = str(parse_registry_reference(reference if reference is not None else own_name(name)))
    order = LoadOrder(name, full, namespace, platform_of(arch))
    with LiveLine() as line:
        digest = trio.run(load_image, settings, order, line.update)
    if as_json:
        report = {"reference": full, "digest": digest, "namespace": namespace}
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(f"{full}@{digest} is in namespace {namespace}")


@image.command()
@click.argument("name", type=FILE, metavar="IMAGE")
@architecture
@as_json
@options.state
@options.fetching
def inspect(name: str, arch: str | None, as_json: bool, **fetching: Any) -> None:
    """Show what IMAGE is: how it starts, its layers, the store paths that it stands for, and where those are."""
    import trio  # noqa: PLC0415

    from fusesnap.cli.progress import LiveLine  # noqa: PLC0415
    from fusesnap.daemon.image_inspection import inspect_image  # noqa: PLC0415

    with LiveLine() as line:
        report = trio.run(
            inspect_image, settings_of(fetching), name, platform_of(arch), line.update
        )
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(lines(report)))


def lines(report: dict[str, Any]) -> list[str]:
    """An inspection, for people."""
    run = report["config"]
    facts = [
        ("image", report["manifest"]),
        ("id", report["id"]),
        ("platform", report["platform"]),
        *(
            (key, shlex.join(run[name]))
            for key, name in (("entrypoint", "Entrypoint"), ("cmd", "Cmd"), ("env", "Env"))
            if run.get(name)
        ),
        *(
            (key, run[name])
            for key, name in (("user", "User"), ("workdir", "WorkingDir"))
            if run.get(name)
        ),
    ]
    return [
        *(f"{key:<11}{value}" for key, value in facts),
        *(_layer_line(number, layer) for number, layer in enumerate(report["layers"])),
        "",
        *(_path_line(path) for path in report["paths"]),
        *([""] if report["paths"] else []),
        _summary(report),
    ]


def _layer_line(number: int, layer: dict[str, Any]) -> str:
    stands_for = f", {layer['store_paths']} store paths" if layer["store_paths"] else ""
    return (
        f"{f'layer {number}':<11}{layer['digest']}, {bytes_for_people(layer['size'])}{stands_for}"
    )


def _path_line(path: dict[str, Any]) -> str:
    size = bytes_for_people(path["nar_size"]) if path["nar_size"] is not None else "?"
    where = "here" if path["present"] else path["cache"] or "nowhere"
    return f"{size:>9}  {where:<30}  {path['path']}"


def _summary(report: dict[str, Any]) -> str:
    paths = report["paths"]
    if not paths:
        return "no store paths: an ordinary image"
    missing = [path for path in paths if not path["present"]]
    here = len(paths) - len(missing)
    verb = "is" if here == 1 else "are"
    size = bytes_for_people(report["nar_size"])
    text = f"{len(paths)} store paths with {size}: {here} {verb} here"
    if missing:
        text += (
            f", {len(missing)} with {bytes_for_people(report['missing_nar_size'])} are to be fetched"
            f" ({bytes_for_people(report['missing_file_size'])} over the network)"
        )
    if report["unavailable"]:
        text += f"; {report['unavailable']} cannot be had"
    return text


def own_name(image_name: str) -> str:
    """The name that an archive or layout says its image has."""
    from fusesnap.daemon.image_sources import local_image, name_of  # noqa: PLC0415

    path, reference = local_image(image_name)
    return reference if reference is not None else name_of(path)


def credential_files() -> list[Path]:
    """Where `docker login` and `podman login` keep passwords, in the order in which they are looked for."""
    home = Path.home()
    docker = Path(os.environ.get("DOCKER_CONFIG") or home / ".docker")
    named = os.environ.get("REGISTRY_AUTH_FILE")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    return [
        *([Path(named)] if named else []),
        docker / "config.json",
        *([Path(runtime) / "containers" / "auth.json"] if runtime else []),
        config / "containers" / "auth.json",
    ]
