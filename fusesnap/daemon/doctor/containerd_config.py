"""containerd's configuration as containerd itself reads it, and what it says of us.

Imports, versions, migrations and defaults differ from release to release, so ``containerd config dump`` of the very
program that runs is asked. What it prints is a whole configuration of the newest version that it knows.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fusesnap.errors import InvalidConfiguration, Unavailable

DUMP_WITHIN: Final = 30.0  # seconds
OLD_CRI, NEW_CRI_IMAGES = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"
NEW_CRI_RUNTIME: Final = "io.containerd.cri.v1.runtime"
TRANSFER: Final = "io.containerd.transfer.v1.local"
GRPC_SERVER: Final = "io.containerd.server.v1.grpc"  # where configuration version 4 has the socket
_LOG_PREFIX: Final = re.compile(r'^time="[^"]*" level=\w+ msg=')
_LINES: Final = 3  # of containerd's complaint
_SNAPSHOT_TYPES: Final = ("snapshot", "io.containerd.snapshotter.v1")


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy plugin of the configuration."""

    name: str
    type: str
    address: str
    root: str
    capabilities: tuple[str, ...]

    @property
    def is_snapshotter(self) -> bool:
        """Whether containerd takes it for a snapshotter."""
        return self.type in _SNAPSHOT_TYPES


@dataclass(frozen=True, slots=True)
class Cri:
    """What Kubernetes' calls use: the snapshotter, and those of single runtimes by name."""

    snapshotter: str
    runtimes: Mapping[str, str]
    annotations: bool
    """Whether snapshotters are told what layers are."""


@dataclass(frozen=True, slots=True)
class ContainerdConfig:
    """The configuration in ``file``; ``written_version`` is the one that stands there, None if there is no file."""

    file: Path
    written_version: int | None
    values: Mapping[str, Any]

    @property
    def root(self) -> Path:
        """Where containerd keeps what stays."""
        return Path(str(self.values.get("root", "")))

    def proxies(self) -> list[Proxy]:
        """The proxy plugins."""
        found = table(self.values, "proxy_plugins")
        return [
            Proxy(
                name,
                str(each.get("type", "")),
                str(each.get("address", "")).removeprefix("unix://"),
                str(table(each, "exports").get("root", "")),
                tuple(each.get("capabilities") or ()),
            )
            for name, each in found.items()
        ]

    def cri(self) -> Cri | None:
        """The CRI plugin's settings; None where it is disabled."""
        disabled = self.values.get("disabled_plugins") or []
        if {OLD_CRI, NEW_CRI_IMAGES, "cri"} & set(disabled):
            return None
        plugins = table(self.values, "plugins")
        images = table(plugins, NEW_CRI_IMAGES)
        if images:
            runtimes = table(plugins, NEW_CRI_RUNTIME, "containerd", "runtimes")
        else:
            images = table(plugins, OLD_CRI, "containerd")
            runtimes = table(images, "runtimes")
        named = {name: str(each.get("snapshotter") or "") for name, each in runtimes.items()}
        named |= {
            name: str(each.get("snapshotter") or "")
            for name, each in table(images, "runtime_platforms").items()
        }
        return Cri(
            str(images.get("snapshotter", "")),
            {name: snapshotter for name, snapshotter in named.items() if snapshotter},
            not images.get("disable_snapshot_annotations", False),
        )

    def unpack_snapshotters(self) -> list[str] | None:
        """For which snapshotters the transfer service unpacks; None where only the default is."""
        given = table(self.values, "plugins", TRANSFER).get("unpack_config")
        return None if given is None else [str(each.get("snapshotter", "")) for each in given]


def read(program: Path, file: Path) -> ContainerdConfig:
    """What ``program``, a containerd, reads from ``file``; its defaults where that is not there.

    Raises ``InvalidConfiguration`` with what containerd says, and ``Unavailable`` where it cannot be run.
    """
    written = _written(file)
    command = ["containerd", "config", "default"]
    if written is not None:
        command = ["containerd", "--config", str(file), "config", "dump"]
    text = _run(command, program)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Unavailable(f"{' '.join(command)}: not TOML: {error}") from error
    version = None if written is None else int(written.get("version", 1))
    return ContainerdConfig(file, version, values)


def program_version(program: Path) -> str:
    """The version that a containerd says it has. Raises ``Unavailable``."""
    return _run(["containerd", "--version"], program).split()[2]


def major(version: str) -> int:
    """The first number of a version, however it goes on: ``1.6.20~ds1``, ``v2.1.9+unknown``. 0 if there is none."""
    found = re.match(r"v?(\d+)\.", version)
    return int(found[1]) if found else 0


def table(values: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A table in a table; an empty one if it is not there."""
    for name in names:
        inner = values.get(name)
        values = inner if isinstance(inner, Mapping) else {}
    return values


def _run(command: list[str], program: Path) -> str:
    shown = " ".join(command)
    try:
        # By the name of containerd, whatever the file is called: there are programs that are several.
        done = subprocess.run(
            command, executable=program, capture_output=True, text=True, timeout=DUMP_WITHIN,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{shown}: no answer within {DUMP_WITHIN:g} s") from error
    except OSError as error:
        raise Unavailable(f"{program}: {error.strerror}") from error
    if done.returncode:
        raise InvalidConfiguration(_complaint(done.stderr) or f"{shown}: failed")
    return done.stdout


def _complaint(text: str) -> str:
    """What containerd says before it ends: its last lines, without those of a panic's stack."""
    said, _, _ = text.strip().partition("\n\n")
    lines = [_LOG_PREFIX.sub("", line) for line in said.splitlines()]
    return "; ".join(lines[-_LINES:])


def written_address(file: Path) -> Path | None:
    """The socket that the file names itself, if it does. Raises ``InvalidConfiguration``."""
    values = _written(file) or {}
    given = table(values, "plugins", GRPC_SERVER).get("address")
    given = given or table(values, "grpc").get("address")
    return Path(given) if given else None


def _written(file: Path) -> dict[str, Any] | None:
    """What is written in the file; None if there is none."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidConfiguration(f"{file}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfiguration(f"{file}: not a TOML file: {error}") from error
