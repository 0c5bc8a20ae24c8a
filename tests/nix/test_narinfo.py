from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import InvalidData
from fusesnap.nix.hash import NIX32_ALPHABET, Hash, HashAlgorithm
from fusesnap.nix.narinfo import (
    MAX_NARINFO_SIZE,
    MAX_SIGNATURES,
    MAX_SIZE,
    NarInfo,
    parse_narinfo,
)
from fusesnap.nix.signature import Signature
from fusesnap.nix.store_path import StoreDir, StorePath

STORE = StoreDir()
MINIMAL = {
    "StorePath": "/nix/store/0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx-hello",
    "URL": "nar/1w1fff338fvdw53sqgamddn1b2xgds473pv6y13gizdbqjv4i5p3.nar.xz",
    "NarHash": "sha256:0hc7x4mami1jj3iay66b0qs9lm2ipl1hhsckccbxcn882rk6f1s5",
    "NarSize": "480",
}


def text_of(fields: dict[str, str], extra: str = "") -> bytes:
    return ("".join(f"{name}: {value}\n" for name, value in fields.items()) + extra).encode()


def parse(fields: dict[str, str], extra: str = "") -> NarInfo:
    return parse_narinfo(text_of(fields, extra), STORE)


hash_parts = st.text(alphabet=NIX32_ALPHABET, min_size=32, max_size=32)
names = st.from_regex(r"[0-9A-Za-z+_?=][0-9A-Za-z+\-._?=]{0,40}", fullmatch=True)
paths = st.builds(StorePath, hash_parts, names)
sha256 = st.builds(Hash, st.just(HashAlgorithm.SHA256), st.binary(min_size=32, max_size=32))
sizes = st.integers(1, MAX_SIZE)
values = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=20)
unknown_names = st.from_regex(r"X-[0-9A-Za-z_-]{1,9}", fullmatch=True)
narinfos = st.builds(
    NarInfo,
    store_path=paths,
    url=st.from_regex(r"nar/[0-9a-z]{1,9}\.nar(\.xz)?(\?hash=[0-9a-z]{3})?", fullmatch=True),
    compression=st.sampled_from(["none", "xz", "zstd", "bzip2", "br"]),
    file_hash=st.none() | sha256,
    file_size=st.none() | sizes,
    nar_hash=sha256,
    nar_size=sizes,
    references=st.sets(paths, max_size=4).map(lambda some: tuple(sorted(some))),
    deriver=st.none() | paths,
    system=st.none() | st.just("x86_64-linux"),
    signatures=st.lists(
        st.builds(Signature, st.sampled_from(["a", "b.c-1"]), st.binary(min_size=64, max_size=64)),
        max_size=3,
        unique=True,
    ).map(tuple),
    ca=st.none() | sha256.map(lambda value: f"fixed:r:{value}"),
    unknown=st.lists(st.tuples(unknown_names, values), max_size=3).map(tuple),
    store_dir=st.just(STORE),
)


@given(narinfos)
def test_what_is_printed_is_read(info: NarInfo) -> None:
    assert parse_narinfo(info.to_text().encode(), STORE) == info


def test_defaults_are_those_of_nix() -> None:
    info = parse(MINIMAL)
    assert info.compression == "bzip2"
    assert info.references == ()
    assert info.signatures == ()
    assert info.unknown == ()
    empty = (info.file_hash, info.file_size, info.deriver, info.system, info.ca)
    assert empty == (None, None, None, None, None)
    assert parse(MINIMAL | {"Compression": ""}).compression == "bzip2"
    assert parse(MINIMAL | {"Deriver": "unknown-deriver"}).deriver is None
    assert parse(MINIMAL | {"FileSize": "0"}).file_size is None
    assert parse(MINIMAL | {"CA": ""}).ca is None


def test_references_are_sorted_and_unique() -> None:
    one, two = "00000000000000000000000000000001-a", "00000000000000000000000000000000-b"
    info = parse(MINIMAL | {"References": f"{one} {two}  {one}"})
    assert [path.base_name for path in info.references] == [two, one]
    assert (
        info.fingerprint()
        == (
            f"1;{MINIMAL['StorePath']};{MINIMAL['NarHash']};480;/nix/store/{two},/nix/store/{one}"
        ).encode()
    )


