"""One pass over a NAR: decompressed, hashed, counted, parsed, checked and written to staging."""

from __future__ import annotations

from fusesnap.errors import ContentMismatch
from fusesnap.nix.compression import decompressor
from fusesnap.nix.nar import NEED_DATA, NarEnd, NarParser
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.trust import content_address_check
from fusesnap.store.staging import StagedPath


class Unpacker:
    """Feeds one compressed NAR into staging and vouches for it.

    Blocking and CPU-bound: called from a worker thread. Nothing that it wrote may become visible before
    :meth:`finish` has returned. Raises ``InvalidData`` for what is no NAR, ``ContentMismatch`` for a NAR that is not
    the one announced, ``StorageFailure`` where the disk refuses.
    """

    def __init__(self, info: NarInfo, staged: StagedPath) -> None:
        self._info = info
        self._staged = staged
        self._decompressor = decompressor(info.compression)
        self._hash = info.nar_hash.algorithm.new()
        self._size = 0
        self._parser = NarParser()
        self._content_address = content_address_check(info)

    def feed(self, compressed: bytes) -> None:
        """The next bytes as the cache stores them."""
        for piece in self._decompressor.decompress(compressed):
            self._receive(piece)

    def _receive(self, piece: bytes) -> None:
        self._size += len(piece)
        # Checked before a byte is written: a bomb must not fill the disk first.
        if self._size > self._info.nar_size:
            raise ContentMismatch(
                f"{self._info.store_path}: its NAR is longer than the {self._info.nar_size} bytes announced"
            )
        self._hash.update(piece)
        if self._content_address is not None:
            self._content_address.receive_nar(piece)
        self._parser.receive_data(piece)
        self._drain()

    def _drain(self) -> None:
        while (event := self._parser.next_event()) is not NEED_DATA:
            if self._content_address is not None:
                self._content_address.receive(event)
            self._staged.receive(event)
            if isinstance(event, NarEnd):
                return

    def finish(self) -> None:
        """Return when the NAR was whole and is exactly the one announced."""
        info = self._info
        self._decompressor.finish()
        self._parser.close()
        if self._size != info.nar_size:
            raise ContentMismatch(
                f"{info.store_path}: its NAR has {self._size} bytes, {info.nar_size} were announced"
            )
        if self._hash.digest() != info.nar_hash.digest:
            found = type(info.nar_hash)(info.nar_hash.algorithm, self._hash.digest())
            raise ContentMismatch(
                f"{info.store_path}: its NAR hashes to {found}, {info.nar_hash} was announced"
            )
        if self._content_address is not None:
            self._content_address.finish()
