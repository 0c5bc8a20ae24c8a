from __future__ import annotations

import hashlib

import pytest

from fusesnap.errors import InvalidData
from fusesnap.images.digest import Digest


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_digests(algorithm: str) -> None:
    text = f"{algorithm}:{hashlib.new(algorithm, b'').hexdigest()}"
    digest = Digest.parse(text)
    assert str(digest) == text
    assert digest.algorithm.new().hexdigest() == digest.hexadecimal
    assert digest.file_name == text.replace(":", "-")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256",
        "sha256:",
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 65,
        "sha256:" + "A" * 64,
        "sha256:" + "g" * 64,
        "sha256:" + "../" * 21 + "a",
        "sha512:" + "a" * 64,
        "md5:" + "a" * 32,
        "sha256+b64:" + "a" * 64,
        "a" * 64,
    ],
)
def test_what_is_no_digest(text: str) -> None:
    with pytest.raises(InvalidData, match=r"^digest .*: expected "):
        Digest.parse(text)
