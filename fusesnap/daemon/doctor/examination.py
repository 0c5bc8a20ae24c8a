"""The whole examination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusesnap.config import DEFAULT_ROOT, Fetch, Settings
from fusesnap.daemon.doctor.builder import examine_builder
from fusesnap.daemon.doctor.caches import examine_caches
from fusesnap.daemon.doctor.containerd import IdMapping, Where, examine_containerd
from fusesnap.daemon.doctor.findings import CONFIGURATION, Finding, Level, failing
from fusesnap.daemon.doctor.machine import examine_machine
from fusesnap.daemon.doctor.state import examine_state
from fusesnap.errors import InvalidConfiguration


@dataclass(frozen=True, slots=True)
class Section:
    """What was found in one place."""

    title: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Examination:
    """All that was found, in order."""

    sections: tuple[Section, ...]

    @property
    def status(self) -> int:
        """The exit code: that of the first failure, 0 if there is none."""
        return next((each.status for each in self._all() if each.level is Level.FAILURE), 0)

    def count(self, level: Level) -> int:
        """How many findings are so grave."""
        return sum(each.level is level for each in self._all())

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        findings = [
            {
                "section": section.title,
                "subject": each.subject,
                "level": each.level.value,
                "said": each.said,
                "mend": each.mend,
            }
            for section in self.sections
            for each in section.findings
        ]
        return {"status": self.status, "findings": findings}

    def _all(self) -> list[Finding]:
        return [each for section in self.sections for each in section.findings]


def examine(
    settings: Settings, where: Where, *, sample: str | None, idmapping: IdMapping | None = None
) -> Examination:
    """Look at everything; ``sample`` is a store path that the caches are asked for."""
    stall = settings.fetch.stall_timeout
    return Examination(
        (
            Section("machine", tuple(examine_machine(settings.root, stall))),
            Section("state", (*examine_state(settings), *examine_builder(settings))),
            Section("caches", tuple(examine_caches(settings, sample))),
            Section("containerd", tuple(examine_containerd(settings, where, idmapping))),
        )
    )


def examine_without(error: InvalidConfiguration) -> Examination:
    """Look at what can be looked at without usable settings."""
    wrong = [
        failing("configuration", line, "correct it: the README has all keys", CONFIGURATION)
        for line in str(error).splitlines()
    ]
    machine = examine_machine(DEFAULT_ROOT, Fetch().stall_timeout)
    return Examination((Section("settings", tuple(wrong)), Section("machine", tuple(machine))))
