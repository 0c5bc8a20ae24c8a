"""What a person may set, checked: every error names the file, the key and what was expected."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fusesnap.errors import FusesnapError, InvalidConfiguration
from fusesnap.nix.signature import PublicKey
from fusesnap.nix.store_path import StoreDir

# What Nix itself has where nothing is said.
DEFAULT_SUBSTITUTER = "https://cache.nixos.org"
DEFAULT_KEY = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
DEFAULT_ROOT = Path("/var/lib/fusesnap")
SOCKET_NAME = "fusesnap.sock"
DEFAULT_CONTAINERD = Path("/run/containerd/containerd.sock")

MAX_PORT: Final = 65535

_SIZE: Final = re.compile(r"([0-9]+)|([0-9]+(?:\.[0-9]+)?)([KMGT])(?:i?B)?", re.IGNORECASE)
_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(value: object) -> int:
    """A number of bytes: as it is, or as text with a suffix of ``K``, ``M``, ``G`` or ``T``, powers of 1024.

    Raises ``ValueError``.
    """
    match = _SIZE.fullmatch(str(value).strip())
    if match is None or isinstance(value, bool | float):
        raise ValueError(
            f"{value!r}: a number of bytes is expected, or a text as '500M', '50G' or '1.5T'"
        )
    return int(match[1] or float(match[2]) * _UNITS[match[3].upper()])


class Fetch(BaseModel):
    """Table ``[fetch]``: how patient and how greedy fetching is."""

    # Infinity is no deadline, and every wait has one.
    model_config = ConfigDict(
        extra="forbid", alias_generator=lambda name: name.replace("_", "-"), allow_inf_nan=False
    )

    transfers: int = Field(
        32, ge=1, le=256, description="NARs fetched at once, at most; of large ones a quarter"
    )
    connections: int = Field(
        16, ge=1, le=256, description="connections to one cache for NARs, at most"
    )
    bandwidth: int = Field(
        0, ge=0, description="bytes a second that all caches together may send; 0: no limit"
    )
    complete: bool = Field(
        True,
        description="fetch the rest of running containers' closures while no program waits; false: on metered links",
    )
    look_ahead: Literal["loader", "references", "both", "none"] | None = Field(
        None,
        description="what to fetch before a program asks, where there is no trace: what the dynamic loader will "
        "want, what a path refers to; both if not given, loader where complete is false",
    )
    lookups: int = Field(64, ge=1, le=1024, description="narinfos asked for at once")
    unpackers: int = Field(
        default_factory=lambda: min(os.cpu_count() or 1, 4),
        ge=1,
        le=64,
        description="processes that decompress, check and commit; as many as there are processors, at most 4",
    )
    stall_timeout: float = Field(
        120.0, gt=0, description="seconds without progress after which a reader gets an error"
    )
    lookup_timeout: float = Field(
        30.0, gt=0, description="seconds that all caches together have to answer for one narinfo"
    )
    idle_timeout: float = Field(
        20.0, gt=0, description="seconds that a cache may say nothing in the middle of an answer"
    )
    connect_timeout: float = Field(10.0, gt=0, description="seconds for a connection to a cache")
    min_rate: int = Field(
        1024,
        ge=0,
        description="bytes a second below which a path that is slow by itself is had from another cache; 0: never",
    )

    @property
    def follows(self) -> frozenset[str]:
        """What is looked ahead by: ``loader``, ``references``."""
        ahead = self.look_ahead or ("both" if self.complete else "loader")
        return frozenset({"both": ("loader", "references"), "none": ()}.get(ahead, (ahead,)))

    @property
    def starts_early(self) -> bool:
        """Whether the program that an image names is fetched when it is pulled, which may be in vain."""
        return self.complete and "loader" in self.follows

    @field_validator("min_rate", "bandwidth", mode="before")
    @classmethod
    def _sizes(cls, value: object) -> int:
        return parse_size(value)


class Store(BaseModel):
    """Table ``[store]``: how much of the disk the local store may take."""

    model_config = ConfigDict(
        extra="forbid", alias_generator=lambda name: name.replace("_", "-"), allow_inf_nan=False
    )

    max_size: int = Field(
        0, description="bytes beyond which what no image needs is removed; 0: no limit"
    )
    min_free: int = Field(
        0, description="bytes of the disk to keep free by removing what no image needs; 0: none"
    )
    check_every: float = Field(
        30.0,
        gt=0,
        description="seconds from one look at these limits, and at mounts that are gone, to the next",
    )

    @field_validator("max_size", "min_free", mode="before")
    @classmethod
    def _sizes(cls, value: object) -> int:
        return parse_size(value)


@dataclass(frozen=True, slots=True)
class MetricsAddress:
    """Where Prometheus finds us: ``host`` and ``port``, or the unix socket ``path``."""

    host: str = ""
    port: int = 0
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> MetricsAddress:
        """``host:port`` (``[::1]:9464``), or ``unix:/path``. Raises ``ValueError``."""
        expected = f"{text!r}: expected host:port, as '127.0.0.1:9464', or 'unix:/path'"
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            if not path.startswith("/") or "\0" in path:
                raise ValueError(expected)
            return cls(path=path)
        host, _, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not bare or (":" in bare and bare == host) or not re.fullmatch(r"[0-9]{1,5}", port):
            raise ValueError(expected)
        if int(port) > MAX_PORT:
            raise ValueError(f"{text!r}: a port is a number up to {MAX_PORT}")
        return cls(bare, int(port))

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class PreloadList(BaseModel):
    """Table ``[preload]``: what the daemon fetches when it starts."""

    model_config = ConfigDict(extra="forbid")

    paths: list[str] = Field(
        default_factory=list,
        description="store paths, references to them (nix:0/nix/store/...), and images that containerd has",
    )


class Traces(BaseModel):
    """Table ``[traces]``: what is done about the order in which an image's start reads its store paths."""

    model_config = ConfigDict(
        extra="forbid", alias_generator=lambda name: name.replace("_", "-"), allow_inf_nan=False
    )

    record: bool = Field(True, description="record what starts of containers read")
    replay: bool = Field(
        True,
        description="fetch what an earlier start of the same image has read before this one asks",
    )
    ask_caches: bool = Field(
        True, description="ask caches for traces that a trusted key has signed"
    )
    idle: float = Field(
        10.0,
        gt=0,
        description="seconds after which a start is over that reads nothing new, and waits for nothing",
    )


