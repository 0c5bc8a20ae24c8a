"""Builder of the test bed's derivations: runs inside Nix builds, with Debian's own python3.

A Debian package becomes a store path laid out as nixpkgs lays its packages out: ``bin``, ``lib``, ``share`` and so on
at the top, and ELF files whose interpreter and RUNPATH are store paths.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

ATTRIBUTES = os.environ  # where a builder finds its derivation's attributes

# Directories of a Debian package and where they go.
LAYOUT = {
    "bin": "bin",
    "sbin": "bin",
    "usr/bin": "bin",
    "usr/sbin": "bin",
    "usr/games": "bin",
    "lib": "lib",
    "lib64": "lib",
    "usr/lib": "lib",
    "usr/lib64": "lib",
    "usr/libexec": "libexec",
    "usr/include": "include",
    "usr/share": "share",
    "etc": "etc",
}
# What an environment has of its packages, as it is named below their store paths.
LINKED = ("bin", "share", "lib/python3*")
LEFT_OUT = ("bug", "doc", "lintian", "locale", "man")
C_LIBRARY = "libc6"
ELF_MAGIC = b"\x7fELF"
LINKED_TYPES = (2, 3)  # ET_EXEC and ET_DYN of the ELF header's e_type


def main() -> None:
    os.environ["PATH"] = "/usr/bin:/bin"
    out = Path(ATTRIBUTES["out"])
    if ATTRIBUTES["kind"] == "environment":
        link_packages(out, [Path(package) for package in ATTRIBUTES["packages"].split()])
        return
    needs = [Path(path) for path in ATTRIBUTES["dependencies"].split()]
    unpack(ATTRIBUTES["archive"], Path("unpacked"), out)
    compile_modules(out)
    for file in sorted(out.rglob("*")):
        if file.is_symlink():
            redirect_link(file, out, needs)
        # Patching the dynamic linker or the C library itself breaks them, and they need nothing.
        elif ATTRIBUTES["name"] != C_LIBRARY and is_linked_elf(file):
            patch_elf(file, out, needs)


def link_packages(out: Path, packages: Sequence[Path]) -> None:
    """Fill an environment with links into its packages."""
    out.mkdir()
    found = (
        file.relative_to(base) for base in packages for each in LINKED for file in base.glob(each)
    )
    for directory in sorted(set(found)):
        (out / directory).parent.mkdir(parents=True, exist_ok=True)
        merge(out / directory, [base / directory for base in packages])


def merge(target: Path, sources: Iterable[Path]) -> None:
    """Make a directory of links; what several have as a directory is one too. Of other things the first counts."""
    target.mkdir()
    directories = [source for source in sources if source.is_dir()]
    for name in sorted({file.name for source in directories for file in source.iterdir()}):
        having = [source / name for source in directories if os.path.lexists(source / name)]
        if len(having) > 1 and having[0].is_dir() and not having[0].is_symlink():
            merge(target / name, having)
        else:
            (target / name).symlink_to(having[0])


def unpack(archive: str, unpacked: Path, out: Path) -> None:
    """Lay a package's files out below ``out``."""
    unpacked.mkdir()
    files = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", archive], check=True, stdout=subprocess.PIPE
    )
    # Nix lets no builder set the set-user-ID bit, which tar would do for root.
    tar = ["tar", "--extract", "--no-same-owner", "--no-same-permissions", "--directory"]
    subprocess.run([*tar, unpacked], input=files.stdout, check=True)
    for name in LEFT_OUT:
        shutil.rmtree(unpacked / "usr/share" / name, ignore_errors=True)
    out.mkdir()
    for source, target in LAYOUT.items():
        if (unpacked / source).is_dir():
            shutil.copytree(unpacked / source, out / target, symlinks=True, dirs_exist_ok=True)


def compile_modules(out: Path) -> None:
    """Compile Python modules, as Debian does when it installs them and nixpkgs when it builds them."""
    directories = [str(each) for each in out.glob("lib/python3*")]
    if directories:
        options = ["-q", "-q", "--invalidation-mode", "unchecked-hash", "-s", str(out)]
        # Some modules are tests that no compiler takes.
        command = ["python3", "-m", "compileall", *options, *directories]
        subprocess.run(command, check=False, env={**os.environ, "PYTHONHASHSEED": "0"})


def redirect_link(link: Path, out: Path, needs: Sequence[Path]) -> None:
    """Make a link that leaves the store path lead into the dependency that holds what it names."""
    target = link.readlink()
    if target.is_absolute():
        inside = str(target).lstrip("/")
    else:
        place = os.path.normpath(link.parent / target)
        if os.path.lexists(place):
            return
        inside = os.path.relpath(place, out)
    for candidate in (base / relocated(inside) for base in (out, *needs)):
        if os.path.lexists(candidate) and candidate != link:
            link.unlink()
            link.symlink_to(candidate)
            return


def relocated(path: str) -> str:
    """Where a file at ``path`` of a Debian system is in a store path."""
    for source in sorted(LAYOUT, key=len, reverse=True):
        if path.startswith(source + "/"):
            return LAYOUT[source] + path.removeprefix(source)
    return path


def is_linked_elf(file: Path) -> bool:
    """Whether a file is an ELF program or shared library."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        header = stream.read(18)
    return header.startswith(ELF_MAGIC) and int.from_bytes(header[16:18], "little") in LINKED_TYPES


def patch_elf(file: Path, out: Path, needs: Sequence[Path]) -> None:
    """Give a program or library an interpreter and a RUNPATH in the store; static ones stay as they are."""
    dynamic = query("--print-rpath", file)
    if dynamic.returncode != 0:
        return
    file.chmod(0o755)
    own = [absorbed(entry, out) for entry in dynamic.stdout.strip().split(":") if entry]
    searched = [*own, *(str(lib) for base in (out, *needs) for lib in library_directories(base))]
    command = ["patchelf", "--set-rpath", ":".join(searched)]
    loader = query("--print-interpreter", file)
    if loader.returncode == 0:
        command += ["--set-interpreter", interpreter(Path(loader.stdout.strip()).name, needs)]
    subprocess.run([*command, file], check=True)
    # Else the dynamic linker looks into every dependency, and each of them would have to be there.
    subprocess.run(["patchelf", "--shrink-rpath", file], check=True)


def query(option: str, file: Path) -> subprocess.CompletedProcess[str]:
    """Ask patchelf; it fails where a file has no such thing."""
    return subprocess.run(["patchelf", option, file], check=False, capture_output=True, text=True)


def absorbed(entry: str, out: Path) -> str:
    """An entry of a package's own RUNPATH, led into its store path."""
    return str(out / relocated(entry.lstrip("/"))) if entry.startswith("/") else entry


def library_directories(base: Path) -> list[Path]:
    """``lib`` and, below it, the directory of Debian's multiarch libraries."""
    return [base / "lib", *sorted((base / "lib").glob("*-linux-gnu*"))]


def interpreter(name: str, needs: Sequence[Path]) -> str:
    """The dynamic linker ``name`` of the C library among the dependencies."""
    found = [file for base in needs for file in sorted((base / "lib").glob(f"*/{name}"))]
    if not found:
        raise SystemExit(f"no dependency has the dynamic linker {name}")
    return str(found[0])


if __name__ == "__main__":
    main()
