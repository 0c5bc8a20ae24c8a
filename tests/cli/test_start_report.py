"""``fusesnap start-report``: what it prints, writes, completes and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from pydantic import TypeAdapter

from fusesnap.cli.app import cli
from fusesnap.cli.start_report import listing
from fusesnap.daemon.telemetry.start import Start
from fusesnap.errors import FusesnapError, InvalidData, NotFound, StorageFailure, Unavailable
from fusesnap.services import daemon_service

from .waterfall.samples import BEGAN, sample

KEYS = ("k8s.io/12/0123456789abcdef", "default/3/redis")
STARTS = [
    {"key": KEYS[0], "image": "k8s.io/11/sha256:aa", "began": BEGAN, "fuse": True},
    {"key": KEYS[1], "image": "default/2/sha256:bb", "began": BEGAN - 60, "fuse": False},
    {"key": KEYS[1], "image": "default/2/sha256:bb", "began": BEGAN - 90, "fuse": True},
]
Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command against a daemon that knows the sample."""

    def report(address: Path, target: str, number: int) -> dict[str, Any]:
        if target != "redis":
            raise NotFound(f"{target!r}: no start of such a container or snapshot is known")
        start = TypeAdapter(Start).dump_python(sample(), mode="json")
        return {"start": start, "count": number}

    monkeypatch.setattr(daemon_service, "ask_starts", lambda address: STARTS)
    monkeypatch.setattr(daemon_service, "ask_start_report", report)

    def call(*words: object) -> Result:
        return CliRunner().invoke(cli, ["start-report", *map(str, words)])

    return call


def test_it_prints_the_start(run: Run) -> None:
    said = run("redis")
    assert said.exit_code == 0
    assert "The longest chain is 3 waits" in said.output
    assert "▶ glibc-2.40-66" in said.output


def test_json_is_the_whole_answer_and_files_are_written_beside_it(run: Run, tmp_path: Path) -> None:
    page, picture = tmp_path / "a.html", tmp_path / "a.svg"
    said = run("redis", "--json", "--html", page, "--svg", picture)
    assert json.loads(said.output)["start"]["chain_waits"] == 3
    assert page.read_text().startswith("<!doctype html>")
    assert picture.read_text().startswith("<svg ")


def test_a_file_is_named_with_what_is_in_it(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "a.svg"
    said = run("redis", "--svg", picture)
    assert said.output.startswith(f"{picture}: The longest chain is 3 waits")
    assert said.output.count("\n") == 1


def test_without_a_name_the_starts_are_listed(run: Run) -> None:
    head, first, second, third = run().output.splitlines()
    assert head.split() == ["STARTED", "SNAPSHOT", "WAS", "IMAGE"]
    assert first == f"2026-09-21 14:13:20 UTC  {KEYS[0]}  cold      k8s.io/11/sha256:aa"
    assert ("complete" in second, "cold" in third) == (True, True)
    assert json.loads(run("--json").output) == STARTS
    assert listing([]) == ["no container was started with fusesnap of late"]


@pytest.mark.parametrize("words", [("--html", "x.html"), ("--number", "2")])
def test_what_is_to_be_drawn_must_be_named(run: Run, words: tuple[str, ...]) -> None:
    said = run(*words)
    assert said.exit_code == click.UsageError.exit_code
    assert "name a container or a snapshot" in said.output


@pytest.mark.parametrize(
    ("words", "kind"), [(("other",), NotFound), (("redis", "--svg", "/no/such/x"), StorageFailure)]
)
def test_what_cannot_be_done_is_an_error(
    run: Run, words: tuple[str, ...], kind: type[FusesnapError]
) -> None:
    assert isinstance(run(*words).exception, kind)


def test_an_answer_of_another_release_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_service, "ask_start_report", lambda *_: {"start": {"key": 5}})
    error = run("redis").exception
    assert isinstance(error, InvalidData)
    assert "is it of another release?" in str(error)


def completions(incomplete: str) -> list[str]:
    shell = ShellComplete(cli, {}, "fusesnap", "_FUSESNAP_COMPLETE")
    return [item.value for item in shell.get_completions(["start-report"], incomplete)]


def test_a_shell_completes_containers_and_snapshots(run: Run) -> None:
    assert completions("") == ["0123456789abcdef", "redis"]
    assert completions("re") == ["redis"]
    assert completions("default/") == ["default/3/redis"]


def test_a_shell_completes_nothing_where_no_daemon_answers(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(address: Path) -> None:
        raise Unavailable("no daemon")

    monkeypatch.setattr(daemon_service, "ask_starts", fail)
    assert completions("") == []
