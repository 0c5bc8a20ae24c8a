"""Which programs a container of an image may run."""

from __future__ import annotations

import pytest

from fusesnap.images.run_config import MAX_WORDS, RunConfig

PATH = {"PATH": "/nix/store/a/bin:relative:/bin"}


@pytest.mark.parametrize(
    ("config", "programs"),
    [
        (RunConfig(), ()),
        (RunConfig(command=("/bin/x", "-v")), (("/bin/x",), ("/nix/store/a/bin/-v", "/bin/-v"))),
        (
            RunConfig(("bash",), ("-c", "ls -l|/opt/sort")),
            (
                ("/nix/store/a/bin/bash", "/bin/bash"),
                ("/nix/store/a/bin/-c", "/bin/-c"),
                ("/nix/store/a/bin/ls", "/bin/ls"),
                ("/nix/store/a/bin/-l", "/bin/-l"),
                ("/opt/sort",),
            ),
        ),
        (RunConfig(("./bash",), ("bash",)), (("/nix/store/a/bin/bash", "/bin/bash"),)),
    ],
)
def test_programs_are_looked_for_as_a_shell_does(
    config: RunConfig, programs: tuple[tuple[str, ...], ...]
) -> None:
    assert RunConfig(config.entrypoint, config.command, PATH).programs == programs


def test_without_a_path_only_absolute_names_are_anywhere() -> None:
    assert RunConfig(("bash", "/x")).programs == (("/x",),)


def test_a_long_script_is_not_looked_through() -> None:
    words = " ".join(f"word{number}" for number in range(10 * MAX_WORDS))
    found = RunConfig(("sh", "-c", words), environment=PATH).programs
    assert len(found) == 1 + MAX_WORDS
