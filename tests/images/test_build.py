from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from fusesnap.errors import InvalidArgument, InvalidData
from fusesnap.images import build as building
from fusesnap.images.archive_writer import write_archive, write_layout
from fusesnap.images.base_tree import open_base_tree
from fusesnap.images.build import BuiltImage, build
from fusesnap.images.layer import FileKind
from fusesnap.images.opening import OpenImage, open_image
from fusesnap.images.placeholders import nix_layer_tar
from fusesnap.images.platform import Platform
from fusesnap.images.run_config import RunConfig, parse_run_config
from fusesnap.nix.closure_labels import ClosureLabel, PathLabels, parse_nix_labels
from fusesnap.nix.nar import NarEnd
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import Tree, TreeBuilder

from ..store import conftest as store_paths

STORE = StoreDir()
AMD64 = Platform("linux", "amd64")
TOOL = StorePath("0" * 32, "tool-1")
DATA = StorePath("1" * 32, "data.txt")
LIST = StorePath("2" * 32, "closure-info")
KINDS = {DATA: FileKind.REGULAR, TOOL: FileKind.DIRECTORY}
TAR = nix_layer_tar(KINDS, {}, STORE)
BASE_TAR = bytes(10240)


def made(run: RunConfig = RunConfig(), base: OpenImage | None = None, **more: Any) -> BuiltImage:  # noqa: B008
    return build(TAR, (TOOL, DATA), more.get("closure_list"), run, AMD64, STORE, base)


def reopened(path: Path) -> tuple[Any, list[bytes]]:
    with open_image(path, str(path), AMD64, path.parent) as found:
        return found.image, [b"".join(found.blob(layer)) for layer in found.image.layers]


def test_the_labels_of_both_schemes() -> None:
    (layer,) = made().image.layers
    assert layer.annotations == {
        "containerd.io/snapshot/nix-layer": "true",
        "containerd.io/snapshot/nix-store-path.0": STORE.format(TOOL),
        "containerd.io/snapshot/nix-store-path.1": STORE.format(DATA),
    }
    assert parse_nix_labels(layer.annotations, STORE) == PathLabels((TOOL, DATA))
    (listed,) = made(closure_list=LIST).image.layers
    assert parse_nix_labels(listed.annotations, STORE) == ClosureLabel(LIST)
    assert listed.annotations.items() > layer.annotations.items()


def test_the_layer_is_the_placeholders() -> None:
    image = made()
    (layer,) = image.image.layers
    assert gzip.decompress(b"".join(image.blob(layer))) == TAR
    with tarfile.open(fileobj=io.BytesIO(TAR)) as tar:
        found = [(each.name, each.isdir(), each.mode, each.size, each.mtime) for each in tar]
    assert found == [
        ("nix", True, 0o755, 0, 0),
        ("nix/store", True, 0o755, 0, 0),
        (f"nix/store/{TOOL}", True, 0o755, 0, 0),
        (f"nix/store/{DATA}", False, 0o555, 0, 0),
    ]


def test_how_containers_start() -> None:
    run = RunConfig(
        entrypoint=("/bin/a", "b"),
        command=("c",),
        environment={"PATH": "/x", "A": "b=c"},
        user="1000:1000",
        working_directory="/srv",
        labels={"b": "2", "a": "1"},
        ports=frozenset({"80/tcp", "53/udp"}),
        volumes=frozenset({"/data"}),
    )
    config = json.loads(made(run).image.config.data)
    assert config["config"] == {
        "User": "1000:1000",
        "ExposedPorts": {"53/udp": {}, "80/tcp": {}},
        "Env": ["PATH=/x", "A=b=c"],
        "Entrypoint": ["/bin/a", "b"],
        "Cmd": ["c"],
        "Volumes": {"/data": {}},
        "WorkingDir": "/srv",
        "Labels": {"a": "1", "b": "2"},
    }
    assert list(config["config"]["Labels"]) == ["a", "b"]
    assert parse_run_config(made(run).image.config.data, "x") == run
    assert json.loads(made().image.config.data)["config"] == {}


def test_an_archive_and_a_layout_hold_the_image(tmp_path: Path) -> None:
    image = made()
    progress: list[int] = []
    write_archive(image, tmp_path / "image.tar", "registry.example/x:1", progress.append)
    write_layout(image, tmp_path / "image", "registry.example/x:1")
    for place in ("image.tar", "image"):
        found, layers = reopened(tmp_path / place)
        assert found == image.image
        assert layers == [b"".join(image.blob(layer)) for layer in image.image.layers]
    assert sum(progress) == image.image.layers[0].size
    assert (tmp_path / "image.tar").stat().st_size < 16 * 1024
    inspected = subprocess.run(
        ["skopeo", "inspect", "--config", f"oci-archive:{tmp_path}/image.tar:registry.example/x:1"],
        check=True,
        capture_output=True,
    )
    assert json.loads(inspected.stdout) == json.loads(image.image.config.data)


def test_an_archive_is_replaced_by_a_whole_one_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "image.tar"
    path.write_bytes(b"before")

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_archive(made(), path, None, stop)
    assert [entry.name for entry in tmp_path.iterdir()] == ["image.tar"]
    assert path.read_bytes() == b"before"
    write_archive(made(), path, None)
    assert reopened(path)[0] == made().image


def test_a_layout_needs_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(Exception, match="expected an empty directory, or none"):
        write_layout(made(), tmp_path, None)


# ------------------------------------------------------------------ a base image

