"""The outputs of a derivation that lies in the store.

Source: E. Dolstra, "The purely functional software deployment model", section 5.4; ``src/libstore/derivations.cc`` of
Nix. A file ``*.drv`` begins with ``Derive([("<output>","<path>","<hash algorithm>","<hash>"),...],``.
"""

from __future__ import annotations

import re
from typing import Final

_START: Final = b"Derive(["
_OUTPUT: Final = re.compile(rb'\("([^"\\]+)","([^"\\]*)","[^"\\]*","[^"\\]*"\),?')


def derivation_outputs(data: bytes) -> list[tuple[str, str]]:
    """Return name and full store path of each output whose path is known; empty for what is no derivation."""
    outputs = []
    position = len(_START)
    if data.startswith(_START):
        while match := _OUTPUT.match(data, position):
            outputs.append((match[1].decode(errors="replace"), match[2].decode(errors="replace")))
            position = match.end()
    return [(name, path) for name, path in outputs if path]
