"""The ``fusesnap`` command."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from fusesnap.errors import FusesnapError
from fusesnap.exit_codes import exit_code, table
from fusesnap.load import for_good

EPILOG = f"""\b
A first success, without containers:
  mkdir /tmp/hello
  fusesnap mount /nix/store/<hash>-hello-2.12 /tmp/hello &
  ls /tmp/hello/nix/store

\b
Exit codes:
  0   done
  1   an error without a number of its own
  2   the command line cannot be understood
{table()}
"""


NAMES = (
    "cancel",
    "completion",
    "daemon",
    "doctor",
    "image",
    "mount",
    "prefetch",
    "publish",
    "start-report",
    "status",
    "store",
    "trace",
)


class Commands(click.Group):
    """Imports a command when it is asked for: all of them take longer than some that people wait for."""

    def list_commands(self, context: click.Context) -> list[str]:
        """All names, sorted as click sorts them."""
        return list(NAMES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command of a name: each module has one, and is called as it is."""
        if name not in NAMES:
            return None
        word = name.replace("-", "_")
        with for_good():
            command: click.Command = getattr(import_module(f"fusesnap.cli.{word}"), word)
        return command


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fusesnap", prog_name="fusesnap")
def cli() -> None:
    """Start containers of Nix packages at once, and fetch what they read.

    fusesnap shows a file system whose /nix/store entries are fetched from a binary cache at the first access, verified
    against a trusted key, and kept in a local store. Nothing is ever shown unverified.
    """


def main() -> None:
    """Run, and turn what went wrong into a message on stderr and an exit code."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except FusesnapError as error:
        complain(error)
        sys.exit(exit_code(error))


def complain(error: FusesnapError) -> None:
    """Say what went wrong; red only on a terminal, which click finds out."""
    for line in str(error).splitlines() or [type(error).__name__]:
        click.echo(click.style("error: ", fg="red", bold=True) + line, err=True)


if __name__ == "__main__":
    main()
