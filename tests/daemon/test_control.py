"""The control socket, between two ends of ours and towards strangers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from fusesnap.daemon import control
from fusesnap.errors import InvalidArgument, Unavailable


async def echo(question: Mapping[str, Any]) -> dict[str, Any]:
    return {"heard": question["words"]}


async def refuse(question: Mapping[str, Any]) -> dict[str, Any]:
    raise InvalidArgument(f"{question['call']}: not today")


CALLS = {"echo": echo, "refuse": refuse}


async def test_a_question_is_answered(tmp_path: Path, nursery: trio.Nursery) -> None:
    await nursery.start(control.serve, tmp_path / "s", CALLS)
    assert await control.ask(tmp_path / "s", "echo", words=["a", "ü"]) == {"heard": ["a", "ü"]}


async def test_a_long_question_is_answered(tmp_path: Path, nursery: trio.Nursery) -> None:
    await nursery.start(control.serve, tmp_path / "s", CALLS)
    words = ["x" * 100] * 10_000
    assert await control.ask(tmp_path / "s", "echo", words=words) == {"heard": words}


async def test_an_error_comes_back_as_one(tmp_path: Path, nursery: trio.Nursery) -> None:
    await nursery.start(control.serve, tmp_path / "s", CALLS)
    with pytest.raises(Unavailable, match="refuse: not today"):
        await control.ask(tmp_path / "s", "refuse")
    with pytest.raises(Unavailable, match="unknown call 'sing'; known are echo, refuse"):
        await control.ask(tmp_path / "s", "sing")


async def test_where_nobody_listens_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="is the daemon running"):
        await control.ask(tmp_path / "s", "echo")


@pytest.mark.parametrize("sent", [b"nonsense\n", b"[1]\n", b"\xff\n", b"{", b""])
async def test_a_stranger_does_not_stop_it(
    tmp_path: Path, nursery: trio.Nursery, sent: bytes
) -> None:
    await nursery.start(control.serve, tmp_path / "s", CALLS)
    async with await trio.open_unix_socket(tmp_path / "s") as stranger:
        await stranger.send_all(sent)
        stranger.socket.shutdown(trio.socket.SHUT_WR)
        assert await stranger.receive_some() == b""
    assert await control.ask(tmp_path / "s", "echo", words="still here") == {"heard": "still here"}


async def test_the_next_one_takes_the_socket_over(tmp_path: Path) -> None:
    async with trio.open_nursery() as old:
        await old.start(control.serve, tmp_path / "s", CALLS)
        async with trio.open_nursery() as new:

            async def other(question: Mapping[str, Any]) -> dict[str, Any]:
                return {"heard": "by another"}

            await new.start(control.serve, tmp_path / "s", {"echo": other})
            old.cancel_scope.cancel()
            assert await control.ask(tmp_path / "s", "echo", words="") == {"heard": "by another"}
            new.cancel_scope.cancel()


async def test_a_bug_in_an_answer_does_not_end_whoever_answers(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    await nursery.start(control.serve, tmp_path / "s", CALLS)
    with pytest.raises(Unavailable, match="unexpected KeyError: 'words'"):
        await control.ask(tmp_path / "s", "echo")
    assert await control.ask(tmp_path / "s", "echo", words="on") == {"heard": "on"}
