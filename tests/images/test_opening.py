"""Images in store paths: every form that is read, and one case for each that is refused."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fusesnap.errors import ContentMismatch, FusesnapError, InvalidData
from fusesnap.images import blobs
from fusesnap.images.digest import Digest
from fusesnap.images.layout import Image
from fusesnap.images.opening import open_image
from fusesnap.images.platform import Platform

AMD64 = Platform("linux", "amd64")
NAME = "/nix/store/00000000000000000000000000000000-image"
TAR = bytes(10240)
COMPRESS = {
    "gzip": lambda data: gzip.compress(data, 1),
    "zstd": zstandard.ZstdCompressor().compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def opened(location: Path, **more: Any) -> tuple[Image, list[bytes]]:
    with open_image(location, NAME, more.pop("platform", AMD64), location.parent, **more) as found:
        return found.image, [b"".join(found.blob(layer)) for layer in found.image.layers]


def refused(location: Path, kind: type[FusesnapError] = InvalidData, **more: Any) -> str:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(kind) as caught:
        opened(location, **more)
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(caught.value).startswith(NAME)
    return str(caught.value)


class DockerMaker:
    """Writes what ``docker save`` writes, with nothing checked: lies are welcome."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, bytes] = {}
        self.images: list[dict[str, Any]] = []

    def image(
        self,
        *layers: tuple[str, bytes],
        diff_ids: list[str] | None = None,
        tag: str = "x:1",
        **config: Any,
    ) -> str:
        plain = [f"sha256:{sha256(data)}" for _, data in layers]
        document = {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": plain if diff_ids is None else diff_ids},
            **config,
        }
        data = json.dumps(document).encode()
        name = f"{sha256(data)}.json"
        self.files |= {name: data, **dict(layers)}
        self.images.append(
            {"Config": name, "RepoTags": [tag], "Layers": [layer for layer, _ in layers]}
        )
        return name

    def save(self) -> Path:
        files = {**self.files, "manifest.json": json.dumps(self.images).encode()}
        path = self.directory / "docker.tar"
        with tarfile.open(path, "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path


@pytest.fixture
def docker(tmp_path: Path) -> DockerMaker:
    return DockerMaker(tmp_path)


# ------------------------------------------------------------- OCI layouts


@pytest.fixture
def archive(layout: Any, tmp_path: Path) -> Path:
    """An OCI archive with one image of one layer."""
    layout.add(layout.manifest([TAR]))
    return Path(layout.archive(tmp_path / "image.tar"))


def test_a_layout_in_an_archive(archive: Path, layout: Any) -> None:
    image, layers = opened(archive)
    described = layout.index["manifests"][0]
    assert str(image.manifest.digest) == described["digest"]
    assert image.manifest.data == layout.path(described["digest"]).read_bytes()
    assert image.manifest.media_type == described["mediaType"]
    config = json.loads(image.manifest.data)["config"]
    assert image.config.data == layout.path(config["digest"]).read_bytes()
    assert (str(image.config.digest), image.config.media_type) == (
        config["digest"],
        config["mediaType"],
    )
    assert [gzip.decompress(layer) for layer in layers] == [TAR]


def test_a_layout_in_a_directory(layout: Any) -> None:
    layout.add(layout.manifest([TAR]))
    image, layers = opened(layout.directory)
    assert len(image.layers) == len(layers) == 1


@pytest.mark.parametrize("compression", sorted(COMPRESS))
def test_compressed_archives(archive: Path, compression: str) -> None:
    expected = opened(archive)
    archive.write_bytes(COMPRESS[compression](archive.read_bytes()))
    assert opened(archive) == expected
    assert {path.name for path in archive.parent.iterdir()} == {"image.tar", "layout-0"}


def test_a_digest_chooses(layout: Any, tmp_path: Path) -> None:
    one, two = layout.manifest([TAR]), layout.manifest([TAR, TAR])
    for described in (one, two):
        layout.add(described)
    path = layout.archive(tmp_path / "image.tar")
    image, _ = opened(path, digest=Digest.parse(two["digest"]))
    assert str(image.manifest.digest) == two["digest"]
    assert "there are 2" in refused(path)
    assert "add @ and a digest to choose" in refused(path)
    other = f"sha256:{'0' * 64}"
    assert f"called '{other}'" in refused(path, digest=Digest.parse(other))


def test_progress_may_stop_it(archive: Path) -> None:
    archive.write_bytes(gzip.compress(archive.read_bytes()))

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(archive, progress=stop)


# --------------------------------------------------------- Docker's archives


def test_an_archive_of_docker(docker: DockerMaker) -> None:
    plain, packed = TAR, gzip.compress(TAR * 2)
    config = docker.image(
        ("a/layer.tar", plain),
        ("b/layer.tar", packed),
        ("a/layer.tar", plain),
        diff_ids=[f"sha256:{sha256(data)}" for data in (plain, TAR * 2, plain)],
    )
    image, layers = opened(docker.save())
    assert layers == [plain, packed, plain]
    assert str(image.config.digest) == f"sha256:{config.removesuffix('.json')}"
    prefix = "application/vnd.docker"
    assert image.config.media_type == f"{prefix}.container.image.v1+json"
    manifest = json.loads(image.manifest.data)
    assert manifest["mediaType"] == image.manifest.media_type
    assert manifest["mediaType"] == f"{prefix}.distribution.manifest.v2+json"
    assert [(layer["mediaType"], layer["size"]) for layer in manifest["layers"]] == [
        (f"{prefix}.image.rootfs.diff.tar", len(plain)),
        (f"{prefix}.image.rootfs.diff.tar.gzip", len(packed)),
        (f"{prefix}.image.rootfs.diff.tar", len(plain)),
    ]
    for described, data in zip(manifest["layers"], layers, strict=True):
        assert described["digest"] == f"sha256:{sha256(data)}"
    assert f"sha256:{sha256(image.manifest.data)}" == str(image.manifest.digest)


def test_an_archive_of_docker_made_by_skopeo(layout: Any, tmp_path: Path) -> None:
    layout.add(layout.manifest([TAR, TAR * 2]), "made")
    path = tmp_path / "docker.tar"
    command = ["skopeo", "--insecure-policy", "copy", f"oci:{layout.directory}:made"]
    subprocess.run([*command, f"docker-archive:{path}:x:1"], check=True, capture_output=True)
    assert opened(path)[1] == [TAR, TAR * 2]


def test_a_second_name_of_a_layer_of_docker(docker: DockerMaker) -> None:
    one, two = "1" * 64, "2" * 64
    docker.image((f"{one}/layer.tar", TAR), (f"{two}/layer.tar", TAR))
    del docker.files[f"{two}/layer.tar"]
    for target, reason in (
        (f"../{one}/layer.tar", None),
        (f"../{'3' * 64}/layer.tar", f"expected a file '{two}/layer.tar', there is none"),
        ("/etc/passwd", "expected plain files and directories only"),
        (f"../../{one}/layer.tar", "expected plain files and directories only"),
    ):
        path = docker.save()
        with tarfile.open(path, "a") as tar:
            link = tarfile.TarInfo(f"{two}/layer.tar")
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        if reason is None:
            assert opened(path)[1] == [TAR, TAR]
        else:
            assert reason in refused(path)


def test_the_platform_chooses_among_dockers_images(docker: DockerMaker) -> None:
    docker.image(("a.tar", TAR), architecture="arm64", tag="x:arm")
    docker.image(("b.tar", TAR * 2), tag="x:amd")
    path = docker.save()
    assert opened(path)[1] == [TAR * 2]
    said = refused(path, platform=Platform("linux", "s390x"))
    assert "expected an image for linux/s390x, there is 'x:arm' for linux/arm64, 'x:amd'" in said


def test_two_images_of_docker(docker: DockerMaker) -> None:
    docker.image(("a.tar", TAR), tag="x:1")
    docker.image(("a.tar", TAR), tag="x:2", author="other")
    assert "expected one image for linux/amd64, there are 2: 'x:1', 'x:2'" in refused(docker.save())


def test_a_digest_that_a_docker_archive_has_not(docker: DockerMaker) -> None:
    docker.image(("a.tar", TAR))
    other = f"sha256:{'0' * 64}"
    said = refused(docker.save(), digest=Digest.parse(other))
    assert f"expected an image with manifest {other}, got sha256:" in said


def test_a_layer_of_docker_that_is_not_what_the_config_says(docker: DockerMaker) -> None:
    docker.image(("a.tar", TAR), diff_ids=[f"sha256:{'0' * 64}"])
    said = refused(docker.save(), ContentMismatch)
    assert (
        f"layer 0 ('a.tar'): expected diff ID sha256:{'0' * 64}, got sha256:{sha256(TAR)}" in said
    )


def test_a_config_of_docker_that_is_not_what_it_is_named(docker: DockerMaker) -> None:
    name = docker.image(("a.tar", TAR))
    docker.files[name] += b" "
    said = refused(docker.save(), ContentMismatch)
    assert f"'{name}': expected the digest that it is named by, got sha256:" in said


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        (
            [{"Config": "nowhere.json", "Layers": []}],
            "expected a file 'nowhere.json', there is none",
        ),
        ([{"Config": "../../etc/passwd", "Layers": []}], "has a component '..'"),
        ([{"Layers": []}], "0.Config: Field required"),
        ({}, "valid array"),
        ([], "expected an image for linux/amd64, there is none"),
    ],
)
def test_a_list_of_docker_that_is_damaged(docker: DockerMaker, manifest: Any, reason: str) -> None:
    docker.images = manifest
    assert reason in refused(docker.save())


