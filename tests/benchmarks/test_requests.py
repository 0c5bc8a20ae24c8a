from __future__ import annotations

import pytest
from benchmarks.requests import Asked, asked, kind_of
from testbed.binary_cache import Request


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nix-cache-info", "nix-cache-info"),
        ("0123.narinfo", "narinfo"),
        ("nar/0123.narindex", "NAR index"),
        ("nar/0123.nar.xz", "NAR"),
        ("0123.ls", "listing"),
        ("trace/0123", "trace"),
        ("bundle/0123", "bundle"),
        ("log/0123", "others"),
    ],
)
def test_an_object_is_known_by_its_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_parts_of_nars_are_counted_apart_and_what_is_absent_is_told() -> None:
    requests = [
        Request("GET", "/nar/a.nar.zst", 200, 100),
        Request("GET", "/nar/a.nar.zst", 206, 10, "bytes=0-9"),
        Request("GET", "/nar/a.nar.zst", 206, 10, "bytes=10-19"),
        Request("GET", "/trace/a", 404, 0),
    ]
    assert asked(requests) == [
        Asked("NAR", 1, 0),
        Asked("NAR, a range", 2, 0),
        Asked("trace", 1, 1),
    ]
