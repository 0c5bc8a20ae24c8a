"""Environments of the test bed: one directory of links into many packages."""

from __future__ import annotations

from pathlib import Path

from testbed.package_builder import link_packages


def package(tmp_path: Path, name: str, *files: str) -> Path:
    for file in files:
        place = tmp_path / name / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(name)
    return tmp_path / name


def test_what_several_packages_have_is_merged_and_the_first_counts(tmp_path: Path) -> None:
    one = package(tmp_path, "one", "bin/tool", "share/node/a/x", "lib/libone.so")
    two = package(tmp_path, "two", "bin/tool", "bin/other", "share/node/b/x", "share/doc/x")
    out = tmp_path / "environment"
    link_packages(out, [one, two])
    assert {file: (out / "bin" / file).readlink() for file in ("tool", "other")} == {
        "tool": one / "bin/tool",
        "other": two / "bin/other",
    }
    assert sorted(each.name for each in (out / "share/node").iterdir()) == ["a", "b"]
    assert (out / "share/node/b").readlink() == two / "share/node/b"
    assert (out / "share/doc").readlink() == two / "share/doc"
    assert not (out / "lib").exists()


def test_python_is_put_together_from_its_packages(tmp_path: Path) -> None:
    minimal = package(tmp_path, "minimal", "lib/python3.11/os.py", "lib/python3.11/json/a.py")
    rest = package(tmp_path, "rest", "lib/python3.11/cgi.py", "lib/python3.11/json/b.py")
    module = package(tmp_path, "module", "lib/python3/dist-packages/yaml/__init__.py")
    out = tmp_path / "environment"
    link_packages(out, [minimal, rest, module])
    names = sorted(str(each.relative_to(out)) for each in out.rglob("*") if each.is_symlink())
    assert names == [
        "lib/python3.11/cgi.py",
        "lib/python3.11/json/a.py",
        "lib/python3.11/json/b.py",
        "lib/python3.11/os.py",
        "lib/python3/dist-packages",
    ]
