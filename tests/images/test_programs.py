from __future__ import annotations

import pytest

from fusesnap.errors import InvalidData, PathNotFound
from fusesnap.images.programs import (
    ProgramFinder,
    Programs,
    main_program,
    package_name,
    why_none,
)
from fusesnap.nix.nar import NarEnd
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import Tree, TreeBuilder

from ..store import conftest as made

X = (b"#!",)


def path(name: str) -> StorePath:
    return made.path_named(name)


def full(name: str) -> str:
    return StoreDir().format(path(name))


class Closure:
    """Trees by name; ``realised`` are the names that were asked for."""

    def __init__(self, trees: dict[str, made.Tree]) -> None:
        self._trees = {path(name): tree for name, tree in trees.items()}
        self.realised: set[str] = set()

    async def tree_of(self, wanted: StorePath) -> Tree:
        self.realised.add(wanted.name)
        builder = TreeBuilder()
        for event in (*made.tree_events(self._trees[wanted]), NarEnd()):
            builder.receive(event)
        return builder.tree()

    async def find(self, name: str) -> Programs:
        finder = ProgramFinder(self._trees.keys(), self.tree_of, StoreDir())
        return await finder.find(path(name))


async def test_programs_are_executable_files_that_show() -> None:
    tree: made.Tree = {
        "bin": {"b": X, "a": X, "README": b"", ".a-wrapped": X, "directory": {}, "a\nb": X}
    }
    found = await Closure({"p": tree}).find("p")
    assert found == Programs(f"{full('p')}/bin", ("a", "b"))


async def test_links_within_the_package() -> None:
    tree: made.Tree = {
        "bin": {
            "real": X,
            "alias": "real",
            "chain": "alias",
            "up": "../libexec/tool",
            "absolute": f"{full('p')}/libexec/tool",
            "data": "../share/data",
            "nowhere": "missing",
            "round": "round",
            "out": "../../../../etc/passwd",
            "host": "/usr/bin/env",
        },
        "libexec": {"tool": X},
        "share": {"data": b"x"},
    }
    found = await Closure({"p": tree}).find("p")
    assert found.names == ("absolute", "alias", "chain", "real", "up")


async def test_programs_of_other_paths_are_taken_without_a_look() -> None:
    closure = Closure(
        {
            "env": {
                "bin": {
                    "near": f"../../{path('tools').base_name}/bin/near",
                    "far": f"{full('tools')}/bin/far",
                    "stranger": f"{full('stranger')}/bin/x",
                    "whole": full("tools"),
                }
            },
            "tools": {"bin": {}},
        }
    )
    found = await closure.find("env")
    assert found.names == ("far", "near")
    assert closure.realised == {"env"}


async def test_a_bin_that_is_elsewhere() -> None:
    closure = Closure(
        {
            "wrapper": {"bin": f"{full('real')}/libexec/programs", "share": {}},
            "real": {"libexec": "hidden", "hidden": {"programs": {"x": X}}},
            "unused": {},
        }
    )
    found = await closure.find("wrapper")
    assert found == Programs(f"{full('wrapper')}/bin", ("x",))
    assert closure.realised == {"wrapper", "real"}


async def test_a_path_that_is_a_link_to_another() -> None:
    closure = Closure({"result": full("real"), "real": {"bin": {"x": X}}})
    assert (await closure.find("result")).directory == f"{full('result')}/bin"


async def test_a_path_that_is_a_program() -> None:
    closure = Closure({"hello.sh": X, "link": full("hello.sh")})
    assert await closure.find("hello.sh") == Programs(None, ("hello.sh",))
    assert await closure.find("link") == Programs(None, ("link",))


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (b"text", "a file that is neither archive nor program"),
        ({"lib": {}}, "it is no archive and has no bin"),
        ({"bin": {}}, "it is no archive and has no programs in bin"),
        ({"bin": X}, "it is no archive and has no programs in bin"),
        ({"bin": {"data": b""}}, "it is no archive and has no programs in bin"),
        ({"bin": "bin"}, "it is no archive and has no bin"),
        ({"bin": "/bin"}, "it is no archive and has no bin"),
        ({"bin": full("stranger") + "/bin"}, "it is no archive and has no bin"),
        ("/etc", "it is no archive and has no bin"),
    ],
)
async def test_what_has_no_programs(tree: made.Tree, reason: str) -> None:
    with pytest.raises(InvalidData) as caught:
        await Closure({"p": tree}).find("p")
    assert str(caught.value).startswith(f"{full('p')}: expected an image archive, or a package")
    assert reason in str(caught.value)


async def test_what_cannot_be_fetched_is_said() -> None:
    async def refuse(wanted: StorePath) -> Tree:
        raise PathNotFound(f"{wanted}: gone")

    with pytest.raises(PathNotFound, match="gone"):
        await ProgramFinder({path("p")}, refuse, StoreDir()).find(path("p"))


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("redis-7.0.15", "redis"),
        ("redis", "redis"),
        ("python3-3.11.9", "python3"),
        ("python3.11-requests-2.31.0", "python3.11-requests"),
        ("openssl-3.0.14-bin", "openssl"),
        ("glibc-locales-2.39", "glibc-locales"),
        ("hello-unstable-2024-01-01", "hello-unstable"),
        ("-1", "-1"),
        ("x-", "x"),
    ],
)
def test_the_name_without_the_version(name: str, package: str) -> None:
    assert package_name(StorePath("0" * 32, name)) == package


@pytest.mark.parametrize(
    ("name", "programs", "main"),
    [
        ("hello-2.12", ("hello",), "hello"),
        ("hello-2.12", ("other",), "other"),
        ("python3-3.11", ("idle3", "pydoc3", "python3"), "python3"),
        ("redis-7.0.15", ("redis-cli", "redis-server"), None),
    ],
)
def test_the_main_program(name: str, programs: tuple[str, ...], main: str | None) -> None:
    assert main_program(StorePath("0" * 32, name), Programs("/bin", programs)) == main


def test_why_there_is_no_main_program() -> None:
    names = tuple(f"redis-{number:02}" for number in range(12))
    said = why_none(StorePath("0" * 32, "redis-7.0.15"), Programs("/bin", names))
    assert said == (
        "redis-7.0.15 has 12 programs and none of them is called redis: give the container a command,"
        " one of redis-00, redis-01, redis-02, redis-03, redis-04, redis-05, redis-06, redis-07 and 4 more"
    )
    assert "/" not in said  # or runc would look for a file instead of a program
