"""Where things are in a state directory, and which directories are there from the start."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlencode

from fusesnap.nix.store_path import StoreDir
from fusesnap.store.storage_errors import storage

# DESIGN section 3: the store directory must not be merged with a directory of that name in a layer below, because an
# absolute redirect is looked up in every lower layer.
OPAQUE_NAME: Final = "trusted.overlay.opaque"
OPAQUE_VALUE: Final = b"y"

# Others may reach a container's files through the state directory only if they know the way, and may not list it.
_STATE_MODE: Final = 0o711
_STAGING_MODE: Final = 0o700
_NOT_ALLOWED: Final = (errno.EPERM, errno.EACCES, errno.ENOTSUP)


@dataclass(frozen=True, slots=True)
class StateLayout:
    """The parts of the state directory that belong to the local store."""

    state: Path

    @property
    def layer(self) -> Path:
        """The overlay layer that holds nothing but the store directory."""
        return self.state / "layer"

    @property
    def real(self) -> Path:
        """The store directory: committed paths, one entry each (Nix's store URL calls it ``real``)."""
        return self.layer / ".fusesnap-store"

    @property
    def nix(self) -> Path:
        """Nix's state directory."""
        return self.state / "nix"

    @property
    def nix_log(self) -> Path:
        """Where Nix would write build logs."""
        return self.state / "log"

    @property
    def database(self) -> Path:
        """Our own database."""
        return self.state / "fusesnap.sqlite"

    @property
    def partial(self) -> Path:
        """NARs of which parts are here."""
        return self.state / "partial"

    @property
    def staging(self) -> Path:
        """What is being unpacked, a directory each."""
        return self.state / "staging"

    @property
    def ballast(self) -> Path:
        """What is given away on a full disk."""
        return self.state / "ballast"

    @property
    def reserved(self) -> Path:
        """What processes have reserved for paths on their way, a file each."""
        return self.state / "reserved"

    def nix_url(self, store_dir: StoreDir) -> str:
        """Return the URL under which real Nix opens this store."""
        query = {"store": store_dir.path, "real": self.real, "state": self.nix, "log": self.nix_log}
        return "local?" + urlencode(query, quote_via=quote, safe="/")

    def create(self) -> bool:
        """Create what is missing; return whether the store directory is opaque to overlay file systems.

        It is not where this process may not set ``trusted`` attributes, as an ordinary user or on a file system
        without them. Raises :class:`StorageFailure`.
        """
        with storage("create the state directory", self.state):
            self.state.mkdir(mode=_STATE_MODE, parents=True, exist_ok=True)
            self.real.mkdir(parents=True, exist_ok=True)
            self.staging.mkdir(mode=_STAGING_MODE, exist_ok=True)
            self._create_nix_directories()
        return self._make_opaque()

    def _create_nix_directories(self) -> None:
        """Create what Nix creates in a new state directory (``LocalStore::LocalStore``)."""
        for name in ("db", "temproots", "profiles"):
            (self.nix / name).mkdir(parents=True, exist_ok=True)
        roots = self.nix / "gcroots"
        roots.mkdir(exist_ok=True)
        with suppress(FileExistsError):
            (roots / "profiles").symlink_to(self.nix / "profiles")

    def _make_opaque(self) -> bool:
        with storage(f"set {OPAQUE_NAME} on", self.real):
            try:
                os.setxattr(self.real, OPAQUE_NAME, OPAQUE_VALUE)
            except OSError as error:
                if error.errno not in _NOT_ALLOWED:
                    raise
                return False
        return True
