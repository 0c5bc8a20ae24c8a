"""Real closures from Debian packages: one store path a package, built by real Nix."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.nix_store import Closure, NixStore, nix_list, nix_string
from testbed.processes import CommandFailed, run

# Depended upon for installing, configuring or starting on a Debian system, not for running a program.
INSTALLATION = (
    *("adduser", "base-files", "cdebconf", "cron", "debconf", "debianutils", "dpkg"),
    *("init-system-helpers", "install-info", "libpam-modules", "libpam-modules-bin"),
    *("libpam-runtime", "login", "logrotate", "lsb-base", "mailcap", "media-types", "passwd"),
    *(
        "perl-base",
        "procps",
        "sensible-utils",
        "ssl-cert",
        "systemd",
        "systemd-standalone-sysusers",
    ),
    *("sysvinit-utils", "tar", "ucf"),
)
# In what the C library says when it is run as a program.
REBUILT = b"GNU C Library", b"gnu C Library"
BUILDER = Path(__file__).with_name("package_builder.py")
_RELATION = re.compile(r" ([ |])(?:Pre)?Depends: (<?)([^\s:>]+)")
_PROVIDER = re.compile(r" {4}([^\s:<]+)")
_PACKAGE = re.compile(r"[a-z0-9][^\s:]*")


@dataclass(frozen=True, slots=True)
class Package:
    """A Debian package, its archive, and the names of the packages it needs at run time, their needs included."""

    name: str
    archive: Path
    dependencies: tuple[str, ...]


def debian_closure(
    store: NixStore, name: str, packages: Sequence[str], *, rebuilt: str = ""
) -> Closure:
    """The closure of an environment ``name`` whose ``bin/`` links to every program of ``packages``.

    A package's ELF files have interpreter and RUNPATH in the store, as nixpkgs has them, so a root file system with
    nothing but the closure can run them. What was built once is found again without asking apt.

    ``rebuilt`` names a package of which one file says something else, as after a small fix: it and everything above it
    has another hash part.
    """
    memory = store.directory / f"{name}{rebuilt and f'-{rebuilt}'}.closure.json"
    made_from = {
        "packages": list(packages),
        "builder": _sha256(BUILDER),
    }
    with store.locked():
        known = json.loads(memory.read_text()) if memory.exists() else {}
        if known.get("made_from") != made_from or not store.has(known["root"]):
            known = {"made_from": made_from, "root": _build(store, name, packages, rebuilt)}
            memory.write_text(json.dumps(known))
    return store.closure(known["root"])


def _build(store: NixStore, name: str, packages: Sequence[str], rebuilt: str) -> str:
    resolved = _resolve(packages)
    archives = fetch_archives(resolved, store.directory / "archives")
    if rebuilt:
        archives[rebuilt] = _rebuild(archives[rebuilt], store.directory / "rebuilt")
    needed = [Package(each, archives[each], resolved[each]) for each in resolved]
    return store.build(environment_expression(name, packages, needed))


def fetch_archives(packages: Iterable[str], directory: Path) -> dict[str, Path]:
    """Download Debian packages with apt, those that are not whole in ``directory`` yet; returns package to archive."""
    directory.mkdir(parents=True, exist_ok=True)
    archives, missing = {}, []
    for line in _apt("apt-get", "download", "--print-uris", *packages).splitlines():
        _uri, file, _size, checksum = line.split()
        name, archive = file.partition("_")[0], directory / file
        archives[name] = archive
        if not archive.exists() or f"SHA256:{_sha256(archive)}" != checksum:
            archive.unlink(missing_ok=True)
            missing.append(name)
    if missing:
        _apt("apt-get", "download", "--quiet", *missing, cwd=directory)
    return archives


def _rebuild(archive: Path, directory: Path) -> Path:
    """The same package with one byte of its largest file changed, in what a program says of itself."""
    tree = directory / archive.stem
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    run(["dpkg-deb", "--raw-extract", archive, tree])
    files = [file for file in tree.rglob("*") if file.is_file() and not file.is_symlink()]
    largest = max(files, key=lambda file: file.stat().st_size)
    said, says = REBUILT
    data = largest.read_bytes()
    if said not in data:
        raise ValueError(f"{archive.name}: {largest.name} does not say {said.decode()!r}")
    largest.write_bytes(data.replace(said, says, 1))
    result = directory / archive.name
    run(["dpkg-deb", "--build", tree, result], timeout=300)
    shutil.rmtree(tree)
    return result


def _resolve(packages: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Every package needed at run time with all that it needs in turn, dependencies before dependents."""
    listing = _apt("apt-cache", "depends", "--important", "--recurse", *packages)
    return order_dependencies(packages, parse_depends(listing))


