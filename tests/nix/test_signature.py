from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import InvalidData
from fusesnap.nix.signature import PublicKey, SecretKey, Signature, TrustedKeys

# RFC 8032, 7.1, test 2.
SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
KEY = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
SIGNED = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)
SECRET = SecretKey("cache-1", SEED + KEY)


def test_signs_as_the_standard_says() -> None:
    signature = SECRET.sign(b"\x72")
    assert signature == Signature("cache-1", SIGNED)
    assert SECRET.public_key() == PublicKey("cache-1", KEY)
    assert SECRET.public_key().verify(b"\x72", signature)


@given(st.binary(max_size=100), st.integers(0, 511))
def test_a_flipped_bit_is_noticed(message: bytes, bit: int) -> None:
    signature = SECRET.sign(message)
    flipped = bytearray(signature.signature)
    flipped[bit // 8] ^= 1 << bit % 8
    public = SECRET.public_key()
    assert public.verify(message, signature)
    assert not public.verify(message, Signature("cache-1", bytes(flipped)))
    assert not public.verify(message + b"x", signature)


def test_a_signature_of_another_length_or_name_does_not_verify() -> None:
    public = SECRET.public_key()
    assert not public.verify(b"\x72", Signature("cache-1", SIGNED[:-1]))
    assert not public.verify(b"\x72", Signature("cache-2", SIGNED))


def test_text_forms() -> None:
    for value in (SECRET, SECRET.public_key(), SECRET.sign(b"x")):
        assert type(value).parse(str(value)) == value
    assert SecretKey.parse(f"{SECRET}\n") == SECRET


def test_the_secret_does_not_show() -> None:
    encoded = base64.b64encode(SEED).decode()[:20]
    assert encoded not in repr(SECRET)
    assert repr(SEED[:8])[2:-1] not in repr(SECRET)


def test_trusted_keys_by_name() -> None:
    old, new = SecretKey("a", SEED + KEY).public_key(), PublicKey("a", bytes(32))
    keys = TrustedKeys.parse([str(old), str(new), str(SECRET.public_key())])
    assert keys.named("a") == (old, new)
    assert keys.named("b") == ()


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (Signature.parse, "no-colon", "signature 'no-colon' is not of the form"),
        (Signature.parse, ":AAAA", "is not of the form"),
        (Signature.parse, "a b:AAAA", "is not of the form"),
        (Signature.parse, "a:A", "of key 'a' is not in base 64"),
        (Signature.parse, "a:\u00e9", "of key 'a' is not in base 64"),
        (PublicKey.parse, "a:AAAA", "public key 'a' has 3 bytes, expected 32"),
        (SecretKey.parse, "a:AAAA", "secret key 'a' has 3 bytes, expected 64"),
        (
            SecretKey.parse,
            str(SECRET)[:-4] + "AAAA",
            "secret key 'cache-1'.*(bytes, expected 64|is of another key)",
        ),
    ],
)
def test_bad_text_is_refused(parse: object, text: str, message: str) -> None:
    assert callable(parse)
    with pytest.raises(InvalidData, match=message):
        parse(text)


def test_an_error_does_not_show_the_secret() -> None:
    text = str(SECRET)[:-8]
    with pytest.raises(InvalidData) as caught:
        SecretKey.parse(text)
    assert text[8:30] not in str(caught.value)
