from __future__ import annotations

from pathlib import Path

import pytest

from fusesnap.errors import InvalidConfiguration
from fusesnap.images.source import ImageSource, Transport, parse_source


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("oci-archive:a.tar", ImageSource(Transport.ARCHIVE, Path("a.tar"))),
        ("oci:/srv/image", ImageSource(Transport.DIRECTORY, Path("/srv/image"))),
        ("oci:image:latest", ImageSource(Transport.DIRECTORY, Path("image"), "latest")),
        (
            "oci-archive:a.tar:host:5000/redis:7",
            ImageSource(Transport.ARCHIVE, Path("a.tar"), "host:5000/redis:7"),
        ),
    ],
)
def test_sources(text: str, source: ImageSource) -> None:
    assert parse_source(text) == source
    assert str(source) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no image"),
        ("a.tar", "names no image"),
        ("docker:a.tar", "names no image: expected oci-archive:FILE"),
        ("oci", "expected a path after 'oci:'"),
        ("oci:", "expected a path after 'oci:'"),
        ("oci::latest", "expected a path after 'oci:'"),
        ("oci:a\0b", "expected a path after 'oci:'"),
        ("oci-archive:a.tar:", "expected a reference after the second colon"),
    ],
)
def test_what_names_no_image(text: str, reason: str) -> None:
    with pytest.raises(InvalidConfiguration, match=reason) as caught:
        parse_source(text)
    assert repr(text) in str(caught.value)
