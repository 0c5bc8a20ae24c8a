"""The text of a trace: one way to write it, and nothing else is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from fusesnap.errors import InvalidData, UntrustedPath
from fusesnap.nix.signature import SecretKey, TrustedKeys
from fusesnap.nix.startup_trace import Circumstances, Ending, Flaw, Lack, StartupTrace
from fusesnap.nix.startup_trace_text import (
    MAX_TRACE_SIZE,
    check_trace_trust,
    format_trace,
    parse_trace,
    sign_trace,
)

from .traces import GLIBC, HELLO, NAR, example, traces

SEED = SigningKey(bytes(32))
KEY = SecretKey("test-1", bytes(SEED) + bytes(SEED.verify_key))
OTHER_SEED = SigningKey(bytes([1]) * 32)
OTHER = SecretKey("other-1", bytes(OTHER_SEED) + bytes(OTHER_SEED.verify_key))
TRUSTED = TrustedKeys((KEY.public_key(),))

TEXT = f"""\
fusesnap-trace 1
Closure: {"5" * 64}
Recorded: 1790000000
Version: 0.1.0
Starts: 1
Readahead: 0
Ended: idle

path 0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx-hello {NAR}
file 2 100000 bin/hello
read 0 32768
path 11111111111111111111111111111111-glibc-2.39 {NAR}
file 7 2000000 lib/libc.so.6
read 0 16384
path 0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx-hello
file 2 100000 bin/hello
read 98304 1696
path zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz-data.json {NAR}
"""


def test_this_is_how_it_looks() -> None:
    assert format_trace(example()).decode() == TEXT


def test_what_is_missing_is_said() -> None:
    said = Circumstances(
        1,
        "0.2",
        3,
        16384,
        Ending.SIZE,
        frozenset({Flaw.SHARED}),
        ((HELLO, Lack.CACHED), (GLIBC, Lack.COMMITTED)),
    )
    assert format_trace(replace(example(), circumstances=said)).decode().split("\n")[2:10] == [
        "Recorded: 1",
        "Version: 0.2",
        "Starts: 3",
        "Readahead: 16384",
        "Ended: size",
        "Flaw: shared",
        f"Lacks: cached {HELLO}",
        f"Lacks: committed {GLIBC}",
    ]


@given(traces(), st.booleans())
def test_what_is_written_is_read(trace: StartupTrace, signed: bool) -> None:
    if signed:
        trace = sign_trace(sign_trace(trace, KEY), OTHER)
    assert parse_trace(format_trace(trace)) == trace


@given(traces(), st.data())
def test_a_changed_byte_is_refused_or_breaks_the_signature(
    trace: StartupTrace, data: st.DataObject
) -> None:
    text = bytearray(format_trace(sign_trace(trace, KEY)))
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises((InvalidData, UntrustedPath)):
        check_trace_trust(parse_trace(bytes(text)), TRUSTED)


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda end: TEXT.encode() + end))
def test_anything_may_come(data: bytes) -> None:
    try:
        assert format_trace(parse_trace(data)) == data
    except InvalidData as error:
        assert str(error).startswith("startup trace")


WRONG = {
    "expected 'fusesnap-trace 1'": ("fusesnap-trace 1", "fusesnap-trace 2"),
    "line 2: digest of a closure": ("Closure: 5", "Closure: x"),
    "line 3: '01' is not a decimal": ("Recorded: 1790000000", "Recorded: 01"),
    "line 3: expected field Recorded": ("Recorded", "recorded"),
    "line 7: expected a word that is known, got 'Ended: never'": ("Ended: idle", "Ended: never"),
    "line 8: expected an empty line": ("idle\n\npath", "idle\nX: y\n\npath"),
    "line 10: expected 'file <entry>": ("file 2 100000 bin", "file 2 100000  bin"),
    "line 10: 'bin/h%6' is not a name": ("bin/hello\nread 0", "bin/h%6\nread 0"),
    "line 9: expected 'path', or": (
        "path 0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx-hello sha256:",
        "patch x:",
    ),
    "line 10: expected 'path', or": ("file 2 100000 bin/hello\nread 0", "read 0"),
    "line 11: expected 'read <offset>": ("read 0 32768", "read 0"),
    "line 16: expected entry 2 as it was": (
        "file 2 100000 bin/hello\nread 98304",
        "file 2 100000 bin/hi\nread 98304",
    ),
    "not written as a trace is": ("file 7 2000000 lib/libc", "file 7 2000000 lib/l%69bc"),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_line_is_named(said: str) -> None:
    before, after = WRONG[said]
    assert before in TEXT
    with pytest.raises(InvalidData, match=said.replace("(", r"\(")):
        parse_trace(TEXT.replace(before, after, 1).encode())


def test_other_ends_are_refused() -> None:
    for text in (TEXT[:-1], TEXT + "\n", TEXT + "\nSig: test-1:AAAA\n\n", TEXT + "\nSig: x\n"):
        with pytest.raises(InvalidData):
            parse_trace(text.encode())
    with pytest.raises(InvalidData, match="at most 8388608"):
        parse_trace(b"x" * (MAX_TRACE_SIZE + 1))


def test_only_a_trusted_key_vouches() -> None:
    trace = example()
    with pytest.raises(UntrustedPath, match="it is unsigned"):
        check_trace_trust(trace, TRUSTED)
    with pytest.raises(UntrustedPath, match="signed by 'other-1', not by a trusted key"):
        check_trace_trust(sign_trace(trace, OTHER), TRUSTED)
    signed = sign_trace(sign_trace(trace, OTHER), KEY)
    check_trace_trust(parse_trace(format_trace(signed)), TRUSTED)
    forged = replace(signed, circumstances=replace(trace.circumstances, starts=2))
    with pytest.raises(UntrustedPath):
        check_trace_trust(forged, TRUSTED)
    assert len(sign_trace(signed, KEY).signatures) == 2
