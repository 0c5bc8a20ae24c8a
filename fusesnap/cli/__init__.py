"""The command line: options in, words and exit codes out."""

from fusesnap.cli.app import main

__all__ = ["main"]
