from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusesnap.errors import ContentMismatch, FusesnapError, InvalidData, StorageFailure
from fusesnap.images import documents
from fusesnap.images.layout import Image, open_layout
from fusesnap.images.platform import Platform
from fusesnap.images.source import parse_source

MakeTar = Callable[..., bytes]
AMD64 = Platform("linux", "amd64")
INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER = (
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.container.image.v1+json",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
)
EMPTY = bytes(1024)


def image(source: object, platform: Platform = AMD64, reference: str | None = None) -> Image:
    with open_layout(parse_source(f"oci:{source}")) as opened:
        return opened.image(platform, reference)


def refusal(source: object, kind: type[FusesnapError] = InvalidData, **more: Any) -> str:
    with pytest.raises(kind) as caught:
        image(source, **more)
    return str(caught.value)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# ------------------------------------------------------------------ what is read


def test_a_directory(layout: Any) -> None:
    annotations = {"containerd.io/snapshot/nix-layer": "true"}
    described = layout.blob(EMPTY, "application/vnd.oci.image.layer.v1.tar")
    layers = [{**described, "annotations": annotations}]
    layout.add(layout.manifest([EMPTY], layers=layers))
    found = image(layout.directory)
    assert found.platform == AMD64
    (layer,) = found.layers
    assert (layer.position, layer.size, layer.annotations) == (0, 1024, annotations)
    assert str(layer.digest) == str(layer.diff_id) == f"sha256:{hashlib.sha256(EMPTY).hexdigest()}"


def test_an_archive_made_by_skopeo(layout: Any, make_tar: MakeTar, tmp_path: Path) -> None:
    tars = [make_tar([(tarfile.TarInfo("a"), b"1" * 5000)]), EMPTY]
    layout.add(layout.manifest(tars), "made")
    archive = f"oci-archive:{tmp_path}/image.tar:registry.example/app:v1"
    command = ["skopeo", "--insecure-policy", "copy", f"oci:{layout.directory}:made", archive]
    subprocess.run(command, check=True, capture_output=True)
    source = parse_source(archive)
    with open_layout(source) as opened:
        found = opened.image(AMD64, source.reference)
        blobs = [b"".join(opened.blob(layer)) for layer in found.layers]
    assert [gzip.decompress(blob) for blob in blobs] == tars


def test_docker_media_types(layout: Any) -> None:
    layout.add(layout.manifest([EMPTY], media_types=DOCKER))
    assert len(image(layout.directory).layers) == 1


def test_an_image_without_layers(layout: Any) -> None:
    layout.add(layout.manifest())
    assert image(layout.directory).layers == ()


def test_blobs_may_be_links(layout: Any, tmp_path: Path) -> None:
    layout.add(layout.manifest())
    blobs = layout.directory / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert image(layout.directory).layers == ()


def test_references(layout: Any) -> None:
    one, two = layout.manifest([EMPTY]), layout.manifest([bytes(2048)])
    layout.add(one, "one")
    containerd = {"io.containerd.image.name": "registry.example/two:latest"}
    layout.add({**two, "annotations": containerd})
    assert str(image(layout.directory, reference="one").manifest_digest) == one["digest"]
    for reference in ("registry.example/two:latest", two["digest"]):
        found = image(layout.directory, reference=reference)
        assert str(found.manifest_digest) == two["digest"]


def test_one_image_under_two_names(layout: Any) -> None:
    described = layout.manifest([EMPTY])
    layout.add(described, "one")
    layout.add(described, "two")
    assert str(image(layout.directory).manifest_digest) == described["digest"]


def test_the_platform_chooses(layout: Any) -> None:
    digests = {}
    manifests = []
    for name in ("arm64", "amd64"):
        made = layout.manifest(
            [name.encode() * 512],
            config={"architecture": name},
            platform={"os": "linux", "architecture": name},
        )
        digests[name] = made["digest"]
        manifests.append(made)
    attestation = layout.manifest(platform={"os": "unknown", "architecture": "unknown"})
    artifact = layout.blob(b"{}", "application/vnd.example.artifact")
    nested = layout.document(
        {"schemaVersion": 2, "manifests": [artifact, attestation, *manifests]}, INDEX
    )
    layout.add(nested, "latest")
    for name, digest in digests.items():
        found = image(layout.directory, platform=Platform("linux", name))
        assert str(found.manifest_digest) == digest


