"""A process that unpacks: started as ``python -m fusesnap.daemon.unpack_worker STATE STORE_DIR [LINGER] STREAM``.

LINGER is for how many seconds a path that nobody waits for may wait for others to be committed with. STREAM is the
descriptor of a connected stream socket, see ``fetch.unpack_frames``.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from fusesnap.daemon.logs import explained, log_to_stderr
from fusesnap.daemon.niceness import behind_readers
from fusesnap.fetch.unpack_server import UnpackServer
from fusesnap.nix.store_path import StoreDir
from fusesnap.store.local_store import LocalStore


def main() -> None:
    """Run until the stream is closed."""
    state, store_dir, *options, stream = sys.argv[1:]
    linger = options[0] if options else "0"
    # Ctrl-C at a terminal reaches the whole process group: whoever started us decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log_to_stderr()
    if not float(linger):
        behind_readers()
    with (
        explained("unpack process"),
        socket.socket(fileno=int(stream)) as connection,
        LocalStore.open(Path(state), StoreDir(store_dir), clock=time.time) as store,
        # Whoever started us is gone: there is nobody to tell, and nothing left to do.
        suppress(BrokenPipeError, ConnectionResetError),
    ):
        UnpackServer(connection, store, float(linger)).run()


if __name__ == "__main__":
    main()
