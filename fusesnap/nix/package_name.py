"""The package that a store path is of, as far as its name tells."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

# Nix's manual, builtins.parseDrvName: "The name is everything up to but not including the first dash not followed by
# a letter, and the version is everything following that dash."
_VERSION: Final = re.compile(r"-(?![A-Za-z])")
# nixpkgs puts the name of an output behind the version: glibc-2.38-44-bin.
_OUTPUT: Final = re.compile(r"(?:-[A-Za-z][A-Za-z0-9_+]*)*$")


@dataclass(frozen=True, slots=True)
class PackageName:
    """``package`` without its version; ``output`` is what follows the version, often the name of an output."""

    package: str
    output: str

    @classmethod
    def parse(cls, name: str) -> PackageName:
        """Read the name of a store path, without its hash part. Every name is one."""
        version = _VERSION.search(name)
        if version is None:
            return cls(name, "")
        rest = name[version.end() :]
        output = _OUTPUT.search(rest)
        return cls(name[: version.start()], output.group() if output else "")
