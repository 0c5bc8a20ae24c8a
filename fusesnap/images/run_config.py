"""How a container of an image starts: the part ``config`` of an image's configuration.

Source: OCI image specification, ``config.md``, "Properties"; Docker has the same names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusesnap.errors import InvalidData
from fusesnap.nix.quoting import quote

# What may name a program in a command line or in a shell's script, and how many words of it are looked at.
_WORD: Final = re.compile(r"[\w/.+-]+", re.ASCII)
MAX_WORDS: Final = 64


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What a container starts with. None, or nothing, is what nobody said.

    ``ports`` are ``<number>[/<protocol>]``, ``volumes`` paths in the container.
    """

    entrypoint: tuple[str, ...] | None = None
    command: tuple[str, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    working_directory: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: frozenset[str] = frozenset()
    volumes: frozenset[str] = frozenset()
    others: Mapping[str, Any] = field(default_factory=dict)

    def over(self, base: RunConfig) -> RunConfig:
        """This, on top of a base image's. As Dockerfiles have it, a new entrypoint takes the old command away."""
        command = base.command if self.entrypoint is None else None
        return RunConfig(
            entrypoint=base.entrypoint if self.entrypoint is None else self.entrypoint,
            command=command if self.command is None else self.command,
            environment={**base.environment, **self.environment},
            user=base.user if self.user is None else self.user,
            working_directory=(
                base.working_directory if self.working_directory is None else self.working_directory
            ),
            labels={**base.labels, **self.labels},
            ports=base.ports | self.ports,
            volumes=base.volumes | self.volumes,
            others={**base.others, **self.others},
        )

    @property
    def programs(self) -> tuple[tuple[str, ...], ...]:
        """Where the programs are, if anywhere, that a container may run: first the one that it starts with.

        Of each the absolute paths in the container, in the order in which they are tried. The other words of the
        command line may name programs too, as those of a shell's script do: most name none.
        """
        first, *others = (*(self.entrypoint or ()), *(self.command or ())) or ("",)
        words = [word for text in others for word in _WORD.findall(text)]
        found = [self._places(word) for word in dict.fromkeys([first, *words[:MAX_WORDS]])]
        return tuple(places for places in found if places)

    def _places(self, word: str) -> tuple[str, ...]:
        """Where runc and a shell look for a program; nowhere for a path that is not absolute."""
        if not word or "/" in word:
            return (word,) if word.startswith("/") else ()
        directories = self.environment.get("PATH", "").split(":")
        return tuple(f"{each}/{word}" for each in directories if each.startswith("/"))

    def to_json(self) -> dict[str, Any]:
        """Return the object of the configuration; what nobody said is not in it."""
        said: dict[str, Any] = {
            "User": self.user,
            "ExposedPorts": {port: {} for port in sorted(self.ports)},
            "Env": [f"{name}={value}" for name, value in self.environment.items()],
            "Entrypoint": None if self.entrypoint is None else list(self.entrypoint),
            "Cmd": None if self.command is None else list(self.command),
            "Volumes": {volume: {} for volume in sorted(self.volumes)},
            "WorkingDir": self.working_directory,
            "Labels": dict(sorted(self.labels.items())),
        }
        return {name: value for name, value in said.items() if value} | dict(self.others)


class _Config(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    entrypoint: list[str] | None = Field(alias="Entrypoint", default=None)
    command: list[str] | None = Field(alias="Cmd", default=None)
    environment: list[str] | None = Field(alias="Env", default=None)
    user: str | None = Field(alias="User", default=None)
    working_directory: str | None = Field(alias="WorkingDir", default=None)
    labels: dict[str, str] | None = Field(alias="Labels", default=None)
    ports: dict[str, Any] | None = Field(alias="ExposedPorts", default=None)
    volumes: dict[str, Any] | None = Field(alias="Volumes", default=None)


class _Whole(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    config: _Config | None = None
    history: list[dict[str, Any]] | None = None


def parse_run_config(data: bytes, name: str) -> RunConfig:
    """Read an image's configuration; ``name`` is for messages. Raises InvalidData."""
    config = _parse(data, name).config or _Config()
    return RunConfig(
        entrypoint=tuple(config.entrypoint) if config.entrypoint else None,
        command=tuple(config.command) if config.command else None,
        environment=dict(variable.partition("=")[::2] for variable in config.environment or ()),
        user=config.user or None,
        working_directory=config.working_directory or None,
        labels=config.labels or {},
        ports=frozenset(config.ports or ()),
        volumes=frozenset(config.volumes or ()),
        others={
            name: value for name, value in (config.model_extra or {}).items() if value is not None
        },
    )


def parse_history(data: bytes, name: str) -> list[dict[str, Any]]:
    """Read how an image came about, an entry a step; empty where it does not say. Raises InvalidData."""
    return _parse(data, name).history or []


def _parse(data: bytes, name: str) -> _Whole:
    try:
        return _Whole.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidData(
            f"{name}: {where}: {first['msg']}, got {quote(repr(first['input']))}"
        ) from error