def test_the_platform_chooses_by_the_config_where_the_index_says_none(layout: Any) -> None:
    layout.add(layout.manifest([EMPTY], config={"architecture": "arm64"}), "x")
    wanted = layout.manifest([EMPTY])
    layout.add(wanted, "x")
    assert str(image(layout.directory).manifest_digest) == wanted["digest"]


def test_the_nearest_variant(layout: Any) -> None:
    made = {}
    for variant in ("v5", "v7", "v6"):
        config = {"architecture": "arm", "variant": variant}
        made[variant] = layout.manifest(config=config, platform={"os": "linux", **config})
        layout.add(made[variant])
    for ours, expected in (("v6", "v6"), ("v7", "v7")):
        found = image(layout.directory, platform=Platform("linux", "arm", ours))
        assert str(found.manifest_digest) == made[expected]["digest"]


# ------------------------------------------------------------- what is refused


def test_two_images_and_no_reference(layout: Any) -> None:
    layout.add(layout.manifest([EMPTY]), "one")
    layout.add(layout.manifest([bytes(2048)]), "two")
    said = refusal(layout.directory)
    assert "expected one image for linux/amd64, there are 2: 'one', 'two'" in said


def test_a_reference_that_is_not_there(layout: Any) -> None:
    layout.add(layout.manifest(), "one")
    said = refusal(layout.directory, reference="two")
    assert "expected an image called 'two', there is 'one'" in said


def test_another_platform(layout: Any) -> None:
    layout.add(layout.manifest(config={"architecture": "arm64"}), "one")
    said = refusal(layout.directory)
    assert "expected an image for linux/amd64, there is 'one' for linux/arm64" in said


def test_nothing_but_an_artifact(layout: Any) -> None:
    media_types = (DOCKER[0], "application/vnd.example.config", DOCKER[2])
    layout.add(layout.manifest(media_types=media_types))
    assert "expected an image for linux/amd64, there is none" in refusal(layout.directory)


def test_an_index_that_lies_about_the_platform(layout: Any) -> None:
    platform = {"os": "linux", "architecture": "amd64"}
    layout.add(layout.manifest(config={"architecture": "arm64"}, platform=platform), "one")
    assert "'one': expected linux/amd64, got linux/arm64" in refusal(layout.directory)


def test_no_images(layout: Any) -> None:
    assert "expected an image for linux/amd64, there is none" in refusal(layout.directory)


@pytest.mark.parametrize("name", ["oci-layout", "index.json"])
def test_a_directory_that_is_no_layout(layout: Any, name: str) -> None:
    (layout.directory / name).unlink()
    said = refusal(layout.directory)
    assert f"{layout.directory}: expected an OCI image layout with a file {name}" in said


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert "expected an OCI image layout" in refusal(tmp_path / "nowhere")


def test_an_archive_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageFailure, match=r"nowhere\.tar: No such file"),
        open_layout(parse_source(f"oci-archive:{tmp_path}/nowhere.tar")),
    ):
        pass


def test_a_fifo_for_a_file(layout: Any) -> None:
    path = layout.directory / "index.json"
    path.unlink()
    os.mkfifo(path)
    assert "index.json: expected a regular file, got prw" in refusal(layout.directory)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("", "Invalid JSON"),
        ("[]", "Input should be an? "),
        ("[" * 100_000, "Invalid JSON"),
        ('{"schemaVersion": 1, "manifests": []}', "schemaVersion: "),
        ('{"schemaVersion": 2}', "manifests: Field required"),
        ('{"schemaVersion": 2, "manifests": [{}]}', r"manifests\.0\.mediaType: Field required"),
        (
            '{"schemaVersion": 2, "manifests": [], "layers": []}',
            "layers: ",
        ),
        (
            '{"schemaVersion": 2, "manifests": [{"mediaType": "x", "digest": "sha256:1",'
            ' "size": 1}]}',
            "digest 'sha256:1': expected 64 lower-case hexadecimal digits",
        ),
        (
            '{"schemaVersion": 2, "manifests": [{"mediaType": "x", "digest": "sha256:1",'
            ' "size": -1}]}',
            r"manifests\.0\.size: ",
        ),
    ],
)
def test_a_damaged_index(layout: Any, document: str, reason: str) -> None:
    (layout.directory / "index.json").write_text(document)
    assert re.search(rf"index\.json: .*{reason}", refusal(layout.directory))


