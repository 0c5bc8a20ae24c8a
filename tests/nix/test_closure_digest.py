from __future__ import annotations

import subprocess

import pytest

from fusesnap.errors import InvalidData
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.store_path import StoreDir, StorePath

PATHS = [
    StorePath("0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx", "hello"),
    StorePath("0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx", "hello-2.12"),
    StorePath("z" * 32, "Z"),
    StorePath("1" * 32, "a+b"),
]


def test_it_is_what_sort_and_sha256sum_say() -> None:
    listed = "".join(f"/nix/store/{path}\n" for path in [*PATHS, PATHS[0]])
    command = "LC_ALL=C sort -u | sha256sum"
    said = subprocess.run(
        ["sh", "-c", command], input=listed.encode(), capture_output=True, check=True
    )
    assert str(ClosureDigest.of(PATHS, StoreDir())) == said.stdout.split()[0].decode()


def test_it_depends_on_paths_and_store_directory_only() -> None:
    name = ClosureDigest.of(PATHS, StoreDir())
    assert ClosureDigest.of([*reversed(PATHS), PATHS[2]], StoreDir()) == name
    assert ClosureDigest.of(PATHS, StoreDir("/other")) != name
    assert ClosureDigest.of(PATHS[1:], StoreDir()) != name


@pytest.mark.parametrize(
    "text", ["", "0" * 63, "0" * 65, "A" * 64, "0" * 64 + "\n", "../" * 21 + "x"]
)
def test_other_texts_are_no_digest(text: str) -> None:
    with pytest.raises(InvalidData, match="64 hexadecimal digits"):
        ClosureDigest(text)
