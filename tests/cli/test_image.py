"""What is said of a command line of ``fusesnap image`` before anything is done."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fusesnap.cli.image import build, output_place, platform_of
from fusesnap.errors import InvalidConfiguration
from fusesnap.images.platform import Platform

PATH = "/nix/store/" + "0" * 32 + "-x"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "Missing argument 'PATH...'"),
        ([PATH], "Missing option '-o'"),
        ([PATH, "-o", "x", "-p", "99999"], "a port is expected, as 6379 or 53/udp"),
        ([PATH, "-o", "x", "-p", "80/http"], "a port is expected"),
        ([PATH, "-o", "x", "-e", "A"], "NAME=VALUE is expected"),
        ([PATH, "-o", "x", "-l", "=A"], "NAME=VALUE is expected"),
        ([PATH, "-o", "x", "-v", "data"], "an absolute path is expected"),
        ([PATH, "-o", "oci:"], "a path is expected after oci:"),
    ],
)
def test_what_cannot_be_understood(arguments: list[str], reason: str) -> None:
    done = CliRunner().invoke(build, arguments)
    assert done.exit_code == 2
    assert reason in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a.tar", (Path("a.tar"), False)),
        ("oci-archive:a.tar", (Path("a.tar"), False)),
        ("oci:dir", (Path("dir"), True)),
        ("a:b.tar", (Path("a:b.tar"), False)),
    ],
)
def test_where_an_image_goes(text: str, place: tuple[Path, bool]) -> None:
    assert output_place(text) == place


def test_architectures() -> None:
    assert platform_of("aarch64") == platform_of("arm64") == Platform("linux", "arm64")
    assert platform_of("arm/v7") == Platform("linux", "arm", "v7")
    assert platform_of(None).os == "linux"
    with pytest.raises(InvalidConfiguration, match="expected OS/ARCHITECTURE"):
        platform_of("a/b/c")


def test_nothing_is_expected_after_a_missing_path() -> None:
    with pytest.raises(click.BadParameter):
        output_place("oci-archive:")
