"""One file for each reason to refuse, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import make_nix_assets
import pytest

from fusesnap.errors import FusesnapError, InvalidData, UntrustedPath
from fusesnap.nix.cache_info import parse_cache_info
from fusesnap.nix.nar import NarParser, NeedData
from fusesnap.nix.narinfo import parse_narinfo
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.store_path import StoreDir
from fusesnap.nix.trust import check_trust

ASSETS = Path(__file__).parent / "assets"
KEYS = TrustedKeys.parse([make_nix_assets.PUBLIC_KEY])
HELLO = "/nix/store/0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx-hello"

NARS = {
    "unsorted": "at byte 272 near 'b': name 'a' comes after 'b': not sorted",
    "duplicate": "at byte 272 near 'a': name 'a' comes twice",
    "dot": "at byte 80: name '.' is reserved",
    "dotdot": "at byte 80: name '..' is reserved",
    "slash": "at byte 80: name 'a/b' has a slash or a NUL",
    "nul": r"at byte 80: name 'a\x00b' has a slash or a NUL",
    "empty-name": "at byte 80: empty name",
    "long-name": "at byte 80: name of 256 bytes, expected at most 255",
    "huge-name": "at byte 80: name of 18446744073709551615 bytes, expected at most 255",
    "too-deep": "at byte 69688 near 'd/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/"
    "d/d/d/d/d/d/d/d/d/d/'...: nested deeper than 512 directories",
    "trailing": "ends at byte 120, but more bytes follow",
    "two-roots": "ends at byte 120, but more bytes follow",
    "truncated": "cut short at byte 119",
    "padding": "at byte 99: padding is not zero",
    "name-padding": "at byte 139: padding is not zero",
    "target-padding": "at byte 97: padding is not zero",
    "long-target": "at byte 56: link target of 4096 bytes, expected at most 4095",
    "empty-target": "at byte 56: target '' is empty or has a NUL",
    "target-nul": r"at byte 56: target 'x\x00y' is empty or has a NUL",
    "no-target": "at byte 56: expected 'target', got ')'",
    "executable-marker": "at byte 56: expected '', got 'yes'",
    "no-contents": "at byte 56: expected 'contents' or 'executable', got ')'",
    "huge-file": "at byte 56: file of 9223372036854775808 bytes,"
    " expected at most 9223372036854775807",
    "unknown-type": "at byte 56: expected 'regular' or 'directory' or 'symlink', got 'device'",
    "token-padding": "at byte 56: padding of 'directory' is not zero",
    "unknown-token": "at byte 80: expected 'entry' or ')', got 'attribute'",
    "huge-token": "at byte 56: expected 'regular' or 'directory' or 'symlink',"
    r" got '\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff'",
    "entry-without-name": "at byte 80: expected 'name', got 'node'",
    "magic": "at byte 0: expected 'nix-archive-1', got 'nix-archive-2'",
    "html": "at byte 0: expected 'nix-archive-1', got '<html><body><h1>503 Service Unav'...",
    "empty": "cut short at byte 0",
}

NARINFOS = {
    "signature-form": "field Sig: signature 'test-1' is not of the form <key name>:<base 64>",
    "other-store-dir": "field StorePath: '/gnu/store/0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx-hello'"
    " is not a store path in /nix/store",
    "below-store-path": f"field StorePath: '{HELLO}/bin/hello' is not a store path in /nix/store",
    "bare-store-path": f"field StorePath: '{HELLO[11:]}' is not a store path in /nix/store",
    "store-path-hash": "field StorePath: hash part '0e0u0cixn1p4b9zslj1mlb1ckzh3cfzx' of"
    " '0e0u0cixn1p4b9zslj1mlb1ckzh3cfzx-hello' is not 32 characters of"
    " 0123456789abcdfghijklmnpqrsvwxyz",
    "empty-url": "field URL: empty",
    "url-dotdot": "field URL: 'nar/../../secret' has a segment '..' or unprintable characters",
    "url-dotdot-encoded": "field URL: 'nar/%2e%2e/%2e./secret' has a segment '..'"
    " or unprintable characters",
    "url-file": "field URL: 'file:///etc/shadow' is neither relative to the cache nor http or https",
    "url-absolute": "field URL: '/etc/shadow' is neither relative to the cache nor http or https",
    "nar-hash-md5": "field NarHash: 'md5:3y8bwfr609h3lh9ch0izcqq7fl' is md5, expected sha256",
    "nar-hash-short": "field NarHash: sha256 hash"
    " '0hc7x4mami1jj3iay66b0qs9lm2ipl1hhsckccbxcn882rk6f1s' has 51 characters,"
    " expected 64 (base 16), 52 (nix32), 44 (base 64)",
    "nar-hash-bare": "field NarHash: hash '0hc7x4mami1jj3iay66b0qs9lm2ipl1hhsckccbxcn882rk6f1s5'"
    " does not say its algorithm",
    "nar-size-zero": "field NarSize: 0, but no NAR is empty",
    "nar-size-negative": "field NarSize: '-480' is not a number of bytes"
    " from 0 to 9223372036854775807",
    "nar-size-huge": "field NarSize: '9223372036854775808' is not a number of bytes"
    " from 0 to 9223372036854775807",
    "full-reference": "field References: '/nix/store/3n58xw4373jp0ljirf06d8077j15pc4j-glibc-2.37'"
    " is not a store path's base name: expected 32 characters of hash, '-' and a name",
    "no-storepath": "field StorePath missing",
    "no-url": "field URL missing",
    "no-narhash": "field NarHash missing",
    "no-narsize": "field NarSize missing",
    "empty": "field StorePath and URL and NarHash and NarSize missing",
    "duplicate-field": "field NarHash comes twice",
    "cut-short": "the last line is cut short (no line feed at its end)",
    "no-space": "line 7 is 'NarSize:480', expected 'Name: value'",
    "carriage-returns": r"binary, character 60 is '\r'",
    "empty-line": "line 10 is '', expected 'Name: value'",
    "binary": "binary, byte 1 is not UTF-8",
    "nul": r"binary, character 324 is '\x00'",
    "html": "line 1 is '<html><body><h1>503 Service Unavailable</h1></body></html>',"
    " expected 'Name: value'",
}

UNTRUSTED = {
    "unsigned": "it is unsigned; it is not content-addressed",
    "wrong-signature": "the signature by trusted key 'test-1' is wrong; it is not content-addressed",
    "short-signature": "the signature by trusted key 'test-1' is wrong; it is not content-addressed",
    "other-references": "the signature by trusted key 'test-1' is wrong;"
    " it is not content-addressed",
    "foreign-signature": "it is only signed by 'foreign-1', not trusted;"
    " it is not content-addressed",
    "other-content-address": "it is only signed by 'foreign-1', not trusted; its content address"
    " 'fixed:r:sha256:0hc7x4mami1jj3iay66b0qs9lm2ipl1hhsckccbxcn882rk6f1s5'"
    " is of /nix/store/37nvj4njs484m2zs9qbyrfhw10802khy-hello",
}

CACHE_INFOS = {
    "no-store-dir": r"field StoreDir missing; it begins 'WantMassQuery: 1\nPriority: 40\n'",
    "empty-store-dir": r"field StoreDir missing; it begins 'StoreDir:\n'",
    "html": "field StoreDir missing; it begins '<html><body>Please log in: http://portal'...",
    "priority": "Priority is 'high', expected a number",
    "duplicate-field": "field 'StoreDir' comes twice",
    "binary": "binary, byte 21 is not UTF-8",
    "empty": "field StoreDir missing; it begins ''",
}


def test_assets_are_what_the_script_writes() -> None:
    committed = {path.name: path.read_bytes() for path in ASSETS.iterdir()}
    assert committed == make_nix_assets.assets()


def test_every_asset_has_its_test() -> None:
    tested = {f"nar-{name}.nar" for name in NARS}
    tested |= {f"narinfo-{name}.narinfo" for name in ("good", *NARINFOS, *UNTRUSTED)}
    tested |= {f"cache-info-{name}" for name in CACHE_INFOS}
    assert tested == {path.name for path in ASSETS.iterdir()}


def refusal_of_nar(data: bytes, step: int) -> str:
    parser = NarParser()
    with pytest.raises(InvalidData) as caught:
        for start in range(0, len(data), step):
            parser.receive_data(data[start : start + step])
            while not isinstance(parser.next_event(), NeedData):
                pass
        parser.close()
    return str(caught.value)


@pytest.mark.parametrize("name", NARS)
@pytest.mark.parametrize("step", [1, 50, 100_000])
def test_bad_archive_is_refused(name: str, step: int) -> None:
    data = (ASSETS / f"nar-{name}.nar").read_bytes()
    message = refusal_of_nar(data, step)
    # What the parser holds of a damaged string depends on the cut; the rest must not.
    expected = f"NAR: {NARS[name]}"
    if step < len(data) and ", got " in expected:
        message, expected = (text.partition(", got ")[0] for text in (message, expected))
    assert message == expected


def refusal(error: type[FusesnapError], name: str) -> str:
    with pytest.raises(FusesnapError) as caught:
        info = parse_narinfo((ASSETS / f"narinfo-{name}.narinfo").read_bytes(), StoreDir())
        check_trust(info, KEYS)
    assert type(caught.value) is error
    return str(caught.value)


@pytest.mark.parametrize("name", NARINFOS)
def test_bad_narinfo_is_refused(name: str) -> None:
    assert refusal(InvalidData, name) == f"narinfo: {NARINFOS[name]}"


@pytest.mark.parametrize("name", UNTRUSTED)
def test_narinfo_that_nobody_vouches_for_is_refused(name: str) -> None:
    assert refusal(UntrustedPath, name) == f"{HELLO} is not trusted: {UNTRUSTED[name]}"


def test_good_narinfo_is_trusted() -> None:
    data = (ASSETS / "narinfo-good.narinfo").read_bytes()
    info = parse_narinfo(data, StoreDir())
    check_trust(info, KEYS)
    assert info.to_text().encode() == data


@pytest.mark.parametrize("name", CACHE_INFOS)
def test_bad_cache_info_is_refused(name: str) -> None:
    with pytest.raises(InvalidData) as caught:
        parse_cache_info((ASSETS / f"cache-info-{name}").read_bytes())
    assert str(caught.value) == f"nix-cache-info: {CACHE_INFOS[name]}"
