"""Committed paths become valid, in Nix's sense, as soon as their closure is complete.

A path that cannot become valid yet waits for *one* of its references that is missing, and is looked at again when that
one has become valid; then it waits for the next one behind it, or becomes valid. So each commit touches its own
neighbourhood alone, and a path with thousands of references is not gone through in full for each of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from fusesnap.store.derivation import derivation_outputs
from fusesnap.store.nix_database import NixDatabase, Registrar
from fusesnap.store.state_database import Pin, StateDatabase
from fusesnap.store.storage_errors import storage
from fusesnap.store.store_entry import is_there

_DERIVATION_SUFFIX: Final = ".drv"
# The largest derivations of nixpkgs have a few MB; this many bytes surely hold the outputs, which come first.
_MAX_DERIVATION_SIZE: Final = 64 * 1024 * 1024


class Registration:
    """Registers paths of the store directory ``real`` in Nix's database."""

    def __init__(
        self, real: Path, state: StateDatabase, nix: NixDatabase, clock: Callable[[], float]
    ) -> None:
        self._real = real
        self._state = state
        self._nix = nix
        self._clock = clock

    def register(self, ordinals: Iterable[int]) -> int:
        """Register those of the committed paths ``ordinals`` that can be, and whoever waited for them.

        Returns how many became valid, all in one transaction. Raises :class:`StorageFailure`.
        """
        # Writers of Nix's database take turns, also between processes. Whoever has the turn sees every path that was
        # recorded and renamed before somebody's turn before, and every note that somebody waits; so of two processes
        # that commit a path and its reference at once, the later one registers both.
        with self._nix.registering() as registrar:
            turn = _Turn(self._real, self._state, registrar, int(self._clock()))
            turn.work(ordinals)
            self._state.set_waiting(turn.missing)
        # Only now: who is dropped from the waiting before that commit and then killed would wait for nobody.
        if turn.valid:
            self._state.clear_waiting(turn.valid)
        return turn.registered


class _Turn:
    """One transaction's work."""

    def __init__(self, real: Path, state: StateDatabase, registrar: Registrar, time: int) -> None:
        self._real = real
        self._state = state
        self._registrar = registrar
        self._time = time
        self._waiting: dict[str, list[int]] = {}  # by what is missing; not yet in the database
        self.missing: dict[int, str] = {}  # by who waits
        self.valid: set[int] = set()
        self.registered = 0

    def work(self, ordinals: Iterable[int]) -> None:
        queue = deque(ordinals)
        while queue:
            ordinal = queue.popleft()
            if ordinal not in self.valid:
                queue.extend(self._look_at(ordinal))

    def _look_at(self, ordinal: int) -> list[int]:
        """Make a path valid if it can be; return the ordinals of those to look at because it is."""
        name = self._state.recorded_name(ordinal)
        if name is None or not self._is_there(name):
            return []
        if not self._registrar.is_valid(name):
            missing = self._first_missing(ordinal, name)
            if missing is not None:
                self.missing[ordinal] = missing
                self._waiting.setdefault(missing, []).append(ordinal)
                return []
            self._register(ordinal)
        self.valid.add(ordinal)
        self.missing.pop(ordinal, None)
        return self._waiting.pop(name, []) + self._state.waiting_for(name)

    def _is_there(self, name: str) -> bool:
        with storage("look for", self._real / name):
            return is_there(self._real / name)

    def _first_missing(self, ordinal: int, name: str) -> str | None:
        def is_missing(reference: str) -> bool:
            return reference != name and not self._registrar.is_valid(reference)

        passed = self.missing.get(ordinal) or self._state.awaited_by(ordinal)
        if passed is not None:
            missing = passed if is_missing(passed) else None
            missing = missing or self._state.first_reference(ordinal, is_missing, after=passed)
            if missing is not None:
                return missing
        # What was passed by may have been collected as garbage since.
        return self._state.first_reference(ordinal, is_missing)

    def _register(self, ordinal: int) -> None:
        pin = self._state.pin_of(ordinal)
        if pin is not None:
            self._registrar.register(pin.info, self._time, self._outputs(pin))
            self.registered += 1

    def _outputs(self, pin: Pin) -> list[tuple[str, str]]:
        path = pin.info.store_path
        if not path.name.endswith(_DERIVATION_SUFFIX):
            return []
        location = self._real / path.base_name
        with storage("read", location):
            if location.is_symlink() or not location.is_file():
                return []
            with location.open("rb") as file:
                return derivation_outputs(file.read(_MAX_DERIVATION_SIZE))
