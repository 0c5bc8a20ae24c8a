from __future__ import annotations

from dataclasses import replace

import pytest

from fusesnap.errors import InvalidData
from fusesnap.nix.index_reference import IndexReference
from fusesnap.nix.narinfo import NarInfo, parse_narinfo
from fusesnap.nix.store_path import StoreDir

TEXT = (
    "StorePath: /nix/store/0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx-hello\nURL: nar/x.nar.zst\n"
    f"Compression: zstd\nNarHash: sha256:{'0' * 52}\nNarSize: 100\nReferences: \nOther: y\n"
)
INFO = parse_narinfo(TEXT.encode(), StoreDir())
REFERENCE = IndexReference("nar/x.narindex", 17, "cache-1")


def with_field(*values: str) -> NarInfo:
    return replace(INFO, unknown=tuple(("NarIndex", value) for value in values))


def test_it_goes_through_a_narinfo() -> None:
    text = REFERENCE.added_to(REFERENCE.added_to(INFO)).to_text()
    assert text == TEXT + "NarIndex: nar/x.narindex 17 cache-1\n"
    assert IndexReference.of(parse_narinfo(text.encode(), StoreDir())) == REFERENCE


def test_most_narinfos_have_none() -> None:
    assert IndexReference.of(INFO) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("a 1 k", "b 2 k"), "field NarIndex comes twice"),
        (("a 1",), "expected '<URL> <bytes> <key name>'"),
        (("a 1 k x",), "expected '<URL> <bytes> <key name>'"),
        (("../a 1 k",), "has a segment '..'"),
        (("ftp://a 1 k",), "is neither relative to the cache nor http or https"),
        (("a x k",), "'x' is not a number of bytes"),
    ],
)
def test_what_cannot_be_read_is_refused(values: tuple[str, ...], said: str) -> None:
    with pytest.raises(InvalidData) as caught:
        IndexReference.of(with_field(*values))
    assert said in str(caught.value)
