"""Commands are imported one by one."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from importlib import import_module

import click
import pytest
from click.testing import CliRunner

import fusesnap.cli
from fusesnap.cli.app import NAMES, Commands, cli


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_found_under_its_own_name(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: cli {name} ")


def test_no_command_is_forgotten() -> None:
    written = set()
    for module in pkgutil.iter_modules(fusesnap.cli.__path__):
        command = getattr(import_module(f"fusesnap.cli.{module.name}"), module.name, None)
        if isinstance(command, click.Command):
            written.add(command.name)
    assert written == set(NAMES)


def test_what_is_no_command_is_none_even_where_a_module_has_its_name() -> None:
    context = click.Context(cli)
    assert isinstance(cli, Commands)
    assert cli.get_command(context, "options") is None


def test_to_fetch_store_paths_neither_grpc_nor_the_formats_of_images_are_imported() -> None:
    program = "import fusesnap.cli.prefetch, fusesnap.daemon.prefetch, sys; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "fusesnap.fetch.realiser" in modules
    assert not {"grpc", "fusesnap.images.documents", "fusesnap.cli.trace"} & set(modules)