def test_another_version_of_layouts(layout: Any) -> None:
    (layout.directory / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}')
    assert "oci-layout: imageLayoutVersion: " in refusal(layout.directory)


def test_documents_too_large(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.add(layout.manifest([EMPTY]))
    monkeypatch.setattr("fusesnap.images.layout.MAX_DOCUMENT_SIZE", 300)
    assert "expected at most 300 bytes, got" in refusal(layout.directory)
    monkeypatch.setattr("fusesnap.images.layout.MAX_DOCUMENT_SIZE", 100)
    assert "index.json: expected at most 100 bytes, got" in refusal(layout.directory)


def test_a_size_that_lies(layout: Any) -> None:
    described = layout.manifest([EMPTY])
    layout.add({**described, "size": described["size"] + 1})
    said = refusal(layout.directory, ContentMismatch)
    expected = f"manifest {described['digest']}: expected {described['size'] + 1} bytes, got"
    assert expected in said


@pytest.mark.parametrize("what", ["manifest", "config"])
def test_a_digest_that_lies(layout: Any, what: str) -> None:
    described = layout.manifest([EMPTY])
    layout.add(described)
    document = json.loads(layout.path(described["digest"]).read_bytes())
    digest = described["digest"] if what == "manifest" else document["config"]["digest"]
    flip(layout.path(digest))
    said = refusal(layout.directory, ContentMismatch)
    assert f"{what} {digest}: expected that digest, got sha256:" in said


@pytest.mark.parametrize("what", ["manifest", "config"])
def test_a_blob_that_is_missing(layout: Any, what: str) -> None:
    described = layout.manifest([EMPTY])
    layout.add(described)
    document = json.loads(layout.path(described["digest"]).read_bytes())
    digest = described["digest"] if what == "manifest" else document["config"]["digest"]
    layout.path(digest).unlink()
    assert f"{what} {digest}: expected a blob, there is none" in refusal(layout.directory)


def test_a_manifest_of_another_type_than_announced(layout: Any) -> None:
    layout.add(layout.manifest(manifest={"mediaType": INDEX}))
    assert f"expected mediaType {layout.index['manifests'][0]['mediaType']}" in refusal(
        layout.directory
    )


def test_a_manifest_that_is_an_index_too(layout: Any) -> None:
    layout.add(layout.manifest(manifest={"manifests": []}))
    assert ": manifests: " in refusal(layout.directory)


def test_layers_and_diff_ids_that_differ_in_number(layout: Any) -> None:
    layout.add(layout.manifest([EMPTY], layers=[]))
    said = refusal(layout.directory)
    assert "expected 1 layers, as rootfs.diff_ids of config" in said
    assert "got 0" in said


def test_a_layer_of_unknown_type(layout: Any) -> None:
    layout.add(layout.manifest([EMPTY], media_types=(*DOCKER[:2], "application/x-encrypted")))
    said = refusal(layout.directory)
    assert "expected a tar layer, plain or with gzip or zstd, got" in said
    assert "'application/x-encrypted'" in said


def test_too_many_layers(layout: Any) -> None:
    layout.add(layout.manifest([EMPTY] * (documents.MAX_LAYERS + 1)))
    assert "at most 500 items" in refusal(layout.directory)


@pytest.mark.parametrize("rootfs", [None, {"type": "other", "diff_ids": []}, {"type": "layers"}])
def test_a_config_without_layers(layout: Any, rootfs: object) -> None:
    layout.add(layout.manifest(config={"rootfs": rootfs}))
    assert "rootfs" in refusal(layout.directory)


def test_indexes_nested_too_deep(layout: Any) -> None:
    described = layout.manifest()
    for _ in range(5):
        document = {"schemaVersion": 2, "manifests": [described]}
        described = layout.document(document, INDEX)
    layout.add(described)
    assert "expected at most 4 indexes in one another" in refusal(layout.directory)


def test_indexes_that_multiply(layout: Any) -> None:
    described = layout.manifest()
    for _ in range(3):
        described = layout.document({"schemaVersion": 2, "manifests": [described] * 40}, INDEX)
    layout.add(described)
    assert "expected at most 1024 indexes, manifests and configs" in refusal(layout.directory)


# ------------------------------------------------------------------- archives


def archived(tmp_path: Path, items: list[tuple[tarfile.TarInfo, bytes]], make: MakeTar) -> str:
    path = tmp_path / "made.tar"
    path.write_bytes(make(items))
    with pytest.raises(InvalidData) as caught, open_layout(parse_source(f"oci-archive:{path}")):
        pass
    return str(caught.value)


@pytest.mark.parametrize("name", ["../index.json", "blobs/../../x", "/../etc/passwd"])
def test_an_archive_with_traversal(tmp_path: Path, make_tar: MakeTar, name: str) -> None:
    said = archived(tmp_path, [(tarfile.TarInfo(name), b"")], make_tar)
    assert f"name '{name}' has a component '..'" in said


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_an_archive_with_links_or_devices(tmp_path: Path, make_tar: MakeTar, kind: bytes) -> None:
    info = tarfile.TarInfo("index.json")
    info.type, info.linkname = kind, "oci-layout"
    said = archived(tmp_path, [(tarfile.TarInfo("oci-layout"), b""), (info, b"")], make_tar)
    assert f"entry 'index.json' of type {kind!r}: expected plain files" in said


def test_an_archive_with_a_name_twice(tmp_path: Path, make_tar: MakeTar) -> None:
    items = [(tarfile.TarInfo("index.json"), b"{}"), (tarfile.TarInfo("./index.json"), b"[]")]
    assert "entry 'index.json' is there twice" in archived(tmp_path, items, make_tar)


def test_an_archive_cut_short(layout: Any, tmp_path: Path) -> None:
    layout.add(layout.manifest([EMPTY]))
    path = layout.archive(tmp_path / "image.tar")
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    os.truncate(path, last.offset_data + 100)
    with (
        pytest.raises(InvalidData, match=r"image\.tar: damaged tar: .*unexpected end of data"),
        open_layout(parse_source(f"oci-archive:{path}")),
    ):
        pass


def test_an_archive_that_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "made"
    for data, reason in [
        (b"", "expected a tar of an image, got no bytes"),
        (b"PK" * 1000, "damaged tar"),
        (gzip.compress(EMPTY), "expected an uncompressed tar, got a file compressed with gzip"),
        (b"\xfd7zXZ" + EMPTY, "compressed with xz"),
        (EMPTY, "there is none"),
    ]:
        path.write_bytes(data)
        with (
            pytest.raises(InvalidData, match=reason),
            open_layout(parse_source(f"oci-archive:{path}")) as opened,
        ):
            opened.image(AMD64)


def test_a_directory_for_an_archive(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidData, match="expected a regular file, got drwx"),
        open_layout(parse_source(f"oci-archive:{tmp_path}")),
    ):
        pass


