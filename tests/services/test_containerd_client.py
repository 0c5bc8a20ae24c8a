"""Asking a containerd; that a real one answers is in tests/e2e."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusesnap.errors import Unavailable
from fusesnap.services.containerd_client import ask_plugins, ask_version


def test_nobody_answers(tmp_path: Path) -> None:
    for ask in (ask_version, ask_plugins):
        with pytest.raises(Unavailable, match=str(tmp_path / "none.sock")):
            ask(tmp_path / "none.sock")
