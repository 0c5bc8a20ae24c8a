"""Commands of ours in this process: to start a new one takes longer than most of them."""

from __future__ import annotations

from collections.abc import Mapping

from click.testing import CliRunner
from testbed.processes import CommandFailed

from fusesnap.cli.app import cli
from fusesnap.errors import FusesnapError
from fusesnap.exit_codes import exit_code


def fusesnap(*words: object, environment: Mapping[str, str] | None = None) -> str:
    """Run a command and return what it says on both streams. Raises CommandFailed with exit code and message."""
    done = CliRunner().invoke(cli, [str(word) for word in words], env=environment or {})
    if isinstance(done.exception, FusesnapError):
        raise CommandFailed(f"{exit_code(done.exception)}: {done.exception}") from done.exception
    if done.exception is not None:
        raise done.exception
    return done.output
