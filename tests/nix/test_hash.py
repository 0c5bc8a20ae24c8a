from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import InvalidData
from fusesnap.nix.hash import Hash, HashAlgorithm, compress_digest, nix32_decode, nix32_encode

hashes = st.sampled_from(HashAlgorithm).flatmap(
    lambda algorithm: st.builds(
        Hash,
        st.just(algorithm),
        st.binary(min_size=algorithm.digest_size, max_size=algorithm.digest_size),
    )
)


@given(st.binary(max_size=70))
def test_nix32_round_trip(data: bytes) -> None:
    assert nix32_decode(nix32_encode(data)) == data


@given(st.text(alphabet="0123456789abcdfghijklmnpqrsvwxyz", max_size=20))
def test_nix32_has_one_spelling(text: str) -> None:
    try:
        data = nix32_decode(text)
    except InvalidData:
        return
    assert nix32_encode(data) == text


@given(hashes)
def test_all_spellings_are_read(value: Hash) -> None:
    bare = (value.base16(), value.base16().upper(), value.nix32(), value.base64())
    for text in bare:
        assert Hash.parse(text, value.algorithm) == value
        assert Hash.parse(f"{value.algorithm}:{text}") == value
    assert Hash.parse(value.sri()) == value
    assert Hash.parse(value.sri(), value.algorithm) == value
    assert Hash.parse(str(value)) == value


@pytest.mark.parametrize("algorithm", HashAlgorithm)
def test_new_makes_digests_of_the_announced_size(algorithm: HashAlgorithm) -> None:
    digest = algorithm.new()
    digest.update(b"x")
    assert len(Hash(algorithm, digest.digest()).digest) == algorithm.digest_size


def test_compress_digest_folds() -> None:
    assert compress_digest(bytes([1, 2, 3, 4, 5]), 2) == bytes([1 ^ 3 ^ 5, 2 ^ 4])


ZEROS = "0" * 52


@pytest.mark.parametrize(
    ("text", "algorithm", "message"),
    [
        (ZEROS, None, "does not say its algorithm"),
        (f"sha1:{'0' * 32}", HashAlgorithm.SHA256, "is sha1, expected sha256"),
        (f"sha3:{ZEROS}", None, "hash algorithm is 'sha3', expected one of md5, sha1, sha256"),
        (f"SHA256:{ZEROS}", None, "hash algorithm is 'SHA256'"),
        (f"sha256:{ZEROS[1:]}", None, "has 51 characters, expected 64 .base 16., 52 .nix32., 44"),
        (f"sha256:{'e' * 52}", None, "characters that are not in Nix's base 32"),
        (f"sha256:{'z' * 52}", None, "not a whole number of bytes"),
        (f"sha256:{'g' * 64}", None, "is not in base 16"),
        (f"sha256:{'!' * 44}", None, "is not in base 64"),
        ("sha256-AAAA", None, "has 3 bytes, expected 32"),
        (f"sha256-{'A' * 42}B=", None, "not in canonical base 64"),
        (f"sha256-{'A' * 43}", None, "is not in base 64"),
        ("sha256:" + "\u0660" * 64, None, "is not in base 16"),
        ("", None, "does not say its algorithm"),
    ],
)
def test_bad_hashes_are_refused(text: str, algorithm: HashAlgorithm | None, message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        Hash.parse(text, algorithm)


def test_digest_of_another_size_is_refused() -> None:
    with pytest.raises(InvalidData, match="sha256 digest has 20 bytes, expected 32"):
        Hash(HashAlgorithm.SHA256, bytes(20))
