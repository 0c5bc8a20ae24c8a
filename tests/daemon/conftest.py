"""What fetches, as the tests of ``fetch`` have it."""

from __future__ import annotations

from ..fetch.conftest import cache, make_node

__all__ = ["cache", "make_node"]
