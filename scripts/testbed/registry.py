"""A container registry on loopback, without TLS."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testbed.processes import free_port, listens, run, running


@dataclass(frozen=True, slots=True)
class Registry:
    """A running registry."""

    port: int
    directory: Path

    def push(self, archive: Path, name: str) -> str:
        """Push an ``oci-archive`` as ``name`` (``redis:latest``). Returns the reference that pulls it."""
        reference = self.reference(name)
        options = ["--quiet", "--preserve-digests", "--dest-tls-verify=false"]
        names = [f"oci-archive:{archive}", f"docker://{reference}"]
        run(["skopeo", "--insecure-policy", "copy", *options, *names])
        return reference

    def reference(self, name: str, *, port: int | None = None) -> str:
        """The reference of an image here; over a slow link, at its ``port``."""
        return f"127.0.0.1:{port or self.port}/{name}"

    @contextlib.contextmanager
    def without_layers(self, reference: str) -> Iterator[None]:
        """For the time of the context nobody gets the layers of an image; its documents are there."""
        raw = run(["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{reference}"])
        blobs = [self._blob(layer["digest"]) for layer in json.loads(raw)["layers"]]
        for blob in blobs:
            blob.rename(blob.with_suffix(".away"))
        try:
            yield
        finally:
            for blob in blobs:
                blob.with_suffix(".away").rename(blob)

    def _blob(self, digest: str) -> Path:
        algorithm, _, digits = digest.partition(":")
        blobs = self.directory / "docker/registry/v2/blobs"
        return blobs / algorithm / digits[:2] / digits / "data"


# For USER with the password SECRET, in the form of htpasswd(1) with bcrypt, which is all that the registry takes.
USER, SECRET = "tester", "secret"
_HTPASSWD = f"{USER}:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n"


@contextlib.contextmanager
def registry(work: Path, *, locked: bool = False) -> Iterator[Registry]:
    """Run a registry for the time of the context; its images are kept in ``work``.

    One that is ``locked`` knows nobody but USER.
    """
    authentication: dict[str, object] = {}
    if locked:
        (work / "htpasswd").write_text(_HTPASSWD)
        authentication = {"auth": {"htpasswd": {"realm": "test", "path": str(work / "htpasswd")}}}
    port, directory = free_port(), work / "registry"
    configuration = work / "registry.json"  # YAML, of which JSON is a part
    configuration.write_text(
        json.dumps(
            {
                "version": "0.1",
                "log": {"level": "warn"},
                "storage": {"filesystem": {"rootdirectory": str(directory)}},
                **authentication,
                "http": {"addr": f"127.0.0.1:{port}", "relativeurls": True, "secret": "testbed"},
            }
        )
    )
    with running(["docker-registry", "serve", configuration], log=work / "registry.log") as service:
        service.wait_until(lambda: listens(port))
        yield Registry(port, directory)
