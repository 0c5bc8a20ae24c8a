"""The formats beside the Nix that is installed: what it writes is read, what is written it takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest
import zstandard

from fusesnap.errors import ContentMismatch, InvalidData
from fusesnap.nix.cache_info import CacheInfo, parse_cache_info
from fusesnap.nix.compression import decompressor
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.nar import FileData, NarEvent, NarParser, NeedData, RegularFile, nar_bytes
from fusesnap.nix.narinfo import NarInfo, parse_narinfo
from fusesnap.nix.signature import PublicKey, SecretKey, TrustedKeys
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.trust import check_trust, content_address_check

STORE = StoreDir()
NOBODY = TrustedKeys(())
ASSETS = Path(__file__).parent / "assets"
Walk = Callable[[Path], Iterator[NarEvent]]


class RealNix(Protocol):
    """What of the fixture ``nix`` is used here."""

    directory: Path

    @property
    def root(self) -> Path: ...
    def run(self, *command: str | Path, stdin: bytes = b"") -> bytes: ...
    def refuse(self, *command: str | Path, stdin: bytes = b"") -> str: ...
    def text(self, *command: str | Path) -> str: ...


def events_of(nar: bytes) -> list[NarEvent]:
    parser = NarParser()
    parser.receive_data(nar)
    events = []
    while not isinstance(event := parser.next_event(), NeedData):
        events.append(event)
    parser.close()
    return events


def without_offsets(events: list[NarEvent]) -> list[NarEvent]:
    return [replace(e, offset=0) if isinstance(e, RegularFile) else e for e in events]


def sha256(data: bytes) -> Hash:
    return Hash(HashAlgorithm.SHA256, hashlib.sha256(data).digest())


def unpack(compression: str, data: bytes) -> bytes:
    stream = decompressor(compression)
    unpacked = b"".join(stream.decompress(data))
    stream.finish()
    return unpacked


# NAR


def test_archives_are_those_that_nix_writes(nix: RealNix, package: Path, walk: Walk) -> None:
    for path in (package, package / "bin" / "tool", package / "link", package / "share" / "9"):
        nar = nix.run("nix-store", "--dump", path)
        assert b"".join(nar_bytes(walk(path))) == nar
        assert without_offsets(events_of(nar)) == list(walk(path))


def test_nix_restores_what_is_written(
    nix: RealNix, package: Path, walk: Walk, tmp_path: Path
) -> None:
    nar = b"".join(nar_bytes(walk(package)))
    nix.run("nix-store", "--restore", tmp_path / "restored", stdin=nar)
    assert list(walk(tmp_path / "restored")) == list(walk(package))


# What this Nix takes although no Nix writes it: names unsorted, fields left out, bytes after the
# end, a target cut at its NUL, and what is too deep for most programs to walk.
TAKEN_BY_NIX = {
    "nar-no-contents.nar",
    "nar-no-target.nar",
    "nar-target-nul.nar",
    "nar-too-deep.nar",
    "nar-trailing.nar",
    "nar-two-roots.nar",
    "nar-unsorted.nar",
}


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*.nar")), ids=lambda path: str(path.stem))
def test_nix_refuses_bad_archives_too(nix: RealNix, path: Path, tmp_path: Path) -> None:
    command = ("nix-store", "--restore", tmp_path / "restored")
    if path.name in TAKEN_BY_NIX:
        nix.run(*command, stdin=path.read_bytes())
    else:
        assert "error: " in nix.refuse(*command, stdin=path.read_bytes())


# Hashes


@pytest.mark.parametrize("algorithm", HashAlgorithm)
def test_spellings_of_hashes_are_those_of_nix(nix: RealNix, algorithm: HashAlgorithm) -> None:
    hashed = algorithm.new()
    hashed.update(b"contents")
    value = Hash(algorithm, hashed.digest())

    def spelled(form: str, text: str) -> str:
        return nix.text("nix", "hash", f"to-{form}", "--type", algorithm, text)

    for text in (value.base16(), value.nix32(), value.base64(), value.sri()):
        assert spelled("base16", text) == value.base16()
        assert spelled("base32", text) == value.nix32()
        assert spelled("base64", text) == value.base64()
        assert spelled("sri", text) == value.sri()
    file = nix.directory / "file"
    file.write_bytes(b"contents")
    assert nix.text("nix-hash", "--flat", "--type", algorithm, file) == value.base16()


# Names


@pytest.mark.parametrize(
    "name", ["a", "a" * 211, "A-z.0+_?=", "a" * 212, "", "a b", "a/b", "\u00fc", "a:b", "a~"]
)
def test_names_are_those_that_nix_takes(nix: RealNix, name: str) -> None:
    command = ("nix-instantiate", "--eval", "--expr", f'builtins.toFile "{name}" ""')
    try:
        StorePath("0" * 32, name)
    except InvalidData:
        nix.refuse(*command)
    else:
        path = STORE.parse(nix.text(*command).strip('"'))
        assert path.name == name


# Binary caches


@pytest.fixture
def secret(nix: RealNix) -> tuple[Path, SecretKey]:
    """A key pair that Nix made, and the file that it is in."""
    text = nix.run("nix", "key", "generate-secret", "--key-name", "cache.example-1")
    file = nix.directory / "secret-key"
    file.write_bytes(text)
    return file, SecretKey.parse(text.decode())


def test_keys_are_those_of_nix(nix: RealNix, secret: tuple[Path, SecretKey]) -> None:
    file, key = secret
    assert str(key) == file.read_text()
    public = nix.run("nix", "key", "convert-secret-to-public", stdin=file.read_bytes()).decode()
    assert PublicKey.parse(public) == key.public_key()
    assert str(key.public_key()) == public


def only_narinfo(cache: Path, path: StorePath) -> NarInfo:
    return parse_narinfo((cache / f"{path.hash_part}.narinfo").read_bytes(), STORE)


@pytest.mark.parametrize("compression", ["none", "xz", "zstd", "gzip", "bzip2", "br"])
def test_a_cache_that_nix_wrote_is_read(
    nix: RealNix, package: Path, walk: Walk, secret: tuple[Path, SecretKey], compression: str
) -> None:
    file, key = secret
    path = STORE.parse(nix.text("nix-store", "--add", package))
    cache = nix.directory / "cache"
    url = f"file://{cache}?compression={compression}&secret-key={file}"
    nix.run("nix", "copy", "--to", url, STORE.format(path))

    narinfo = (cache / f"{path.hash_part}.narinfo").read_bytes()
    info = parse_narinfo(narinfo, STORE)
    assert info.to_text().encode() == narinfo
    assert (info.store_path, info.compression) == (path, compression)
    check_trust(replace(info, ca=None), TrustedKeys((key.public_key(),)))
    check_trust(info, NOBODY)

    packed = (cache / info.url).read_bytes()
    assert info.file_hash == sha256(packed)
    assert info.file_size == len(packed)
    nar = unpack(compression, packed)
    assert info.nar_hash == sha256(nar)
    assert info.nar_size == len(nar)
    assert without_offsets(events_of(nar)) == list(walk(package))
    assert parse_cache_info((cache / "nix-cache-info").read_bytes()) == CacheInfo(
        "/nix/store", False, None
    )


def input_addressed(name: str, nar: bytes, references: tuple[StorePath, ...]) -> NarInfo:
    """A path such as a build makes: its hash part says nothing of its contents."""
    packed = zstandard.compress(nar)
    path = StorePath(Hash(HashAlgorithm.SHA1, hashlib.sha1(name.encode()).digest()).nix32(), name)  # noqa: S324
    return NarInfo(
        store_path=path,
        url=f"nar/{name}.nar.zst",
        compression="zstd",
        file_hash=sha256(packed),
        file_size=len(packed),
        nar_hash=sha256(nar),
        nar_size=len(nar),
        references=tuple(sorted({path, *references})),
        deriver=StorePath("0" * 32, f"{name}.drv"),
        system=None,
        signatures=(),
        ca=None,
        unknown=(("Later", "than this Nix"),),
        store_dir=STORE,
    )


def publish(cache: Path, info: NarInfo, nar: bytes) -> None:
    (cache / "nar").mkdir(parents=True, exist_ok=True)
    (cache / "nix-cache-info").write_text("StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 7\n")
    (cache / info.url).write_bytes(zstandard.compress(nar))
    (cache / f"{info.store_path.hash_part}.narinfo").write_text(info.to_text())


def test_nix_takes_what_is_signed_here_and_nothing_else(
    nix: RealNix, package: Path, walk: Walk, secret: tuple[Path, SecretKey]
) -> None:
    _, key = secret
    nar = b"".join(nar_bytes(walk(package)))
    lower = input_addressed("lower", nar, ())
    upper = input_addressed("upper", nar, (lower.store_path,))
    wrong = key.sign(b"something else")
    cache = nix.directory / "cache"
    path = STORE.format(upper.store_path)
    copy = (
        *("nix", "copy", "--option", "trusted-public-keys", str(key.public_key())),
        *("--option", "narinfo-cache-positive-ttl", "0", "--from", f"file://{cache}", path),
    )
    for signatures in ((), (wrong,)):
        for info in (lower, upper):
            publish(cache, replace(info, signatures=signatures), nar)
        assert "lacks a valid signature" in nix.refuse(*copy)
    for info in (lower, upper):
        publish(cache, replace(info, signatures=(wrong, key.sign(info.fingerprint()))), nar)
    nix.run(*copy)
    nix.run(
        *("nix", "store", "verify", "--recursive", "--sigs-needed", "1"),
        *("--option", "trusted-public-keys", str(key.public_key()), path),
    )
    assert nix.text("nix-store", "--query", "--deriver", path).endswith("-upper.drv")
    references = nix.text("nix-store", "--query", "--references", path).split()
    assert references == [STORE.format(p) for p in upper.references]


def test_signatures_that_nix_adds_verify(
    nix: RealNix, package: Path, walk: Walk, secret: tuple[Path, SecretKey]
) -> None:
    file, key = secret
    nar = b"".join(nar_bytes(walk(package)))
    lower = input_addressed("lower", nar, ())
    upper = input_addressed("upper", nar, (lower.store_path,))
    cache, signed = nix.directory / "cache", nix.directory / "signed"
    for info in (lower, upper):
        publish(cache, info, nar)
    path = STORE.format(upper.store_path)
    nix.run("nix", "copy", "--no-check-sigs", "--from", f"file://{cache}", path)
    nix.run("nix", "store", "sign", "--recursive", "--key-file", file, path)
    nix.run("nix", "copy", "--to", f"file://{signed}", path)
    for info in (lower, upper):
        written = only_narinfo(signed, info.store_path)
        assert written.fingerprint() == info.fingerprint()
        assert written.signatures == (key.sign(info.fingerprint()),)
        assert written.deriver == info.deriver
        check_trust(written, TrustedKeys((key.public_key(),)))


# Content addresses


def check_contents(info: NarInfo, nar: bytes) -> None:
    """What a reader does with the archive of a path that nobody signed."""
    check_trust(info, NOBODY)
    assert info.nar_hash == sha256(nar)
    check = content_address_check(info)
    if check is None:
        return
    for start in range(0, len(nar), 1000):
        check.receive_nar(nar[start : start + 1000])
    for event in events_of(nar):
        check.receive(event)
    check.finish()


def copied(nix: RealNix, path: str) -> tuple[NarInfo, bytes]:
    """Let Nix write a path to a cache; gives the narinfo and the archive."""
    cache = nix.directory / "cache"
    nix.run("nix", "copy", "--to", f"file://{cache}?compression=none", path)
    info = only_narinfo(cache, STORE.parse(path))
    return info, (cache / info.url).read_bytes()


def test_a_path_added_by_its_archive(nix: RealNix, package: Path) -> None:
    info, nar = copied(nix, nix.text("nix-store", "--add", package))
    assert info.ca == f"fixed:r:{info.nar_hash}"
    check_contents(info, nar)


@pytest.mark.parametrize("algorithm", HashAlgorithm)
@pytest.mark.parametrize("recursive", [(), ("--recursive",)])
def test_fixed_outputs(
    nix: RealNix, package: Path, algorithm: HashAlgorithm, recursive: tuple[str, ...]
) -> None:
    source = package if recursive else package / "share" / "9"
    path = nix.text("nix-store", "--add-fixed", *recursive, algorithm, source)
    info, nar = copied(nix, path)
    assert info.ca is not None
    assert info.ca.startswith(f"fixed:{'r:' if recursive else ''}{algorithm}:")
    check_contents(info, nar)


def test_a_text_with_references(nix: RealNix, package: Path) -> None:
    expression = f"""
        builtins.toFile "text" "see ${{builtins.path {{ path = {package}; name = "p"; }}}}"
    """
    path = nix.text("nix-instantiate", "--eval", "--expr", expression).strip('"')
    nix.run("nix-instantiate", "--eval", "--read-write-mode", "--expr", expression)
    info, nar = copied(nix, path)
    assert info.ca is not None
    assert info.ca.startswith("text:sha256:")
    assert len(info.references) == 1
    check_contents(info, nar)
    other = events_of(nar)
    check = content_address_check(info)
    assert check is not None
    for event in other:
        check.receive(FileData(b"x" * len(event.data)) if isinstance(event, FileData) else event)
    with pytest.raises(ContentMismatch):
        check.finish()


def test_a_path_that_refers_to_itself(
    nix: RealNix, package: Path, walk: Walk, secret: tuple[Path, SecretKey]
) -> None:
    _, key = secret
    own = input_addressed("self", b"", ())
    text = STORE.format(own.store_path)
    (package / "bin" / "tool").write_text(f"#!{text}/bin/sh\nexec {text}/bin/x\n")
    (package / "self").symlink_to(text)
    nar = b"".join(nar_bytes(walk(package)))
    info = input_addressed("self", nar, ())
    cache = nix.directory / "source"
    publish(cache, replace(info, signatures=(key.sign(info.fingerprint()),)), nar)
    nix.run("nix", "copy", "--no-check-sigs", "--from", f"file://{cache}", text)
    nix.run("nix", "store", "make-content-addressed", text)

    made = {path.name for path in (nix.root / "nix/store").iterdir() if path.name.endswith("-self")}
    (base_name,) = made - {info.store_path.base_name}
    addressed, nar = copied(nix, f"/nix/store/{base_name}")
    assert addressed.references == (addressed.store_path,)
    check_contents(addressed, nar)
    self_reference = addressed.store_path.hash_part.encode()
    for forged in (nar.replace(b"exec /", b"EXEC /"), nar.replace(self_reference, bytes(32), 1)):
        assert forged != nar
        with pytest.raises(ContentMismatch):
            check_contents(replace(addressed, nar_hash=sha256(forged)), forged)
