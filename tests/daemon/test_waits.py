"""How a person names what is to be cancelled."""

from __future__ import annotations

import pytest

from fusesnap.daemon.waits import store_path_of, upper_of
from fusesnap.errors import InvalidArgument, NotFound
from fusesnap.nix.store_path import StoreDir

PATH = "/nix/store/" + "0" * 32 + "-hello"
UPPERS = {"/s/1/fs": "default/12/one", "/s/2/fs": "k8s.io/13/one", "/s/3/fs": "default/14/two"}


def test_a_file_names_the_store_path_that_it_is_in() -> None:
    assert store_path_of(PATH, StoreDir()) == PATH
    assert store_path_of(f"{PATH}/bin/hello", StoreDir()) == PATH


@pytest.mark.parametrize("target", ["/nix/store", "/nix/store/", "/etc/passwd", "/nix/store/x/y"])
def test_another_path_is_refused(target: str) -> None:
    with pytest.raises(InvalidArgument, match="expected a path in /nix/store"):
        store_path_of(target, StoreDir())


def test_a_snapshot_is_named_by_its_key_or_the_end_of_it() -> None:
    assert upper_of("default/12/one", UPPERS) == "/s/1/fs"
    assert upper_of("two", UPPERS) == "/s/3/fs"
    assert upper_of("14/two", UPPERS) == "/s/3/fs"


def test_a_name_that_is_none_or_several_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"default/12/one, k8s\.io/13/one"):
        upper_of("one", UPPERS)
    for name in ("three", "wo", ""):
        with pytest.raises(NotFound, match="no active snapshot has such a key"):
            upper_of(name, UPPERS)
