"""How processes that unpack are started, so early that they load while whoever starts them does.

What is imported here is therefore little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

from fusesnap.config import Settings
from fusesnap.errors import StorageFailure
from fusesnap.fetch.unpack_start import StartedProcess
from fusesnap.load import command_of

# Seconds for which a path may wait for others to be committed with, where no reader is who would wait for it.
LINGER: Final = 0.1


def make_root(settings: Settings) -> None:
    """Make the state directory, where there is none. Raises ``StorageFailure``."""
    try:
        settings.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFailure(
            f"{settings.root}: cannot be used as state directory: {error.strerror}",
            error.errno or 0,
        ) from error


def unpack_command(settings: Settings, linger: float = 0.0) -> list[str]:
    """How a process that unpacks is started; the descriptor of its stream is appended. ``linger``: its argument."""
    root, store_dir = str(settings.root), settings.store_dir
    return command_of("fusesnap.daemon.unpack_worker", root, store_dir, str(linger))


@contextmanager
def started_unpackers(settings: Settings, linger: float) -> Iterator[Sequence[StartedProcess]]:
    """All processes that the settings ask for, which end with the block at the latest. Raises ``StorageFailure``."""
    make_root(settings)
    with ExitStack() as ends:
        started = []
        for _ in range(settings.fetch.unpackers):
            started.append(StartedProcess(unpack_command(settings, linger)))
            ends.callback(started[-1].end)
        yield started