def test_too_many_entries_in_an_archive(
    layout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = layout.archive(tmp_path / "image.tar")
    monkeypatch.setattr("fusesnap.images.blobs.MAX_ARCHIVE_ENTRIES", 3)
    with (
        pytest.raises(InvalidData, match="expected at most 3 entries, got more"),
        open_layout(parse_source(f"oci-archive:{path}")),
    ):
        pass


def test_a_sparse_blob_in_an_archive(tmp_path: Path) -> None:
    sparse = tmp_path / "index.json"
    with sparse.open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x")
    made = subprocess.run(
        ["tar", "-C", tmp_path, "--format=gnu", "-S", "-cf", "-", "index.json"],
        check=True,
        capture_output=True,
    ).stdout
    (tmp_path / "made.tar").write_bytes(made)
    with (
        pytest.raises(InvalidData, match="expected plain files"),
        open_layout(parse_source(f"oci-archive:{tmp_path}/made.tar")),
    ):
        pass


def test_a_document_that_shrinks_while_it_is_read(layout: Any, tmp_path: Path) -> None:
    made = layout.manifest([EMPTY])
    layout.add(made)
    path = layout.archive(tmp_path / "image.tar")
    with open_layout(parse_source(f"oci-archive:{path}")) as opened:
        os.truncate(path, 0)
        with pytest.raises(InvalidData, match="bytes, got 0"):
            opened.image(AMD64)
