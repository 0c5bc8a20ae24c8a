"""What runs while something else does."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from fusesnap.daemon.watching import meanwhile
from fusesnap.errors import InvalidArgument


async def test_it_runs_as_long_as_the_block_and_no_longer() -> None:
    said: list[str] = []

    async def tick(word: str) -> None:
        try:
            said.append(word)
            await trio.sleep_forever()
        finally:
            said.append("over")

    async with meanwhile(tick, "tick"):
        await trio.testing.wait_all_tasks_blocked()
        assert said == ["tick"]
    assert said == ["tick", "over"]


async def test_an_error_that_can_be_told_comes_out_as_it_is() -> None:
    with pytest.raises(InvalidArgument, match="no such path"):
        async with meanwhile(trio.sleep_forever):
            raise InvalidArgument("no such path")