BASE_RUN: dict[str, Any] = {
    "Env": ["PATH=/bin", "LANG=C"],
    "Entrypoint": ["/bin/sh"],
    "Cmd": ["-i"],
    "User": "nobody",
    "Labels": {"a": "1", "b": "1"},
    "ExposedPorts": {"80/tcp": {}},
    "StopSignal": "SIGINT",
    "OnBuild": None,
}


@pytest.mark.parametrize("kind", ["docker", "oci"])
def test_on_a_base_image(layout: Any, tmp_path: Path, kind: str) -> None:
    docker = "application/vnd.docker"
    types = {
        "docker": (
            f"{docker}.distribution.manifest.v2+json",
            f"{docker}.container.image.v1+json",
            f"{docker}.image.rootfs.diff.tar.gzip",
        )
    }
    more = {"media_types": types[kind]} if kind in types else {}
    config = {"config": BASE_RUN, "created": "2020-01-01T00:00:00Z", "history": [{"comment": "x"}]}
    layout.add(layout.manifest([BASE_TAR, BASE_TAR * 2], config=config, **more))
    run = RunConfig(entrypoint=("/new",), environment={"LANG": "de"}, labels={"b": "2"})
    with open_image(layout.directory, "base", AMD64, tmp_path) as base:
        image = made(run, base)
        write_archive(image, tmp_path / "image.tar", None)
        expected = [b"".join(base.blob(layer)) for layer in base.image.layers]
    found, layers = reopened(tmp_path / "image.tar")
    assert layers[:2] == expected
    assert {layer.media_type for layer in found.layers} == {
        "application/vnd.oci.image.layer.v1.tar+gzip"
    }
    document = json.loads(found.config.data)
    assert document["config"] == {
        "User": "nobody",
        "ExposedPorts": {"80/tcp": {}},
        "Env": ["PATH=/bin", "LANG=de"],
        "Entrypoint": ["/new"],
        "Labels": {"a": "1", "b": "2"},
        "StopSignal": "SIGINT",
    }
    assert "created" not in document
    assert document["history"] == [{"comment": "x"}, {"created_by": "fusesnap image build"}]
    assert len(document["rootfs"]["diff_ids"]) == 3


def test_what_nobody_says_is_the_base_images() -> None:
    base = RunConfig(entrypoint=("a",), command=("b",), working_directory="/w", user="u")
    assert RunConfig().over(base) == base
    assert RunConfig(command=("c",)).over(base).entrypoint == ("a",)
    assert RunConfig(entrypoint=("n",)).over(base).command is None


def test_a_base_config_that_is_damaged(layout: Any, tmp_path: Path) -> None:
    layout.add(layout.manifest([BASE_TAR], config={"config": {"Env": [1]}}))
    with open_image(layout.directory, "base", AMD64, tmp_path) as base:  # noqa: SIM117
        with pytest.raises(InvalidData, match=r"of the base image: config.Env.0: "):
            made(base=base)


def test_more_than_a_registry_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MAX_DOCUMENT_SIZE", 300)
    with pytest.raises(InvalidData, match="names 2 store paths and has"):
        made()


def test_what_is_copied_goes_to_where_the_base_image_has_its_directories(
    layout: Any, make_tar: Any, tmp_path: Path
) -> None:
    def entry(name: str, kind: bytes = tarfile.DIRTYPE, target: str = "", mode: int = 0o755) -> Any:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.mode = kind, target, mode
        return info, b""

    lower = make_tar(
        [
            entry("usr/bin"),
            entry("bin", tarfile.SYMTYPE, "usr/bin"),
            entry("sbin", tarfile.SYMTYPE, "/bin"),
            entry("out", tarfile.SYMTYPE, "../../../usr"),
            entry("round", tarfile.SYMTYPE, "round"),
            entry("file", tarfile.REGTYPE),
            entry("tmp", mode=0o1777),
        ]
    )
    layout.add(layout.manifest([lower]))

    def tree(content: store_paths.Tree) -> Tree:
        builder = TreeBuilder()
        for event in (*store_paths.tree_events(content), NarEnd()):
            builder.receive(event)
        return builder.tree()

    with (
        open_image(layout.directory, "base", AMD64, tmp_path) as base,
        open_base_tree(base, "base", STORE, tmp_path, lambda _: None) as below,
    ):

        def copied(content: store_paths.Tree) -> dict[str, Any]:
            data = nix_layer_tar(KINDS, {TOOL: tree(content)}, STORE, below)
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                return {
                    each.name: each.linkname or each.mode
                    for each in tar
                    if not each.name.startswith("nix")
                }

        content: store_paths.Tree = {
            "bin": {"a": b""}, "sbin": {"b": b""}, "out": {"c": b""}, "tmp": {"d": b""}, "new": {"e": b""},
        }  # fmt: skip
        prefix = STORE.format(TOOL)
        assert copied(content) == {
            "usr": 0o755,
            "usr/bin": 0o755,
            "usr/bin/a": f"{prefix}/bin/a",
            "usr/bin/b": f"{prefix}/sbin/b",
            "usr/c": f"{prefix}/out/c",
            "tmp": 0o1777,
            "tmp/d": f"{prefix}/tmp/d",
            "new": 0o755,
            "new/e": f"{prefix}/new/e",
        }
        for wrong in ("round", "file"):
            with pytest.raises(InvalidArgument, match=f"'{wrong}' cannot be a directory"):
                copied({wrong: {"x": b""}})
    assert [path.name for path in tmp_path.iterdir()] == ["layout-0"]
