"""The ``fusesnap`` command."""

from __future__ import annotations

import sys

import click

from fusesnap.cli.cancel import cancel
from fusesnap.cli.completion import completion
from fusesnap.cli.daemon import daemon
from fusesnap.cli.doctor import doctor
from fusesnap.cli.image import image
from fusesnap.cli.mount import mount
from fusesnap.cli.prefetch import prefetch
from fusesnap.cli.publish import publish
from fusesnap.cli.start_report import start_report
from fusesnap.cli.status import status
from fusesnap.cli.store import store
from fusesnap.cli.trace import trace
from fusesnap.errors import FusesnapError
from fusesnap.exit_codes import exit_code, table

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


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fusesnap", prog_name="fusesnap")
def cli() -> None:
    """Start containers of Nix packages at once, and fetch what they read.

    fusesnap shows a file system whose /nix/store entries are fetched from a binary cache at the first access, verified
    against a trusted key, and kept in a local store. Nothing is ever shown unverified.
    """


for command in (
    daemon,
    mount,
    image,
    prefetch,
    publish,
    status,
    start_report,
    cancel,
    store,
    trace,
    doctor,
    completion,
):
    cli.add_command(command)


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
