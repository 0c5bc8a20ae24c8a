"""A process that unpacks: started as ``python -m fusesnap.daemon.unpack_worker STATE STORE_DIR [LINGER] STREAM``.

LINGER is for how many seconds a path that nobody waits for may wait for others to be committed with. STREAM is the
descriptor of a connected stream socket, see ``fetch.unpack_frames``.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from fusesnap.daemon.logs import log_to_stderr
from fusesnap.fetch.unpack_server import UnpackServer
from fusesnap.nix.store_path import StoreDir
from fusesnap.store.local_store import LocalStore

# How much nicer it is than the loop that answers readers, where there are any. On two busy cores the median answer
# while a NAR of 300 MB is unpacked comes in 0.25 ms with it, in 1.4 to 3.5 ms without (scripts/bench latency).
BEHIND_READERS = 5


def main() -> None:
    """Run until the stream is closed."""
    state, store_dir, *options, stream = sys.argv[1:]
    linger = options[0] if options else "0"
    # Ctrl-C at a terminal reaches the whole process group: whoever started us decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log_to_stderr()
    if not float(linger):
        os.nice(BEHIND_READERS)
    with (
        socket.socket(fileno=int(stream)) as connection,
        LocalStore.open(Path(state), StoreDir(store_dir), clock=time.time) as store,
        # Whoever started us is gone: there is nobody to tell, and nothing left to do.
        suppress(BrokenPipeError, ConnectionResetError),
    ):
        UnpackServer(connection, store, float(linger)).run()


if __name__ == "__main__":
    main()
