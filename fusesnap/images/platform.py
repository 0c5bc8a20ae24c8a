"""Platforms as images name them, and which of them runs where.

Source: OCI image specification, ``image-index.md``, "platform"; the architectures are Go's GOARCH.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fusesnap.errors import InvalidConfiguration
from fusesnap.nix.quoting import quote

# What an architecture means where no variant is given (containerd and Docker agree on these).
_DEFAULT_VARIANTS: Final = {"arm": "v7", "arm64": "v8", "amd64": "v1"}
# 32-bit ARM processors run what was built for their predecessors.
_ARM_VARIANTS: Final = ("v5", "v6", "v7", "v8")
# What uname(2) calls the machine.
_MACHINES: Final = {
    "x86_64": ("amd64", None),
    "aarch64": ("arm64", None),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", None),
    "ppc64le": ("ppc64le", None),
    "riscv64": ("riscv64", None),
    "s390x": ("s390x", None),
    "loongarch64": ("loong64", None),
}


# e_machine of ELF files (gABI 4.1 and its registry): what such a program is for.
_ELF_MACHINES: Final = {
    3: "386",
    21: "ppc64le",
    22: "s390x",
    40: "arm",
    62: "amd64",
    183: "arm64",
    243: "riscv64",
    258: "loong64",
}
# Which programs of others a processor runs too.
_ALSO_RUNS: Final = {("amd64", "386"), ("arm64", "arm")}


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system and a processor architecture."""

    os: str
    architecture: str
    variant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read ``os/architecture[/variant]``; raises InvalidConfiguration."""
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise InvalidConfiguration(
                f"platform {quote(text)}: expected OS/ARCHITECTURE[/VARIANT], as linux/amd64"
            )
        return cls(*parts)

    @classmethod
    def of_machine(cls, machine: str) -> Platform:
        """Return the Linux platform of what uname(2) calls ``machine``; raises InvalidConfiguration."""
        known = _MACHINES.get(machine)
        if known is None:
            raise InvalidConfiguration(
                f"machine {quote(machine)} has no known image platform; name one as linux/amd64"
            )
        return cls("linux", *known)

    def runs_machine(self, machine: int) -> bool:
        """Say whether a program with this ``e_machine`` may run here; of an unknown one it may."""
        architecture = architecture_of_elf(machine)
        pair = (self.architecture, architecture)
        return architecture in (None, self.architecture) or pair in _ALSO_RUNS

    def distance(self, offered: Platform) -> int | None:
        """Say how far ``offered`` is from this: 0 where it is the same, more where it still runs.

        None where it does not run here.
        """
        if (offered.os, offered.architecture) != (self.os, self.architecture):
            return None
        default = _DEFAULT_VARIANTS.get(self.architecture)
        wanted, given = self.variant or default, offered.variant or default
        if wanted == given:
            return 0
        if self.architecture == "arm" and wanted in _ARM_VARIANTS and given in _ARM_VARIANTS:
            older = _ARM_VARIANTS.index(wanted) - _ARM_VARIANTS.index(given)
            return older if older > 0 else None
        return None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


def architecture_of_elf(machine: int) -> str | None:
    """Return the architecture of an ELF file's ``e_machine``, None where that is not known."""
    return _ELF_MACHINES.get(machine)
