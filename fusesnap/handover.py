"""What one supervisor leaves to the next, in a memory file: over exec at a reload, through systemd at a restart."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fusesnap.fuse_mount import Connection, mounts
from fusesnap.systemd import FUSE, STATE, stored

VARIABLE = "FUSESNAP_HANDOVER"  # names the descriptor over exec


@dataclass
class Handover:
    """The connection and, over exec, what belongs to the process: descriptors, and children as id and line."""

    init_request: str  # hexadecimal, as are the requests below
    device: str
    relayed: bool
    orderly: bool = True  # written at the end of a supervisor, not at its beginning
    pending: list[str] = field(default_factory=list)
    unsent: list[str] = field(default_factory=list)
    generation: int = 0
    fuse: int = -1
    lock: int = -1
    relay: int = -1
    children: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def connection(self) -> Connection:
        """The connection."""
        return Connection(self.fuse, bytes.fromhex(self.init_request), self.device)

    def write(self, memory: int) -> None:
        """Replace what the memory file holds."""
        data = json.dumps(asdict(self)).encode()
        os.truncate(memory, 0)
        os.pwrite(memory, data, 0)

    @classmethod
    def read(cls, memory: int) -> Handover:
        """What the memory file holds. Keys that another version wrote and this one does not know are left aside."""
        values: dict[str, Any] = json.loads(os.pread(memory, os.fstat(memory).st_size, 0))
        known = {key: value for key, value in values.items() if key in cls.__dataclass_fields__}
        return cls(**known)

    def keep_over_exec(self) -> None:
        """Leave the descriptors open for the program that follows, and name this in its environment."""
        memory = os.memfd_create("fusesnap-handover")
        self.write(memory)
        lines = (line for _, line in self.children.values())
        for descriptor in (memory, self.fuse, self.lock, self.relay, *lines):
            if descriptor >= 0:
                os.set_inheritable(descriptor, True)
        os.environ[VARIABLE] = str(memory)


def received() -> Handover | None:
    """What the program before this one in the same process has left."""
    number = os.environ.pop(VARIABLE, None)
    if number is None:
        return None
    handover = Handover.read(int(number))
    os.close(int(number))
    lines = (line for _, line in handover.children.values())
    for descriptor in (handover.fuse, handover.lock, handover.relay, *lines):
        if descriptor >= 0:
            os.set_inheritable(descriptor, False)
    return handover


def kept(mountpoint: Path) -> Handover | None:
    """What the service manager has kept while no daemon ran, if it still is what is mounted there."""
    descriptors = stored(os.environ)
    if FUSE in descriptors and STATE in descriptors:
        state = Handover.read(descriptors[STATE])
        state.fuse = descriptors[FUSE]
        connection = state.connection
        mounted = mounts().get(str(mountpoint)) == state.device and not connection.lost
        # What a killed supervisor had taken, nobody knows: where the kernel cannot tell, readers would wait for ever.
        if mounted and (state.orderly or connection.can_resend):
            os.close(descriptors[STATE])
            return state
    for descriptor in descriptors.values():
        os.close(descriptor)
    return None
