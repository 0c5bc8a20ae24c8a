"""Frames come out as they went in, however the stream cuts them."""

from __future__ import annotations

from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap import errors
from fusesnap.errors import FusesnapError, InvalidData, StorageFailure
from fusesnap.fetch.unpack_frames import (
    HEADER,
    MAX_LENGTH,
    Frame,
    FrameKind,
    FrameParser,
    decode_error,
    encode_error,
    read_frame,
)

FRAMES = st.builds(
    Frame, st.integers(0, 2**32 - 1), st.sampled_from(FrameKind), st.binary(max_size=300)
)


@given(frames=st.lists(FRAMES, max_size=8), cut=st.integers(1, 64))
def test_frames_survive_any_cut(frames: list[Frame], cut: int) -> None:
    stream = b"".join(frame.encode() for frame in frames)
    parser = FrameParser()
    found = []
    for start in range(0, len(stream), cut):
        parser.receive_data(stream[start : start + cut])
        while (frame := parser.next_frame()) is not None:
            found.append(frame)
    assert found == frames


@given(frames=st.lists(FRAMES, max_size=4), missing=st.integers(0, 400))
def test_they_are_read_from_a_stream_to_its_end(frames: list[Frame], missing: int) -> None:
    data = b"".join(frame.encode() for frame in frames)
    stream = BytesIO(data[: max(0, len(data) - missing)])
    found = []
    while (frame := read_frame(stream)) is not None:
        found.append(frame)
    assert found == frames[: len(found)]
    left = b"".join(frame.encode() for frame in frames[len(found) :])
    assert len(left) <= missing + (HEADER.size + 300) * (missing > 0)
    assert missing or found == frames


@pytest.mark.parametrize("header", [HEADER.pack(1, 99, 0), HEADER.pack(1, 2, MAX_LENGTH + 1)])
def test_what_is_no_frame_is_refused(header: bytes) -> None:
    with pytest.raises(InvalidData, match="no frame"):
        read_frame(BytesIO(header))
    parser = FrameParser()
    parser.receive_data(header)
    with pytest.raises(InvalidData, match="no frame"):
        parser.next_frame()


@pytest.mark.parametrize(
    "error",
    [InvalidData("a"), errors.ContentMismatch("b: c"), StorageFailure("full", 28)],
    ids=lambda error: type(error).__name__,
)
def test_an_error_arrives_as_what_it_was(error: FusesnapError) -> None:
    found = decode_error(encode_error(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert getattr(found, "errno", None) == getattr(error, "errno", None)


def test_a_name_that_is_no_error_of_ours_makes_a_plain_one() -> None:
    assert type(decode_error(b'["Iterable", "x", null]')) is FusesnapError
