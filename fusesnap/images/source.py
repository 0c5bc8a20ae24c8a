"""What a user writes to name an image on disk."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fusesnap.errors import InvalidConfiguration
from fusesnap.nix.quoting import quote


class Transport(StrEnum):
    """How the image is kept. The names are those of containers-transports(5)."""

    ARCHIVE = "oci-archive"
    DIRECTORY = "oci"


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An OCI image layout: a tar of one, or a directory.

    ``reference`` tells images of one layout apart (the annotation
    ``org.opencontainers.image.ref.name``); None stands for the only one.
    """

    transport: Transport
    path: Path
    reference: str | None = None

    def __str__(self) -> str:
        reference = f":{self.reference}" if self.reference is not None else ""
        return f"{self.transport}:{self.path}{reference}"


def parse_source(text: str) -> ImageSource:
    """Read ``oci-archive:FILE[:REFERENCE]`` or ``oci:DIRECTORY[:REFERENCE]``.

    As in containers-transports(5), the path ends at the first colon, and the reference may have
    more of them. Raises InvalidConfiguration, quoting the text.
    """
    name, _, rest = text.partition(":")
    if name not in set(Transport):
        raise InvalidConfiguration(
            f"{quote(text)} names no image: expected oci-archive:FILE[:REFERENCE]"
            " or oci:DIRECTORY[:REFERENCE]"
        )
    path, colon, reference = rest.partition(":")
    if not path or "\0" in path:
        raise InvalidConfiguration(f"{quote(text)}: expected a path after '{name}:'")
    if colon and not reference:
        raise InvalidConfiguration(f"{quote(text)}: expected a reference after the second colon")
    return ImageSource(Transport(name), Path(path), reference or None)
