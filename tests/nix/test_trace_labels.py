"""A trace that an image carries: as many labels as it takes, and nothing that a stranger could blow up."""

from __future__ import annotations

import base64
import random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import InvalidArgument, InvalidData
from fusesnap.nix.startup_trace import BLOCK, StartupTrace, TraceBuilder
from fusesnap.nix.startup_trace_text import MAX_TRACE_SIZE
from fusesnap.nix.trace_labels import (
    MAX_LABEL_SIZE,
    MAX_LABELS,
    TRACE_LABEL_PREFIX,
    parse_trace_labels,
    trace_labels,
)

from .traces import CLOSURE, HELLO, NAR, WELL, example, traces


def scattered(count: int) -> StartupTrace:
    """A start that reads so many pieces of a large file in no order."""
    builder, size = TraceBuilder(), 1 << 40
    file = builder.file(builder.path(HELLO, NAR), 2, size, b"bin/hello")
    places = random.Random(1)  # noqa: S311 - not for secrets
    for _ in range(count):
        builder.read(file, places.randrange(size // BLOCK) * BLOCK, 1, size)
    return builder.trace(CLOSURE, WELL)


@given(traces())
def test_what_is_packed_is_unpacked(trace: StartupTrace) -> None:
    assert parse_trace_labels({"other": "x", **trace_labels(trace)}) == trace


def test_a_long_one_takes_several_labels() -> None:
    trace = scattered(3000)
    labels = trace_labels(trace)
    assert len(labels) > 2
    assert max(len(key) + len(value) for key, value in labels.items()) <= MAX_LABEL_SIZE
    assert parse_trace_labels(dict(reversed(labels.items()))) == trace
    del labels[f"{TRACE_LABEL_PREFIX}1"]
    with pytest.raises(InvalidData):
        parse_trace_labels(labels)


def test_too_long_a_one_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=f"expected at most {MAX_LABELS}: put it beside"):
        trace_labels(scattered(40_000))


def test_an_image_without_one_has_none() -> None:
    assert parse_trace_labels({}) is None
    assert parse_trace_labels({f"{TRACE_LABEL_PREFIX}1": "x", "fusesnap-trace.0": "x"}) is None


def packed(data: bytes) -> dict[str, str]:
    frame = zstandard.ZstdCompressor().compress(data)
    return {f"{TRACE_LABEL_PREFIX}0": base64.b64encode(frame).decode()}


def test_a_bomb_does_not_go_off() -> None:
    with pytest.raises(InvalidData, match=f"at most {MAX_TRACE_SIZE} bytes, got more"):
        parse_trace_labels(packed(b"a" * 100_000_000))


@given(
    st.text(max_size=50) | st.binary(max_size=50).map(lambda data: base64.b64encode(data).decode())
)
def test_anything_may_come(text: str) -> None:
    labels = {f"{TRACE_LABEL_PREFIX}0": text}
    try:
        found = parse_trace_labels(labels)
    except InvalidData:
        return
    assert found is None or trace_labels(found) == labels


def test_what_is_packed_must_be_a_trace() -> None:
    for data in (b"", b"no trace\n", b"fusesnap-trace 1\n"):
        with pytest.raises(InvalidData, match="startup trace"):
            parse_trace_labels(packed(data))
    assert parse_trace_labels(trace_labels(example())) == example()
