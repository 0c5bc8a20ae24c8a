"""What a server may answer when a part of a file is asked for."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest

from fusesnap.errors import PathNotFound, Unavailable
from fusesnap.substituter.part import PartTransfer
from fusesnap.substituter.retry import PartsUnsupported, Refusal

from .samples import sample

INFO = replace(sample().info, file_size=100)


def transfer(start: int = 10, end: int = 30) -> PartTransfer:
    return PartTransfer("cache: file", INFO, start, end)


def response(status: int, **headers: str) -> httpx.Response:
    return httpx.Response(status, headers={k.replace("_", "-"): v for k, v in headers.items()})


def test_it_asks_for_what_is_missing() -> None:
    reading = transfer()
    assert reading.request_headers()["Range"] == "bytes=10-29"
    reading.begin(response(206, Content_Range="bytes 10-29/100"))
    reading.receive(bytes(15))
    with pytest.raises(Unavailable, match="ended at byte 25, expected 30"):
        reading.end()
    assert reading.take_progress()
    assert not reading.take_progress()
    assert reading.request_headers()["Range"] == "bytes=25-29"
    reading.begin(response(206, Content_Range="bytes 25-29/*"))
    reading.receive(bytes(5))
    reading.end()
    assert reading.ended


def test_a_server_without_parts_is_told_from_one_that_fails() -> None:
    with pytest.raises(PartsUnsupported, match="status 200 to a request for bytes 10 to 29"):
        transfer().begin(response(200))
    with pytest.raises(Unavailable):
        transfer().begin(response(503))
    with pytest.raises(PathNotFound):
        transfer().begin(response(404))
    with pytest.raises(Refusal, match="416"):
        transfer().begin(response(416))


def test_the_whole_file_may_come_whole() -> None:
    transfer(0, 100).begin(response(200))
    with pytest.raises(PartsUnsupported):
        transfer(0, 99).begin(response(200))


@pytest.mark.parametrize(
    "text", ["", "bytes 0-19/100", "bytes 10-28/100", "bytes 10-99/100", "items 10-29/100"]
)
def test_another_part_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="Content-Range is"):
        transfer().begin(response(206, Content_Range=text))


def test_an_encoding_is_refused() -> None:
    with pytest.raises(Refusal, match="sent as 'gzip'"):
        transfer().begin(response(206, Content_Range="bytes 10-29/100", Content_Encoding="gzip"))


def test_more_than_was_asked_for_is_refused() -> None:
    reading = transfer()
    with pytest.raises(Refusal, match="more bytes than"):
        reading.receive(bytes(21))
