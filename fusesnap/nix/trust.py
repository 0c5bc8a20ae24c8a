"""Whether what a cache says of a path can be believed.

Nix's rule (``ValidPathInfo::checkSignatures``): one good signature by a trusted key, or a store
path that is made of its contents. In the second case nobody vouches, so the contents themselves are
checked too while they come.
"""

from __future__ import annotations

from collections.abc import Iterator

from fusesnap.errors import ContentMismatch, InvalidData, UntrustedPath
from fusesnap.nix.content_address import ContentAddress, ContentAddressCheck, ContentAddressMethod
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.quoting import quote
from fusesnap.nix.signature import TrustedKeys


def check_trust(info: NarInfo, keys: TrustedKeys) -> None:
    """Raise :class:`UntrustedPath` with the reasons unless ``info`` can be believed.

    Where only its content address vouches for it, :func:`content_address_check` must be satisfied
    as well.
    """
    fingerprint = info.fingerprint()
    for signature in info.signatures:
        if any(key.verify(fingerprint, signature) for key in keys.named(signature.key_name)):
            return
    try:
        _check_content_address(info)
    except InvalidData as error:
        reasons = [*_faults_of_signatures(info, keys), str(error)]
        path = info.store_dir.format(info.store_path)
        raise UntrustedPath(f"{path} is not trusted: {'; '.join(reasons)}") from None


def content_address_check(info: NarInfo) -> ContentAddressCheck | None:
    """Return a check that the NAR must satisfy besides its own hash, if there is one.

    There is none for a path without a content address, or with one that says no more than the NAR's
    hash does, or with one that does not hold and so is no reason to trust the path. Raises
    :class:`ContentMismatch` where the content address is of another NAR than the NAR hash.
    """
    try:
        address = _check_content_address(info)
    except ContentMismatch:
        raise
    except InvalidData:
        return None
    if _is_nar_hash(address, info):
        return None
    refers_to_self = info.store_path in info.references
    return ContentAddressCheck(address, info.store_path if refers_to_self else None)


def _check_content_address(info: NarInfo) -> ContentAddress:
    """Return the content address of a path that is named by it.

    Raises :class:`InvalidData` for any other path.
    """
    if info.ca is None:
        raise InvalidData("it is not content-addressed")
    address = ContentAddress.parse(info.ca)
    others = [path for path in info.references if path != info.store_path]
    made = address.store_path(
        info.store_path.name,
        others,
        refers_to_self=len(others) < len(info.references),
        store_dir=info.store_dir,
    )
    if made != info.store_path:
        raise InvalidData(
            f"its content address {quote(info.ca)} is of {info.store_dir.format(made)}"
        )
    if _is_nar_hash(address, info) and address.hash != info.nar_hash:
        raise ContentMismatch(f"its content address is {address}, its NAR hash is {info.nar_hash}")
    return address


def _is_nar_hash(address: ContentAddress, info: NarInfo) -> bool:
    recursive = address.method is ContentAddressMethod.RECURSIVE
    return recursive and address.is_sha256 and info.store_path not in info.references


def _faults_of_signatures(info: NarInfo, keys: TrustedKeys) -> Iterator[str]:
    names = dict.fromkeys(signature.key_name for signature in info.signatures)
    if not names:
        yield "it is unsigned"
    wrong = [name for name in names if keys.named(name)]
    if wrong:
        yield f"the signature by trusted key {_listed(wrong)} is wrong"
    unknown = [name for name in names if not keys.named(name)]
    if unknown:
        only = "only " if not wrong else "also "
        yield f"it is {only}signed by {_listed(unknown)}, not trusted"


def _listed(names: list[str]) -> str:
    return " and ".join(map(quote, names))