def test_layers_of_docker_that_are_missing(docker: DockerMaker) -> None:
    docker.image(("a.tar", TAR))
    docker.images[0]["Layers"] = []
    assert "expected 1 layers, as rootfs.diff_ids" in refused(docker.save())
    docker.images[0]["Layers"] = ["b.tar"]
    assert "expected a file 'b.tar', there is none" in refused(docker.save())


def test_a_layer_of_docker_with_another_compression(docker: DockerMaker) -> None:
    docker.image(("a.tar", lzma.compress(TAR)), diff_ids=[f"sha256:{sha256(TAR)}"])
    assert "expected a tar, plain or with gzip or zstd, got xz" in refused(docker.save())


# ------------------------------------------------------------ what is refused


def written(path: Path, *items: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in items:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_traversal(tmp_path: Path) -> None:
    path = written(tmp_path / "x.tar", (tarfile.TarInfo("../index.json"), b"{}"))
    assert "name '../index.json' has a component '..'" in refused(path)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("index.json")
    info.type, info.linkname = kind, "/etc/passwd"
    path = written(tmp_path / "x.tar", (tarfile.TarInfo("oci-layout"), b"{}"), (info, b""))
    assert f"entry 'index.json' of type {kind!r}: expected plain files" in refused(path)


@pytest.mark.parametrize("name", ["index.json", "blobs", "blobs/sha256"])
def test_links_in_a_directory(layout: Any, tmp_path: Path, name: str) -> None:
    layout.add(layout.manifest([TAR]))
    (layout.directory / name).rename(tmp_path / "elsewhere")
    (layout.directory / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name} is a link: expected plain files" in refused(layout.directory)


def test_a_path_that_is_a_link(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(archive)
    with pytest.raises(FusesnapError, match="Too many levels of symbolic links"):
        opened(tmp_path / "link")


@pytest.mark.parametrize("lie", ["digest", "size"])
def test_lies(layout: Any, tmp_path: Path, lie: str) -> None:
    blob = layout.blob(gzip.compress(TAR), "application/vnd.oci.image.layer.v1.tar+gzip")
    if lie == "size":
        blob["size"] += 1
    else:
        layout.path(blob["digest"]).write_bytes(bytes(blob["size"]))
    layout.add(layout.manifest([TAR], layers=[blob]))
    said = refused(layout.archive(tmp_path / "x.tar"), ContentMismatch)
    assert f"layer 0 {blob['digest']}: expected" in said


def test_another_platform(layout: Any, tmp_path: Path) -> None:
    layout.add(layout.manifest([TAR], config={"architecture": "arm64"}))
    path = layout.archive(tmp_path / "x.tar")
    assert "expected an image for linux/amd64, there is" in refused(path)


@pytest.mark.parametrize("compression", ["none", *sorted(COMPRESS)])
def test_cut_short(archive: Path, compression: str) -> None:
    data = COMPRESS.get(compression, bytes)(archive.read_bytes())
    # Of the plain one, all behind the headers of the first blobs; of a compressed one, its last bytes.
    archive.write_bytes(data[:5000] if compression == "none" else data[:-10])
    refused(archive)


def test_too_large(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.write_bytes(gzip.compress(archive.read_bytes()))
    monkeypatch.setattr(blobs, "MAX_ARCHIVE_SIZE", 10_000)
    assert "expected at most 10000 bytes uncompressed, got more" in refused(archive)


def test_too_deep(layout: Any, tmp_path: Path) -> None:
    described = layout.manifest()
    for _ in range(5):
        document = {"schemaVersion": 2, "manifests": [described]}
        described = layout.document(document, "application/vnd.oci.image.index.v1+json")
    layout.add(described)
    path = layout.archive(tmp_path / "x.tar")
    assert "expected at most 4 indexes in one another" in refused(path)


def test_an_archive_in_an_archive(archive: Path) -> None:
    archive.write_bytes(gzip.compress(gzip.compress(archive.read_bytes())))
    assert "damaged tar" in refused(archive)


def test_a_tar_of_something_else(tmp_path: Path) -> None:
    path = written(tmp_path / "x.tar", (tarfile.TarInfo("README"), b"hello"))
    said = refused(path)
    assert "expected an image: an OCI layout" in said
    assert "neither is there" in said


def test_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidData, match="expected a regular file, got prw"):
        opened(tmp_path / "fifo")


def test_layouts_win_over_dockers_list(archive: Path, layout: Any, tmp_path: Path) -> None:
    (layout.directory / "manifest.json").write_text("[]")
    both = layout.archive(tmp_path / "both.tar")
    assert opened(both) == opened(archive)


@given(
    st.lists(st.tuples(st.integers(0, 20_479), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 20_480),
    st.sampled_from(["none", "gzip", "zstd"]),
)
@settings(max_examples=150)
def test_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[int, int]],
    length: int,
    compression: str,
) -> None:
    directory = tmp_path_factory.mktemp("fuzz", numbered=True)
    whole = _intact(directory)
    data = bytearray(COMPRESS.get(compression, bytes)(whole))
    for place, value in changes:
        data[place % len(data)] = value
    path = directory / "x.tar"
    path.write_bytes(data[: max(length, 1)])
    try:
        image, layers = opened(path)
    except FusesnapError:
        return
    # What was let through is what it says it is.
    assert f"sha256:{sha256(image.manifest.data)}" == str(image.manifest.digest)
    assert [f"sha256:{sha256(layer)}" for layer in layers] == [
        str(layer.digest) for layer in image.layers
    ]


def _intact(directory: Path) -> bytes:
    """What Docker saves, some 20 KiB: nothing in it but its own digests says what it must be."""
    maker = DockerMaker(directory)
    maker.image(("a/layer.tar", TAR))
    return maker.save().read_bytes()
