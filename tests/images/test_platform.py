from __future__ import annotations

import pytest

from fusesnap.errors import InvalidConfiguration
from fusesnap.images.platform import Platform


def test_text() -> None:
    for text in ("linux/amd64", "linux/arm/v7"):
        assert str(Platform.parse(text)) == text


@pytest.mark.parametrize("text", ["", "linux", "linux/", "/amd64", "linux/arm/v7/x", "linux//v7"])
def test_text_that_is_no_platform(text: str) -> None:
    with pytest.raises(InvalidConfiguration, match="expected OS/ARCHITECTURE"):
        Platform.parse(text)


def test_machines() -> None:
    assert Platform.of_machine("x86_64") == Platform("linux", "amd64")
    assert Platform.of_machine("armv7l") == Platform("linux", "arm", "v7")
    with pytest.raises(InvalidConfiguration, match="machine 'vax'"):
        Platform.of_machine("vax")


@pytest.mark.parametrize(
    ("ours", "offered", "distance"),
    [
        ("linux/amd64", "linux/amd64", 0),
        ("linux/amd64", "linux/amd64/v1", 0),
        ("linux/amd64", "linux/amd64/v3", None),
        ("linux/arm64", "linux/arm64/v8", 0),
        ("linux/arm", "linux/arm/v7", 0),
        ("linux/arm/v7", "linux/arm/v6", 1),
        ("linux/arm/v7", "linux/arm/v5", 2),
        ("linux/arm/v6", "linux/arm/v7", None),
        ("linux/amd64", "linux/arm64", None),
        ("linux/amd64", "windows/amd64", None),
        ("linux/amd64", "unknown/unknown", None),
    ],
)
def test_distance(ours: str, offered: str, distance: int | None) -> None:
    assert Platform.parse(ours).distance(Platform.parse(offered)) == distance
