from __future__ import annotations

import re
from dataclasses import replace

import pytest

from fusesnap.errors import ContentMismatch, UntrustedPath
from fusesnap.nix.content_address import ContentAddress
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.nar import DirectoryStart, FileData, FileEnd, NarEnd, RegularFile, Symlink
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.signature import PublicKey, SecretKey, Signature, TrustedKeys
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.trust import check_trust, content_address_check

STORE = StoreDir()
SECRET = SecretKey(
    "cache-1",
    bytes.fromhex(
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    ),
)
KEYS = TrustedKeys((SECRET.public_key(),))
NAR_HASH = Hash(HashAlgorithm.SHA256, bytes(range(32)))
OTHER_HASH = Hash(HashAlgorithm.SHA256, bytes(32))
INFO = NarInfo(
    store_path=StorePath("0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx", "hello"),
    url="nar/a.nar",
    compression="none",
    file_hash=None,
    file_size=None,
    nar_hash=NAR_HASH,
    nar_size=480,
    references=(),
    deriver=None,
    system=None,
    signatures=(),
    ca=None,
    unknown=(),
    store_dir=STORE,
)
GOOD = SECRET.sign(INFO.fingerprint())
WRONG = Signature("cache-1", bytes(64))
FOREIGN = Signature("other-1", bytes(64))


def signed(*signatures: Signature) -> NarInfo:
    return replace(INFO, signatures=signatures)


def addressed(ca: str, *, references: tuple[StorePath, ...] = (), to_self: bool = False) -> NarInfo:
    """A path that is named by its content address."""
    path = ContentAddress.parse(ca).store_path(
        "hello", references, refers_to_self=to_self, store_dir=STORE
    )
    every = tuple(sorted({*references, path} if to_self else references))
    return replace(INFO, store_path=path, ca=ca, references=every)


@pytest.mark.parametrize(
    "signatures", [(GOOD,), (FOREIGN, GOOD), (WRONG, GOOD), (GOOD, WRONG, FOREIGN)]
)
def test_one_good_signature_is_enough(signatures: tuple[Signature, ...]) -> None:
    check_trust(signed(*signatures), KEYS)


def test_any_key_of_that_name_will_do() -> None:
    check_trust(signed(GOOD), TrustedKeys((PublicKey("cache-1", bytes(32)), *KEYS.keys)))


def test_what_is_signed_covers_path_hash_size_and_references() -> None:
    for change in (
        {"store_path": StorePath(INFO.store_path.hash_part, "other")},
        {"nar_hash": OTHER_HASH},
        {"nar_size": 481},
        {"references": (INFO.store_path,)},
        {"store_dir": StoreDir("/opt/store")},
    ):
        with pytest.raises(UntrustedPath, match="signature by trusted key 'cache-1' is wrong"):
            check_trust(replace(signed(GOOD), **change), KEYS)
    check_trust(replace(signed(GOOD), url="nar/b.nar", compression="xz"), KEYS)


@pytest.mark.parametrize(
    ("info", "reasons"),
    [
        (signed(), "it is unsigned; it is not content-addressed"),
        (signed(WRONG), "the signature by trusted key 'cache-1' is wrong; it is not content-"),
        (signed(FOREIGN), "it is only signed by 'other-1', not trusted; it is not content-"),
        (
            signed(FOREIGN, Signature("b", bytes(64)), FOREIGN),
            "it is only signed by 'other-1' and 'b', not trusted;",
        ),
        (
            signed(FOREIGN, WRONG),
            "the signature by trusted key 'cache-1' is wrong;"
            " it is also signed by 'other-1', not trusted;",
        ),
        (
            replace(INFO, ca=f"fixed:r:{NAR_HASH}"),
            f"it is unsigned; its content address 'fixed:r:{NAR_HASH}' is of /nix/store/",
        ),
        (
            replace(INFO, ca="fixed:git:sha1:00000000000000000000000000000000"),
            "it is unsigned; hash algorithm is 'git'",
        ),
        (replace(INFO, ca="nar:x"), "content address 'nar:x' begins with none of text:, fixed:"),
        (
            addressed(f"fixed:r:{OTHER_HASH}"),
            f"its content address is fixed:r:{OTHER_HASH}, its NAR hash is {NAR_HASH}",
        ),
        (
            replace(addressed(f"fixed:{OTHER_HASH}"), references=(INFO.store_path,)),
            f"a path with content address fixed:{OTHER_HASH} cannot have such references",
        ),
        (
            replace(addressed(f"text:{OTHER_HASH}"), references=(INFO.store_path,)),
            "is of /nix/store/",
        ),
    ],
)
def test_the_reasons_not_to_trust_are_told(info: NarInfo, reasons: str) -> None:
    path = f"/nix/store/{info.store_path}"
    with pytest.raises(UntrustedPath, match=re.escape(f"{path} is not trusted: ")) as caught:
        check_trust(info, KEYS)
    assert reasons in str(caught.value)