def test_fingerprint_spells_the_hash_as_nix_does() -> None:
    value = Hash.parse(MINIMAL["NarHash"])
    for spelling in (f"sha256:{value.base16()}", f"sha256:{value.base64()}", value.sri()):
        info = parse(MINIMAL | {"NarHash": spelling})
        assert info.fingerprint() == parse(MINIMAL).fingerprint()


def test_unknown_fields_are_kept_in_order() -> None:
    extra = "Later: x\nSystem: x86_64-linux\nAnother: \nLater: y: \u00fc\n"
    info = parse(MINIMAL, extra)
    assert info.unknown == (("Later", "x"), ("Another", ""), ("Later", "y: \u00fc"))
    assert info.to_text().endswith("System: x86_64-linux\nLater: x\nAnother: \nLater: y: \u00fc\n")


def test_equal_signatures_count_once() -> None:
    signature = Signature("a", bytes(64))
    info = parse(MINIMAL, f"Sig: {signature}\n" * (MAX_SIGNATURES + 1))
    assert info.signatures == (signature,)


@pytest.mark.parametrize(
    "url",
    [
        "nar/a.nar",
        "a.nar?x=../y",
        "https://other.example/nar/a.nar",
        "http://other.example:80/a",
        "HTTPS://x/",
        "nar/a..b/...",
    ],
)
def test_urls_that_are_taken(url: str) -> None:
    assert parse(MINIMAL | {"URL": url}).url == url


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("URL", "nar/a b", "has a space or a backslash"),
        ("URL", "nar\\a", "has a space or a backslash"),
        ("URL", "nar/a\u00a0b", "has a space or a backslash"),
        ("URL", "/nar/a", "is neither relative to the cache nor http or https"),
        ("URL", "//host/nar/a", "is neither relative"),
        ("URL", "ftp://host/a", "is neither relative"),
        ("URL", "https:///a", "is neither relative"),
        ("URL", "nar/%00", "unprintable characters"),
        ("URL", "nar/%2E%2e/x", "a segment '..'"),
        ("URL", "..", "a segment '..'"),
        ("Compression", "x z", "is not the name of a compression"),
        ("Compression", "XZ", "is not the name of a compression"),
        ("FileHash", "sha256:0", "has 1 characters"),
        ("FileSize", "-1", "is not a number of bytes"),
        ("FileSize", "1e3", "is not a number of bytes"),
        ("FileSize", "", "is not a number of bytes"),
        ("NarSize", str(MAX_SIZE + 1), "is not a number of bytes from 0 to 9223372036854775807"),
        ("NarSize", "\u0661", "is not a number of bytes"),
        ("Deriver", "", "is not a store path's base name"),
        ("Deriver", "/nix/store/0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx-a.drv", "base name"),
        ("References", "x", "is not a store path's base name"),
        ("StorePath", "", "is not a store path in /nix/store"),
    ],
)
def test_bad_values_are_refused(field: str, value: str, message: str) -> None:
    with pytest.raises(InvalidData, match=f"^narinfo: field {field}: .*{message}"):
        parse(MINIMAL | {field: value})


def test_sizes_are_capped() -> None:
    with pytest.raises(InvalidData, match=f"bytes, expected at most {MAX_NARINFO_SIZE}"):
        parse(MINIMAL | {"X": "y" * MAX_NARINFO_SIZE})
    many = "".join(
        f"Sig: {Signature('a', bytes([i, j]))}\n" for i in range(2) for j in range(MAX_SIGNATURES)
    )
    with pytest.raises(InvalidData, match=f"256 signatures, expected at most {MAX_SIGNATURES}"):
        parse(MINIMAL, many)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(InvalidData, match=r"^narinfo: "):
        parse_narinfo(noise, STORE)


@given(narinfos, st.data())
def test_a_changed_byte_is_refused_or_gives_what_is_printed_again(
    info: NarInfo, data: st.DataObject
) -> None:
    text = bytearray(info.to_text().encode())
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        changed = parse_narinfo(bytes(text), STORE)
    except InvalidData:
        return
    assert parse_narinfo(changed.to_text().encode(), STORE) == changed


def test_another_store_directory() -> None:
    store_dir = StoreDir("/opt/store")
    info = replace(parse(MINIMAL), store_dir=store_dir)
    assert parse_narinfo(info.to_text().encode(), store_dir) == info
    assert info.fingerprint().startswith(b"1;/opt/store/0c0b")
    with pytest.raises(InvalidData, match="is not a store path in /opt/store"):
        parse_narinfo(text_of(MINIMAL), store_dir)
