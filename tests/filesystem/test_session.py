"""The kernel takes a request back while we go to read it."""

from __future__ import annotations

import errno

import pyfuse3
import pytest

from fusesnap.filesystem.session import answer_requests


async def test_a_request_that_was_taken_back_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[object] = []
    taken_back = OSError(errno.EAGAIN, "fuse_session_receive_buf failed")
    outcomes = [taken_back, ExceptionGroup("nursery", [taken_back]), None]

    async def main(max_tasks: int) -> None:
        happened.append(max_tasks)
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(pyfuse3, "main", main)
    await answer_requests(7, lambda: happened.append("again"))
    assert happened == [7, "again", 7, "again", 7]


async def test_another_failure_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(max_tasks: int) -> None:
        raise ExceptionGroup("nursery", [OSError(errno.EIO, "fuse_session_receive_buf failed")])

    monkeypatch.setattr(pyfuse3, "main", main)
    with pytest.raises(ExceptionGroup) as caught:
        await answer_requests(7, lambda: None)
    assert [type(each) for each in caught.value.exceptions] == [OSError]