def parse_depends(listing: str) -> dict[str, tuple[str, ...]]:
    """Package to its dependencies, from the output of ``apt-cache depends``.

    Of alternatives (lines that start with ``|``) the first counts; of a virtual package (in angle brackets), the first
    of its providers, which follow it indented.
    """
    dependencies: dict[str, list[str]] = {}
    current: list[str] = []
    awaits_provider = chosen = False
    for line in listing.splitlines():
        if relation := _RELATION.match(line):
            alternative, virtual, name = relation.groups()
            awaits_provider = bool(virtual) and not chosen
            if not virtual and not chosen:
                current.append(name)
            chosen = alternative == "|"
        elif (provider := _PROVIDER.match(line)) and awaits_provider:
            current.append(provider[1])
            awaits_provider = False
        elif package := _PACKAGE.match(line):
            current = dependencies.setdefault(package[0], [])
            awaits_provider = chosen = False
    return {name: tuple(dict.fromkeys(needs)) for name, needs in dependencies.items()}


def order_dependencies(
    roots: Sequence[str], dependencies: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """What ``roots`` need at run time, dependencies first, each with all that it needs, directly or not.

    A cycle is cut where it closes. The one that every closure has is cut at the C library, which needs libgcc only to
    unwind stacks.
    """
    ordered: dict[str, tuple[str, ...]] = {}
    entered = set(INSTALLATION).difference(roots)

    def visit(name: str) -> None:
        if name in entered:
            return
        entered.add(name)
        needs = () if name == "libc6" else tuple(dependencies.get(name, ()))
        for need in needs:
            visit(need)
        known = [need for need in needs if need in ordered]
        ordered[name] = tuple(
            dict.fromkeys([*known, *(far for need in known for far in ordered[need])])
        )

    for root in roots:
        visit(root)
    return ordered


def environment_expression(name: str, roots: Sequence[str], packages: Sequence[Package]) -> str:
    """The Nix expression that builds ``packages`` (dependencies first) and an environment of ``roots``."""
    attributes = [_package_attribute(package) for package in packages]
    environment = _derivation(
        name, kind="environment", packages=nix_list([f"pkgs.{nix_string(root)}" for root in roots])
    )
    return f"let pkgs = {{\n{''.join(attributes)}}}; in {environment}"


def _package_attribute(package: Package) -> str:
    archive = (
        f'builtins.path {{ path = {nix_string(str(package.archive))}; name = "archive.deb"; }}'
    )
    derivation = _derivation(
        package.name,
        kind="package",
        archive=archive,
        dependencies=nix_list([f"pkgs.{nix_string(need)}" for need in package.dependencies]),
    )
    return f"{nix_string(package.name)} = {derivation};\n"


def _derivation(name: str, **attributes: str) -> str:
    kind = nix_string(attributes.pop("kind"))
    rest = "".join(f"{key} = {value}; " for key, value in attributes.items())
    builder = (
        f"builtins.path {{ path = {nix_string(str(BUILDER))}; name = {nix_string(BUILDER.name)}; }}"
    )
    return (
        f"derivation {{ name = {nix_string(name)}; kind = {kind}; system = builtins.currentSystem; "
        f'builder = "/usr/bin/python3"; args = [ ({builder}) ]; {rest}}}'
    )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _apt(*argv: str, cwd: Path | None = None) -> str:
    """Run an apt tool; where that fails, once more after fetching the lists of packages, which may lack or be old."""
    # What is installed here may have come from elsewhere, and cannot be downloaded.
    command = [argv[0], "-o", "APT::Sandbox::User=root", "-o", "Dir::State::status=/dev/null"]
    command += argv[1:]
    environment = {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        return run(command, cwd=cwd, env=environment, timeout=300)
    except CommandFailed:
        run(["apt-get", "update", "--quiet"], env=environment, timeout=300)
        return run(command, cwd=cwd, env=environment, timeout=300)
