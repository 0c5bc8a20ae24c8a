from __future__ import annotations

import pytest

from fusesnap.errors import InvalidData
from fusesnap.nix.cache_info import MAX_CACHE_INFO_SIZE, CacheInfo, parse_cache_info


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"StoreDir: /nix/store\n", CacheInfo("/nix/store", False, None)),
        (
            b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n",
            CacheInfo("/nix/store", True, 40),
        ),
        (b"Priority:-5\nStoreDir:/gnu/store", CacheInfo("/gnu/store", False, -5)),
        (
            b"\nnote\nStoreDir: /nix/store\r\nWantMassQuery: 0\nX: y\n",
            CacheInfo("/nix/store", False, None),
        ),
    ],
)
def test_is_read(data: bytes, expected: CacheInfo) -> None:
    assert parse_cache_info(data) == expected


def test_size_is_capped() -> None:
    with pytest.raises(InvalidData, match=f"expected at most {MAX_CACHE_INFO_SIZE}"):
        parse_cache_info(b"StoreDir: /nix/store\n" + b" " * MAX_CACHE_INFO_SIZE)
