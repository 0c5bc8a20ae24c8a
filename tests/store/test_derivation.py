from __future__ import annotations

import pytest

from fusesnap.store.derivation import derivation_outputs

OUT = b'("out","/nix/store/a-out","","")'
FIXED = b'("dev","/nix/store/a-dev","r:sha256","00ff")'
UNKNOWN = b'("doc","","r:sha256","")'
REST = b',[],[],"x86_64-linux","/bin/sh",[],[("out","/nix/store/a-out")])'


@pytest.mark.parametrize(
    ("data", "outputs"),
    [
        (b"Derive([" + OUT + b"]" + REST, [("out", "/nix/store/a-out")]),
        (
            b"Derive([" + FIXED + b"," + UNKNOWN + b"," + OUT + b"]" + REST,
            [("dev", "/nix/store/a-dev"), ("out", "/nix/store/a-out")],
        ),
        (b"Derive([]" + REST, []),
        (b"Derive([" + OUT[:-3], []),
        (b"", []),
        (b"no derivation", []),
        (OUT, []),
    ],
)
def test_outputs(data: bytes, outputs: list[tuple[str, str]]) -> None:
    assert derivation_outputs(data) == outputs
