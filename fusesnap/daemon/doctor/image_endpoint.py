"""Whether a kubelet that has our socket as its image endpoint would get images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fusesnap.config import Settings
from fusesnap.daemon.doctor.findings import Finding, doubtful, well
from fusesnap.errors import FusesnapError
from fusesnap.services.containerd_client import ask_image_file_systems

_SUBJECT = "image endpoint"


def examine_image_endpoint(
    settings: Settings,
    address: Path,
    ask: Callable[[Path], tuple[str, ...]] = ask_image_file_systems,
) -> Finding:
    """Ask the daemon with ``settings`` what it hands on to containerd, which is at ``address``.

    Doubtful at most: nobody needs it for images of a registry.
    """
    socket = settings.socket.absolute()
    try:
        ask(socket)
    except FusesnapError as error:
        return doubtful(_SUBJECT, f"unix://{socket}: {error}", _mend(settings, address))
    return well(_SUBJECT, f"unix://{socket} has images of store paths, and all that containerd has")


def _mend(settings: Settings, address: Path) -> str:
    if settings.containerd_address != address:
        return f'containerd-address = "{address}" in the daemon\'s configuration, and fusesnap daemon reload'
    return (
        "fusesnap daemon, and see its log; for store paths as images of pods, nothing else needs it"
    )
