"""What the containers of the cold-start benchmark do, each with a closure of Debian packages built by real Nix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from testbed.closure import debian_closure
from testbed.images import (
    Directory,
    Entry,
    Layer,
    NixLayerManner,
    nix_layer,
    ordinary_layer,
    store_paths_layer,
    write_image,
)
from testbed.nix_store import Closure, NixStore

ROOT = "{root}"  # stands for the closure's root


@dataclass(frozen=True, slots=True)
class Workload:
    """A program from Debian's ``packages``, run as ``command`` until it prints ``output``.

    ``environment`` and ``links`` (of the image's ordinary layer) may name the closure's root.
    """

    name: str
    packages: Sequence[str]
    command: Sequence[str]
    output: str
    environment: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)


REDIS = Workload(
    "redis",
    ("redis-server", "redis-tools", "bash"),
    (
        "bash",
        "-c",
        'redis-server --save "" --bind 127.0.0.1 >/dev/null & '
        'until [ "$(redis-cli PING 2>/dev/null)" = PONG ]; do read -rt 0.02 <> <(:) || :; done; '
        "echo PONG; kill %1; wait",
    ),
    "PONG",
)
PYTHON = Workload(
    "python",
    (
        *("python3.11-minimal", "python3.11", "libpython3.11-minimal", "libpython3.11-stdlib"),
        *("python3-sqlalchemy", "python3-lxml", "python3-cryptography", "python3-pil"),
        *("python3-jinja2", "python3-requests", "python3-yaml"),
        # What they import in turn.
        *("python3-cffi-backend", "python3-markupsafe", "python3-certifi", "python3-chardet"),
        *("python3-charset-normalizer", "python3-idna", "python3-urllib3", "python3-six"),
    ),
    (
        "python3.11",
        "-c",
        "import sqlalchemy, lxml.etree, cryptography.x509, PIL.Image, jinja2, requests, yaml; "
        "print('imported')",
    ),
    "imported",
    {
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHOME": ROOT,
        "PYTHONPATH": f"{ROOT}/lib/python3/dist-packages",
    },
)
NODE = Workload(
    "node",
    ("nodejs", "node-acorn", "node-cjs-module-lexer", "node-undici"),
    (
        "node",
        "-e",
        "const http = require('http'), host = '127.0.0.1';"
        "const s = http.createServer((_, r) => r.end('hello\\n')).listen(0, host, () =>"
        " http.get({host, port: s.address().port}, r => r.on('data', d => {"
        " process.stdout.write(d); process.exit(0) })))",
    ),
    "hello",
    links={"usr/share/nodejs": f"{ROOT}/share/nodejs"},
)
SHELL = Workload(
    "shell",
    ("bash", "coreutils", "grep", "sed", "gawk", "findutils", "gzip"),
    (
        "bash",
        "-c",
        "ls -l / | sort | sed s/root/r/ | grep -c . && find /nix/store -maxdepth 1 | wc -l && "
        "seq 1000 | sha256sum | cut -c1-8 && echo done | gzip | gzip -d",
    ),
    "done",
)
WORKLOADS = {each.name: each for each in (REDIS, PYTHON, NODE, SHELL)}


@dataclass(frozen=True, slots=True)
class Built:
    """A workload with its closure."""

    workload: Workload
    store: NixStore
    closure: Closure

    @classmethod
    def make(cls, workload: Workload, store: NixStore, *, rebuilt: str = "") -> Built:
        """Build the closure; it is kept for the next time. ``rebuilt`` is a package of it that is built anew."""
        name = f"cold-{workload.name}"
        closure = debian_closure(store, name, workload.packages, rebuilt=rebuilt)
        return cls(workload, store, closure)

    @property
    def environment(self) -> dict[str, str]:
        """The variables of the container."""
        given = {"PATH": f"{ROOT}/bin", **self.workload.environment}
        return {key: self._named(value) for key, value in given.items()}

    @property
    def links(self) -> dict[str, str]:
        """Symbolic links that the image's ordinary layer holds, by path."""
        return {path: self._named(target) for path, target in self.workload.links.items()}

    def base_layer(self) -> Layer:
        """The ordinary layer below the Nix layer."""
        entries: dict[str, Entry | bytes | str] = {"tmp": Directory(mode=0o1777)}
        return ordinary_layer({**entries, **self.links})

    def nix_image(self, archive: Path) -> Path:
        """An image that names the closure's store paths."""
        layer = nix_layer(self.store, self.closure, NixLayerManner.PATHS)
        return self._write(archive, [self.base_layer(), layer], "gzip")

    def ordinary_image(self, archive: Path, compression: str) -> Path:
        """An image that carries the closure's files; ``compression`` is gzip or zstd."""
        layer = store_paths_layer(self.store, self.closure.paths)
        return self._write(archive, [self.base_layer(), layer], compression)

    def _write(self, archive: Path, layers: Sequence[Layer], compression: str) -> Path:
        return write_image(
            archive,
            layers,
            name=f"{archive.stem}:latest",
            command=self.workload.command,
            environment=self.environment,
            compression=compression,
        )

    def _named(self, text: str) -> str:
        return text.replace(ROOT, self.closure.root)
