"""Names of images in registries.

Source: ``reference.go`` and ``normalize.go`` of github.com/distribution/reference.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from fusesnap.errors import InvalidArgument
from fusesnap.nix.quoting import quote

DOCKER_HUB: Final = "docker.io"
_HUB_SERVER: Final = "registry-1.docker.io"
_MAX_NAME: Final = 255
_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST: Final = re.compile(
    rf"({_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:]+\])(?::([0-9]{{1,5}}))?", re.ASCII
)
_TAG: Final = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]{0,127}", re.ASCII)
_LOOPBACK: Final = re.compile(r"localhost|127\.[0-9.]+|\[::1\]")


@dataclass(frozen=True, slots=True)
class RegistryReference:
    """An image in a registry. ``host`` may have a port."""

    host: str
    repository: str
    tag: str

    @property
    def server(self) -> str:
        """The host that answers; Docker's own registry is not called what its images are called."""
        return _HUB_SERVER if self.host == DOCKER_HUB else self.host

    @property
    def is_local(self) -> bool:
        """Whether the registry is on this machine, where no TLS is expected."""
        match = _HOST.fullmatch(self.host)
        return match is not None and _LOOPBACK.fullmatch(match[1]) is not None

    def __str__(self) -> str:
        return f"{self.host}/{self.repository}:{self.tag}"


def parse_registry_reference(text: str) -> RegistryReference:
    """Read ``[host[:port]/]repository[:tag]``, with Docker's defaults; raises InvalidArgument.

    A digest is none to push to: it is the image's own.
    """
    if "@" in text:
        raise InvalidArgument(
            f"image name {quote(text)}: expected a tag, got a digest: an image has its own"
        )
    first, slash, rest = text.partition("/")
    is_host = bool(slash) and (
        ":" in first or "." in first or first in ("localhost",) or first.startswith("[")
    )
    host, path = (first, rest) if is_host else (DOCKER_HUB, text)
    repository, colon, tag = path.partition(":")
    if host == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    found = RegistryReference(host, repository, tag if colon else "latest")
    if (
        not _HOST.fullmatch(host)
        or not _REPOSITORY.fullmatch(repository)
        or not _TAG.fullmatch(found.tag)
        or len(host) + 1 + len(repository) > _MAX_NAME
    ):
        raise InvalidArgument(
            f"image name {quote(text)}: expected [HOST[:PORT]/]NAME[:TAG], the name in small letters, digits and single"
            " separators"
        )
    return found
