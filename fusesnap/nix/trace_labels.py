"""A startup trace that an image carries with it, in the labels of its Nix layer.

They are annotations of the layer's descriptor in the image's manifest: ``containerd.io/snapshot/fusesnap-trace.<N>``,
numbered from 0, with the base 64 of one zstd frame that holds the trace's text, cut where a label is full.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Final

import zstandard

from fusesnap.errors import InvalidArgument, InvalidData
from fusesnap.nix.closure_labels import LABEL_PREFIX
from fusesnap.nix.compression import decompressor
from fusesnap.nix.startup_trace import StartupTrace
from fusesnap.nix.startup_trace_text import MAX_TRACE_SIZE, format_trace, parse_trace

TRACE_LABEL_PREFIX: Final = LABEL_PREFIX + "fusesnap-trace."
# containerd's API: key and value of a label have at most 4096 bytes together.
MAX_LABEL_SIZE: Final = 4096
# A manifest has at most 4 MiB (OCI distribution specification), and there are other things in it.
MAX_LABELS: Final = 64
_LEVEL: Final = 19


def trace_labels(trace: StartupTrace) -> dict[str, str]:
    """The labels that carry ``trace``. Raises ``InvalidArgument`` where it needs more than an image may have."""
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(format_trace(trace))
    text = base64.b64encode(packed).decode("ascii")
    room = MAX_LABEL_SIZE - len(TRACE_LABEL_PREFIX) - len(str(MAX_LABELS))
    pieces = [text[start : start + room] for start in range(0, len(text), room)]
    if len(pieces) > MAX_LABELS:
        raise InvalidArgument(
            f"startup trace of closure {trace.closure}: needs {len(pieces)} labels, expected at most {MAX_LABELS}:"
            " put it beside the image in a binary cache"
        )
    return {f"{TRACE_LABEL_PREFIX}{number}": piece for number, piece in enumerate(pieces)}


def parse_trace_labels(labels: Mapping[str, str]) -> StartupTrace | None:
    """The trace that labels carry, ``None`` if they carry none. Raises ``InvalidData``; trusted it is not yet."""
    pieces: list[str] = []
    while len(pieces) < MAX_LABELS and (piece := labels.get(f"{TRACE_LABEL_PREFIX}{len(pieces)}")):
        pieces.append(piece)
    if not pieces:
        return None
    try:
        packed = base64.b64decode("".join(pieces), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidData(f"label {TRACE_LABEL_PREFIX}<N>: not in base 64") from error
    return parse_trace(_unpacked(packed))


def _unpacked(packed: bytes) -> bytes:
    """The content of zstd frames. What size they announce is not believed."""
    text, zstd = bytearray(), decompressor("zstd")
    for piece in zstd.decompress(packed):
        text += piece
        if len(text) > MAX_TRACE_SIZE:
            raise InvalidData(
                f"label {TRACE_LABEL_PREFIX}<N>: expected a trace of at most {MAX_TRACE_SIZE} bytes, got more"
            )
    zstd.finish()
    return bytes(text)
