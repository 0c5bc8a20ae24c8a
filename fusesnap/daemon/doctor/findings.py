"""What an examination finds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from fusesnap.errors import FusesnapError
from fusesnap.exit_codes import exit_code

# sysexits.h, as fusesnap.exit_codes has them.
UNAVAILABLE, DISK, NO_PERMISSION, CONFIGURATION = 69, 74, 77, 78


class Level(StrEnum):
    """How grave it is: all is well; it works, but not as well as it could; it does not work."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: of what, how grave, what was found, and what to do about it (empty if all is well).

    ``status`` is the exit code of an examination in which this is the first failure.
    """

    subject: str
    level: Level
    said: str
    mend: str = ""
    status: int = 0


def well(subject: str, said: str) -> Finding:
    """All is well."""
    return Finding(subject, Level.OK, said)


def doubtful(subject: str, said: str, mend: str) -> Finding:
    """It works, but not as well as it could, or it could not be found out."""
    return Finding(subject, Level.WARNING, said, mend)


def failing(subject: str, said: str, mend: str, status: int) -> Finding:
    """It does not work."""
    return Finding(subject, Level.FAILURE, said, mend, status)


class Findings(list[Finding]):
    """Findings as they come."""

    @contextmanager
    def instead_of_error(self, subject: str, mend: str) -> Iterator[None]:
        """An error that ends the block becomes a failure."""
        try:
            yield
        except FusesnapError as error:
            self.append(failing(subject, str(error), mend, exit_code(error)))
        except OSError as error:
            said = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
            self.append(failing(subject, said, mend, DISK))
