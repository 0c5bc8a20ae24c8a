"""Packages of Debian's other suites, for programs of other versions than the host has; the host is not changed.

apt keeps all that it writes in a directory of ours, and reads the host's own settings (proxies) and its mirror, but not
its sources nor what it has installed. The package is unpacked and not installed, so its libraries must be those of the
host, or are given to it.
"""

from __future__ import annotations

import fcntl
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

from testbed.containerd_configuration import Release
from testbed.processes import CommandFailed, run
from testbed.workplace import default_work

SOURCE = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} {suite} main\n"
# The suites that have one containerd each, by the version that it must be.
CONTAINERDS = {"1.6": "bookworm", "1.7": "trixie", "2": "sid"}
# The suites that have a Nix other than the host's, by the version that it must be.
NIXES = {"2.26": "trixie", "2.34": "sid"}
LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
SECONDS = 300  # for some 10 MB of index and 30 MB of package


def containerd_release(version: str) -> Release:
    """containerd of a ``version`` of CONTAINERDS, downloaded the first time; what its suite has by then."""
    suite = CONTAINERDS[version]
    release = Release.of(unpacked("containerd", suite) / "usr/bin")
    if not release.text.startswith(f"{version}."):
        raise CommandFailed(f"Debian {suite} has containerd {release.text}, expected {version}.x")
    return release


def newest_runc() -> Path:
    """The directory that holds runc of Debian's newest suite; with its own libraries, because the host's are older."""
    packages = [unpacked(name, "sid") for name in ("libc6", "libseccomp2", "runc")]
    *libraries, runc = packages
    directories = [package / "usr/lib/x86_64-linux-gnu" for package in libraries]
    loader = directories[0] / "ld-linux-x86-64.so.2"
    program = runc / "usr/sbin/runc"
    if run(["patchelf", "--print-interpreter", program]).strip() != str(loader):
        patched = program.with_name(f"runc-{os.getpid()}")
        search = os.pathsep.join(map(str, directories))
        own = ["--set-interpreter", str(loader), "--set-rpath", search]
        run(["patchelf", *own, "--output", patched, program])
        patched.rename(program)
    return program.parent


def nix_command(version: str) -> list[str]:
    """How the ``nix`` of a ``version`` of NIXES is run, with its own libraries; downloaded the first time."""
    suite = NIXES[version]
    files = unpacked("nix-bin", suite, libraries=True)
    search = os.pathsep.join(str(files / directory) for directory in LIBRARIES)
    loader = files / LIBRARIES[0] / "ld-linux-x86-64.so.2"
    command = [str(loader), "--library-path", search, "--argv0", "nix", str(files / "usr/bin/nix")]
    said = run([*command, "--version"])
    if f" {version}." not in said:
        raise CommandFailed(f"Debian {suite} has {said.strip()}, expected Nix {version}.x")
    return command


def unpacked(package: str, suite: str, *, libraries: bool = False) -> Path:
    """The directory with the files of a package as ``suite`` has it now, or had it when it was downloaded.

    ``libraries``: and with those of all that it depends on. To have the newest, remove the directory.
    """
    kept = default_work() / "debian"
    kept.mkdir(parents=True, exist_ok=True)
    target = kept / f"{package}-{suite}"
    with (kept / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=kept, prefix=f"{target.name}-") as directory:
                _download(package, suite, Path(directory), libraries=libraries)
                (Path(directory) / "files").rename(target)
    return target


def _download(package: str, suite: str, work: Path, *, libraries: bool) -> None:
    """Download a package into ``work``, and unpack it in ``work/files``."""
    sources = work / "sources.list"
    sources.write_text(SOURCE.format(mirror=_mirror(), suite=suite))
    apt = ["apt-get", "--quiet", *_own_directories(work, sources)]
    run([*apt, "update"], timeout=SECONDS)
    if libraries:
        # With no package installed, as _own_directories has it, this is all that it needs.
        install = ["install", "--download-only", "--yes", "--no-install-recommends", package]
        run([*apt, *install], timeout=SECONDS)
    else:
        run([*apt, "download", package], timeout=SECONDS, cwd=work)
    for archive in (*work.glob("*.deb"), *work.glob("cache/archives/*.deb")):
        run(["dpkg-deb", "--extract", archive, work / "files"])


def _mirror() -> str:
    """Where the host gets its own suite from: the others are beside it. Raises CommandFailed."""
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    wanted = ["Created-By: Packages", f"Release: {suite}", "Component: main"]
    found = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]).split()
    if not found:
        raise CommandFailed(f"apt knows no source of Debian {suite} main")
    return found[0]


def _own_directories(work: Path, sources: Path) -> Sequence[str]:
    """apt's options, as apt.conf(5) has them, for all that it keeps to be in ``work``."""
    for directory in ("lists/partial", "cache/archives/partial"):
        (work / directory).mkdir(parents=True)
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Etc::Preferences": "/dev/null",
        "Dir::Etc::PreferencesParts": "/dev/null",
        "Dir::State::Lists": work / "lists",
        "Dir::State::Status": "/dev/null",
        "Dir::Cache": work / "cache",
        "Acquire::Retries": 3,
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
        "APT::Sandbox::User": "root",  # apt's own user may not reach a home directory
    }
    return [f"--option={key}={value}" for key, value in settings.items()]
