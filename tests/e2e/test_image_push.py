"""``fusesnap image push`` and ``inspect``, with a real registry."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from testbed.binary_cache import HttpCache, SigningKey
from testbed.fusesnap_daemon import Source, prefetch
from testbed.images import NixLayerManner, nix_layer, ordinary_layer, write_image
from testbed.nix_store import NixStore
from testbed.processes import CommandFailed
from testbed.registry import SECRET, USER, registry
from testbed.synthetic import SimpleClosure

from .commands import fusesnap
from .conftest import Node


def image(*words: object, home: Path | None = None) -> str:
    """Run ``fusesnap image``, with the passwords in ``home`` alone."""
    environment = {
        "DOCKER_CONFIG": str(home or "/nowhere"),
        "XDG_RUNTIME_DIR": "",
        "HOME": "/nowhere",
    }
    return fusesnap("image", *words, environment=environment)


def test_pushed_and_pulled_and_run(
    node: Node,
    cache: HttpCache,
    simple: SimpleClosure,
    key: SigningKey,
    work: Path,
) -> None:
    source = ["--state", work / "b", "-s", cache.url, "--trusted-public-key", key.public]
    reference = node.registry.reference("pushed-by-us:1")
    # 20 MiB that do not compress go in parts.
    base = write_image(
        work / "base.tar", [ordinary_layer({"large": os.urandom(20 << 20)})], name="base:1"
    )
    image("build", simple.script, "--from", base, "-t", reference, "-o", work / "a.tar", *source)
    said = image("push", work / "a.tar", *source)
    assert "3 blobs with" in said
    assert ", 0 were there" in said
    again = json.loads(image("push", work / "a.tar", "--json", *source))
    assert (again["reference"], again["sent"], again["sent_bytes"]) == (reference, 0, 0)
    assert said.startswith(f"{reference}@{again['digest']}: ")
    node.containerd.pull(reference)
    assert node.containerd.run(reference, "one") == "hello from a store path\n"
    # A package itself, under a name of its own.
    made = node.registry.reference("made-by-us:1")
    image("push", f"nix:0{simple.script}", made, *source)
    copied = subprocess.run(
        ["skopeo", "inspect", "--tls-verify=false", f"docker://{made}"],
        capture_output=True,
        check=True,
    )
    assert len(json.loads(copied.stdout)["Layers"]) == 1


def test_a_registry_with_passwords(tmp_path: Path) -> None:
    archive = write_image(tmp_path / "a.tar", [ordinary_layer({"x": b""})], name="x:1")
    with registry(tmp_path, locked=True) as locked:
        target = locked.reference("x:1")
        host = target.partition("/")[0]
        for stored, reason in (
            (None, "without a password (401"),
            (f"{USER}:wrong", f"not allowed to push x as '{USER}' (401"),
        ):
            write_config(tmp_path, host, stored)
            with pytest.raises(CommandFailed) as caught:
                image("push", archive, target, "--state", tmp_path / "s", home=tmp_path)
            assert str(caught.value).startswith("78: ")
            assert reason in str(caught.value)
        write_config(tmp_path, host, f"{USER}:{SECRET}")
        said = image("push", archive, target, "--state", tmp_path / "s", home=tmp_path)
        assert said.startswith(target)


def write_config(directory: Path, host: str, stored: str | None) -> None:
    auths = {host: {"auth": base64.b64encode(stored.encode()).decode()}} if stored else {}
    (directory / "config.json").write_text(json.dumps({"auths": auths}))


def test_inspect(
    cache: HttpCache, simple: SimpleClosure, key: SigningKey, work: Path, nix_store: NixStore
) -> None:
    archives = [
        write_image(
            work / f"{manner.value}.tar",
            [ordinary_layer({"x": b""}), nix_layer(nix_store, simple.closure, manner)],
            name="x:1",
            entrypoint=["/bin/sh", "a b"],
        )
        for manner in (NixLayerManner.PATHS, NixLayerManner.PLACEHOLDERS)
    ]
    prefetch(work / "s", [simple.busybox], source=Source([cache.url], [key.public]))
    source = ["--state", work / "s", "-s", cache.url, "--trusted-public-key", key.public]
    report: dict[str, Any] = json.loads(image("inspect", archives[0], "--json", *source))
    paths = {path["path"]: path for path in report["paths"]}
    assert paths.keys() == set(simple.closure.paths)
    assert [path for path, facts in paths.items() if facts["present"]] == [simple.busybox]
    assert {facts["cache"] for facts in paths.values() if not facts["present"]} == {cache.url}
    assert report["nar_size"] == simple.closure.nar_size
    assert [layer["store_paths"] for layer in report["layers"]] == [0, len(paths)]
    assert report["config"]["Entrypoint"] == ["/bin/sh", "a b"]
    said = image("inspect", archives[1], *source)
    assert "entrypoint /bin/sh 'a b'" in said
    assert f"{len(paths)} store paths with" in said
    assert "1 is here" in said