class BuilderCommand(BaseModel):
    """Table ``[builder]``: what brings a store path that no cache has."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    command: list[str] = Field(
        default_factory=list,
        description="program and arguments; the store path comes last, FUSESNAP_STORE has the store's URL; empty: none",
    )
    timeout: float = Field(600.0, gt=0, description="seconds that it may take for one path")

    @field_validator("command")
    @classmethod
    def _words(cls, command: list[str]) -> list[str]:
        if command and (not command[0] or any("\0" in word for word in command)):
            raise ValueError(f"{command!r}: a program and its arguments are expected")
        return command


class Settings(BaseModel):
    """The whole configuration of a daemon, a mount or a prefetch.

    Keys are spelled with hyphens in the file, as Nix spells its own: ``trusted-public-keys``.
    """

    model_config = ConfigDict(extra="forbid", alias_generator=lambda name: name.replace("_", "-"))

    root: Path = Field(DEFAULT_ROOT, description="state directory")
    address: Path | None = Field(
        None, description="unix socket for containerd; <root>/fusesnap.sock if not given"
    )
    store_dir: str = Field("/nix/store", description="the store directory that paths are named by")
    substituters: list[str] = Field(default_factory=lambda: [DEFAULT_SUBSTITUTER])
    trusted_public_keys: list[str] = Field(default_factory=lambda: [DEFAULT_KEY])
    netrc_file: Path | None = Field(None, description="user names and passwords of caches, by host")
    token_files: dict[str, Path] = Field(
        default_factory=dict, description="files with a bearer token each, by a cache's URL"
    )
    ca_file: Path | None = Field(
        None,
        description="certificate authorities that may vouch for caches, beside the system's, as PEM",
    )
    recognise_by_content: bool = Field(
        True,
        description="take a layer that holds only store path placeholders for a Nix layer, without labels",
    )
    readahead_kib: int = Field(
        16, ge=0, le=8192, description="kernel readahead on the lazy mount, in KiB"
    )
    relay: Literal["auto", "always", "never"] = Field(
        "auto",
        description="whether the supervisor stays between kernel and worker; auto: on Linux before 6.9",
    )
    watchdog: float = Field(
        10.0,
        ge=0,
        description="seconds after which a worker without its sign of life, one a second, is replaced; 0: never",
    )
    spare_worker: bool = Field(
        True,
        description="keep a second worker loaded, which takes over at once when the first dies",
    )
    containerd_address: Path = Field(
        DEFAULT_CONTAINERD, description="containerd's own socket, for images and diffs"
    )
    metrics: str | None = Field(
        None,
        description="where Prometheus may ask: host:port, or unix:/path; not at all if not given",
    )
    spans: str | None = Field(
        None, description="OTLP receiver that spans go to, over HTTP; nowhere if not given"
    )
    fetch: Fetch = Field(default_factory=Fetch)
    store: Store = Field(default_factory=Store)
    builder: BuilderCommand = Field(default_factory=BuilderCommand)
    preload: PreloadList = Field(default_factory=PreloadList)
    traces: Traces = Field(default_factory=Traces)

    @field_validator("spans")
    @classmethod
    def _spans(cls, url: str | None) -> str | None:
        if url is not None and not (
            urlsplit(url).scheme in ("http", "https") and urlsplit(url).hostname
        ):
            raise ValueError(f"{url!r}: expected a URL, as 'http://127.0.0.1:4318'")
        return url

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, text: str | None) -> str | None:
        return None if text is None else str(MetricsAddress.parse(text))

    @field_validator("substituters")
    @classmethod
    def _urls(cls, urls: list[str]) -> list[str]:
        for url in urls:
            parts = urlsplit(url)  # raises ValueError with the reason
            if parts.scheme not in ("http", "https", "file"):
                raise ValueError(f"{url!r}: a substituter is an http://, https:// or file:// URL")
            if not (parts.path.strip("/") if parts.scheme == "file" else parts.hostname):
                lacks = "directory" if parts.scheme == "file" else "host"
                raise ValueError(f"{url!r}: a substituter's URL names a {lacks}")
        return [url.rstrip("/") for url in urls]

    @field_validator("token_files")
    @classmethod
    def _tokens(cls, files: dict[str, Path]) -> dict[str, Path]:
        for url in files:
            if urlsplit(url).scheme not in ("http", "https"):
                raise ValueError(
                    f"{url!r}: the https:// or http:// URL of a substituter is expected"
                )
        return files

    @field_validator("trusted_public_keys")
    @classmethod
    def _keys(cls, keys: list[str]) -> list[str]:
        for key in keys:
            try:
                PublicKey.parse(key)
            except FusesnapError as error:
                raise ValueError(str(error)) from error
        return keys

    @field_validator("root", "address", "containerd_address")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        # A daemon's working directory is nobody's choice, and /proc/self/mountinfo has absolute paths.
        if path is not None and (not path.is_absolute() or "\0" in str(path)):
            raise ValueError(f"{str(path)!r}: an absolute path is expected")
        return path

    @field_validator("store_dir")
    @classmethod
    def _store_dir(cls, path: str) -> str:
        if not path.startswith("/") or path.endswith("/"):
            raise ValueError(f"{path!r}: an absolute path without a slash at its end is expected")
        try:
            return StoreDir(path).path
        except FusesnapError as error:
            raise ValueError(str(error)) from error

    @property
    def socket(self) -> Path:
        """Where containerd finds us."""
        return self.address if self.address is not None else self.root / SOCKET_NAME


def load(path: Path | None, overrides: dict[str, Any], *, root: Path = DEFAULT_ROOT) -> Settings:
    """The settings of the TOML file ``path`` (defaults without one), with ``overrides`` from the command line on top.

    ``root`` is the state directory where neither names one. An override that is ``None`` or empty was not given.
    Substituters that are given without keys keep no default key: the public cache's key vouches for the public cache
    only. Raises ``InvalidConfiguration``.
    """
    values: dict[str, Any] = {"root": str(root)}
    if path is not None:
        values |= _read(path)
    values |= {key: value for key, value in overrides.items() if value not in (None, (), [])}
    if "substituters" in values:
        values.setdefault("trusted-public-keys", [])
    return check(values, str(path) if path is not None else "command line")


def check(values: dict[str, Any], source: str) -> Settings:
    """``values`` as settings. Raises ``InvalidConfiguration`` with a line for each that is not usable."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise InvalidConfiguration(
            "\n".join(_explain(source, problem) for problem in error.errors())
        ) from error


def handed_down(text: str) -> Settings:
    """The settings that ``fusesnap daemon`` checked and the supervisor handed on, with what that needed beside them."""
    values = json.loads(text)
    values.pop("readahead")
    return check(values, "fusesnap daemon")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidConfiguration(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfiguration(f"{path}: not a TOML file: {error}") from error


def _explain(source: str, problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        model = _TABLES.get(key.partition(".")[0], Settings) if "." in key else Settings
        return f"{source}: unknown key {key!r}; known are {', '.join(_known(model))}"
    return f"{source}: {key}: {problem['msg'].removeprefix('Value error, ')}"


_TABLES: Final[dict[str, type[BaseModel]]] = {
    "builder": BuilderCommand,
    "fetch": Fetch,
    "preload": PreloadList,
    "store": Store,
    "traces": Traces,
}


def _known(model: type[BaseModel]) -> Iterable[str]:
    return sorted(field.alias or name for name, field in model.model_fields.items())
