"""What the tests of HTTP ask for, and what they expect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fusesnap.errors import (
    FusesnapError,
)
from fusesnap.nix.narinfo import NarInfo
from fusesnap.substituter.base import Substituter
from fusesnap.substituter.http import HttpSubstituter
from fusesnap.substituter.transfer import PROGRESS
from tests.substituter.samples import Sample, sample
from tests.substituter.scripted_server import Reply

MakeCache = Callable[..., HttpSubstituter]

BIG = sample("big", size=4 * PROGRESS, compression="none")
NARINFO = f"/{BIG.narinfo_name}"
NAR = f"/{BIG.info.url}"


async def read(cache: Substituter, info: NarInfo) -> bytes:
    async with cache.nar(info) as pieces:
        return b"".join([piece async for piece in pieces])


async def failure(ask: Callable[[], Any], kind: type[FusesnapError]) -> str:
    with pytest.raises(FusesnapError) as caught:
        await ask()
    assert type(caught.value) is kind, repr(caught.value)
    return str(caught.value)


def rest(published: Sample, start: int, **changes: Any) -> Reply:
    """The answer to a request for a range that goes to the end of the file."""
    size = len(published.file)
    headers = {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
    return Reply(206, published.file[start:], headers, **changes)
