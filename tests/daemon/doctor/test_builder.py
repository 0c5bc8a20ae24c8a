"""What is said of ``[builder]`` and ``[preload]``."""

from __future__ import annotations

from typing import Any

import pytest

from fusesnap.config import load
from fusesnap.daemon.doctor.builder import examine_builder
from fusesnap.daemon.doctor.findings import Level

PATH = "/nix/store/00000000000000000000000000000000-redis-7.0"


def found(**tables: Any) -> list[tuple[str, Level, str]]:
    findings = examine_builder(load(None, tables))
    return [(each.subject, each.level, each.said) for each in findings]


def test_nothing_is_said_of_what_is_not_configured() -> None:
    assert found() == []


def test_a_program_that_is_there_and_one_that_is_not() -> None:
    ((subject, level, said),) = found(builder={"command": ["sh", "-c", "true"]})
    assert (subject, level) == ("builder", Level.OK)
    assert said.endswith("/sh is run for a path that no cache has")
    assert found(builder={"command": ["/absent/program"]}) == [
        ("builder", Level.FAILURE, "/absent/program: no such program")
    ]


def test_names() -> None:
    names = [PATH, f"nix:0{PATH}:latest", "registry.example.org/redis:7", "/srv/image.tar"]
    assert found(preload={"paths": names}) == [("preload", Level.OK, "4 names")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/nix/store/redis", "is not 32 characters of"),
        ("nix:0/redis", "is not in /nix/store"),
        ("Redis", "expected [HOST[:PORT]/]NAME[:TAG]"),
    ],
)
def test_what_is_no_name(name: str, reason: str) -> None:
    (one, other) = found(preload={"paths": [name, PATH, name]})
    assert one == other
    assert one[:2] == ("preload", Level.FAILURE)
    assert one[2].startswith(f"{name}: ")
    assert reason in one[2]