def test_no_key_trusts_nothing() -> None:
    with pytest.raises(UntrustedPath, match="it is only signed by 'cache-1', not trusted"):
        check_trust(signed(GOOD), TrustedKeys(()))


def test_a_content_addressed_path_needs_no_signature() -> None:
    for info in (
        addressed(f"fixed:r:{NAR_HASH}", references=(INFO.store_path,)),
        addressed(f"fixed:{OTHER_HASH}"),
        addressed("fixed:r:sha1:" + "0" * 40),
        addressed("fixed:md5:" + "0" * 32),
        addressed(f"text:{OTHER_HASH}", references=(INFO.store_path,)),
    ):
        check_trust(info, TrustedKeys(()))


def test_there_is_nothing_to_check_besides_the_nar_hash() -> None:
    assert content_address_check(INFO) is None
    assert content_address_check(addressed(f"fixed:r:{NAR_HASH}")) is None
    assert content_address_check(replace(INFO, ca=f"fixed:r:{NAR_HASH}")) is None
    assert content_address_check(replace(INFO, ca="later:kind")) is None


def test_a_content_address_of_another_nar_is_refused_at_once() -> None:
    with pytest.raises(ContentMismatch, match=f"is fixed:r:{OTHER_HASH}, its NAR hash is"):
        content_address_check(addressed(f"fixed:r:{OTHER_HASH}"))


def digest_of(algorithm: HashAlgorithm, data: bytes) -> Hash:
    hashed = algorithm.new()
    hashed.update(data)
    return Hash(algorithm, hashed.digest())


FILE_EVENTS = (
    RegularFile(b"", 5, False, 96),
    FileData(b"he"),
    FileData(b"llo"),
    FileEnd(),
    NarEnd(),
)


@pytest.mark.parametrize("algorithm", HashAlgorithm)
def test_flat_contents_are_checked(algorithm: HashAlgorithm) -> None:
    for contents, good in ((b"hello", True), (b"hellO", False)):
        check = content_address_check(addressed(f"fixed:{digest_of(algorithm, contents)}"))
        assert check is not None
        check.receive_nar(b"the archive itself does not count")
        for event in FILE_EVENTS:
            check.receive(event)
        if good:
            check.finish()
            continue
        with pytest.raises(ContentMismatch, match=f"but the contents have {algorithm}:"):
            check.finish()


@pytest.mark.parametrize(
    "event", [DirectoryStart(b""), Symlink(b"", b"x"), RegularFile(b"", 5, True, 0)]
)
def test_what_is_not_one_plain_file_has_no_flat_hash(
    event: DirectoryStart | Symlink | RegularFile,
) -> None:
    check = content_address_check(addressed(f"text:{OTHER_HASH}"))
    assert check is not None
    with pytest.raises(ContentMismatch, match=f"the NAR holds {type(event).__name__}"):
        check.receive(event)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_the_archive_is_checked_by_another_algorithm(step: int) -> None:
    nar = b"an archive" * 50
    check = content_address_check(addressed(f"fixed:r:{digest_of(HashAlgorithm.SHA1, nar)}"))
    assert check is not None
    for event in FILE_EVENTS:
        check.receive(event)
    for start in range(0, len(nar), step):
        check.receive_nar(nar[start : start + step])
    check.finish()


@pytest.mark.parametrize("step", [1, 31, 32, 33, 1000])
def test_references_to_itself_are_read_as_zeros(step: int) -> None:
    nar = b"-".join([b"%s"] * 5)
    positions = b"".join(b"|%d" % (33 * i) for i in range(5))
    zeros = nar.replace(b"%s", bytes(32))
    info = addressed(f"fixed:r:{digest_of(HashAlgorithm.SHA256, zeros + positions)}", to_self=True)
    check_trust(info, TrustedKeys(()))
    contents = nar.replace(b"%s", info.store_path.hash_part.encode())
    check = content_address_check(info)
    assert check is not None
    for start in range(0, len(contents), step):
        check.receive_nar(contents[start : start + step])
    check.finish()

    for bad in (zeros, contents.replace(b"-", b"+"), contents[:-33] + b"-" + bytes(32)):
        check = content_address_check(info)
        assert check is not None
        check.receive_nar(bad)
        with pytest.raises(ContentMismatch, match="but the contents have sha256:"):
            check.finish()
