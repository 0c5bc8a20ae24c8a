"""What the configuration has fetched ahead or built: whether its words mean something."""

from __future__ import annotations

import shutil

from fusesnap.config import Settings
from fusesnap.daemon.doctor.findings import CONFIGURATION, Finding, Findings, failing, well
from fusesnap.errors import InvalidArgument
from fusesnap.images.reference import parse_reference
from fusesnap.nix.store_path import StoreDir
from fusesnap.registry.reference import parse_registry_reference


def examine_builder(settings: Settings) -> list[Finding]:
    """The tables ``[builder]`` and ``[preload]``; nothing is said of one that is empty."""
    findings = Findings()
    command = settings.builder.command
    if command:
        findings.append(_program(command[0]))
    wrong = [said for name in settings.preload.paths if (said := _fault(name, settings))]
    for said in wrong:
        mend = "write a store path, nix:0 and one behind it, or an image's name in containerd"
        findings.append(failing("preload", said, mend, CONFIGURATION))
    if settings.preload.paths and not wrong:
        count = len(settings.preload.paths)
        findings.append(well("preload", f"{count} {'name' if count == 1 else 'names'}"))
    return findings


def _program(name: str) -> Finding:
    found = shutil.which(name)
    if found is None:
        mend = "install it, or name another in builder.command"
        return failing("builder", f"{name}: no such program", mend, CONFIGURATION)
    return well("builder", f"{found} is run for a path that no cache has")


def _fault(name: str, settings: Settings) -> str | None:
    store_dir = StoreDir(settings.store_dir)
    text = f"nix:0{name}" if name.startswith(f"{store_dir}/") else name
    try:
        if parse_reference(text, store_dir) is None and not name.startswith(("/", "./")):
            parse_registry_reference(name)
    except InvalidArgument as error:
        return f"{name}: {error}"
    return None
