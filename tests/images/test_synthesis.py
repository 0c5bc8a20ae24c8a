from __future__ import annotations

import io
import json
import tarfile
from typing import Any

from fusesnap.images.documents import LAYER_TYPES, parse_config, parse_manifest
from fusesnap.images.platform import Platform
from fusesnap.images.programs import Programs
from fusesnap.images.synthesis import SynthesisedImage, synthesise
from fusesnap.nix.closure_labels import PathLabels, parse_nix_labels
from fusesnap.nix.store_path import StoreDir, StorePath

REDIS = StorePath("0" * 32, "redis-7.0.15")
GLIBC = StorePath("1" * 32, "glibc-2.40")
STORE = StoreDir()
AMD64 = Platform("linux", "amd64")
BIN = f"{STORE.format(REDIS)}/bin"


def made(
    *names: str, closure: tuple[StorePath, ...] = (REDIS, GLIBC), **more: Any
) -> SynthesisedImage:
    programs = more.pop("programs", Programs(BIN, names))
    return synthesise(REDIS, closure, programs, more.pop("platform", AMD64), STORE)


def config(image: SynthesisedImage) -> Any:
    return json.loads(image.image.config.data)


def test_it_is_a_well_formed_image() -> None:
    image = made("redis")
    found = image.image
    (layer,) = found.layers
    data = b"".join(image.blob(layer))
    manifest = parse_manifest(found.manifest.data, "manifest", found.manifest.media_type)
    assert manifest.config.digest == found.config.digest
    assert manifest.config.size == len(found.config.data)
    (described,) = manifest.layers
    assert (described.digest, described.size) == (layer.digest, layer.size)
    assert described.size == len(data)
    assert described.media_type in LAYER_TYPES
    assert described.annotations == layer.annotations
    parsed = parse_config(found.config.data, "config")
    assert (parsed.platform, parsed.diff_ids) == (AMD64, (layer.diff_id,))


def test_the_layer_names_the_closure_in_its_labels_and_has_an_empty_store() -> None:
    image = made("redis")
    (layer,) = image.image.layers
    assert parse_nix_labels(layer.annotations, STORE) == PathLabels((REDIS, GLIBC))
    assert all(len(key) + len(value) <= 4096 for key, value in layer.annotations.items())
    with tarfile.open(fileobj=io.BytesIO(b"".join(image.blob(layer)))) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == ["nix", "nix/store"]
    for member in members:
        assert member.isdir()
        assert (member.mode, member.uid, member.gid, member.mtime) == (0o755, 0, 0, 0)
    assert image.store_paths == (REDIS, GLIBC)


def test_the_same_package_gives_the_same_bytes() -> None:
    assert made("redis") == made("redis", closure=(GLIBC, REDIS))


def test_another_closure_is_another_layer() -> None:
    # containerd knows an unpacked layer by its diff ID alone.
    layers = {
        str(made("redis", closure=closure).image.layers[0].diff_id)
        for closure in ((REDIS,), (REDIS, GLIBC), (GLIBC,))
    }
    assert len(layers) == 3


def test_digests_do_not_change_with_a_release() -> None:
    # Nodes of two releases must agree on an image's ID, and a pod may name one by its digest.
    image = made("redis").image
    assert str(image.layers[0].digest).startswith("sha256:abd9e82661e7")
    assert str(image.config.digest).startswith("sha256:84186114b2c0")
    assert str(image.manifest.digest).startswith("sha256:8d700de02cc6")


def test_it_starts_the_main_program() -> None:
    assert config(made("redis", "redis-cli"))["config"] == {
        "Env": [f"PATH={BIN}"],
        "Entrypoint": [f"{BIN}/redis"],
        "WorkingDir": "/",
    }


def test_without_a_main_program_the_command_says_so() -> None:
    found = config(made("redis-cli", "redis-server"))["config"]
    assert "Entrypoint" not in found
    (said,) = found["Cmd"]
    assert "2 programs and none of them is called redis" in said


def test_a_path_that_is_a_program() -> None:
    found = config(made(programs=Programs(None, ("redis-7.0.15",))))["config"]
    assert found == {"Entrypoint": [STORE.format(REDIS)], "WorkingDir": "/"}


def test_the_platform() -> None:
    found = config(made("redis", platform=Platform("linux", "arm", "v7")))
    assert (found["os"], found["architecture"], found["variant"]) == ("linux", "arm", "v7")
