"""Names of images, as containerd makes them of references."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.images.digest import Digest
from fusesnap.images.reference import NixReference, parse_reference
from fusesnap.nix.store_path import HASH_PART_LENGTH, StoreDir
from fusesnap.services.image_unpack import chain_ids
from fusesnap.services.nix_images import full_name

STORE_DIR = StoreDir()
HASH = "0" * HASH_PART_LENGTH
PREFIX = f"nix:0/nix/store/{HASH}"
DIGEST = f"sha256:{'a' * 64}"


def reference(text: str) -> NixReference:
    parsed = parse_reference(text, STORE_DIR)
    assert parsed is not None
    return parsed


@pytest.mark.parametrize(
    ("text", "name"),
    [
        # What containerd has as it is, but for the tag.
        (f"{PREFIX}-redis-7.0", f"{PREFIX}-redis-7.0:latest"),
        (f"{PREFIX}-redis-7.0:latest", f"{PREFIX}-redis-7.0:latest"),
        (f"{PREFIX}-redis-7.0:V1", f"{PREFIX}-redis-7.0:V1"),
        (f"{PREFIX}--a__b", f"{PREFIX}--a__b:latest"),
        (PREFIX, f"{PREFIX}:latest"),
        # A digest takes the place of a tag.
        (f"{PREFIX}-redis@{DIGEST}", f"{PREFIX}-redis@{DIGEST}"),
        (f"{PREFIX}-redis:7@{DIGEST}", f"{PREFIX}-redis@{DIGEST}"),
        # What containerd has no name for.
        (f"{PREFIX}-Gtk+3", f"{PREFIX}-gtk-3:latest"),
        (f"{PREFIX}-redis..7", f"{PREFIX}-redis-7:latest"),
        (f"{PREFIX}-redis.", f"{PREFIX}-redis:latest"),
        (f"{PREFIX}-=", f"{PREFIX}:latest"),
        (f"{PREFIX}-{'x' * 211}", f"{PREFIX}:latest"),
    ],
)
def test_what_containerd_calls_an_image(text: str, name: str) -> None:
    assert full_name(reference(text)) == name


# No name of a store path begins with a dot.
spellings = st.text("abcXYZ019+-._?=", min_size=1, max_size=211).filter(lambda text: text[0] != ".")


@given(spellings)
def test_a_name_is_the_name_of_itself(spelling: str) -> None:
    name = full_name(reference(f"{PREFIX}-{spelling}"))
    assert full_name(reference(name)) == name
    assert len(name.rpartition(":")[0]) <= 255


def test_chain_ids() -> None:
    """As the OCI image specification says, ``config.md``."""
    diff_ids = [Digest.parse(f"sha256:{digit * 64}") for digit in "abc"]
    first, second, third = chain_ids(diff_ids)
    assert chain_ids([]) == []
    assert first == str(diff_ids[0])
    # sha256 of "<first> <diff ID of the second>", by sha256sum(1)
    assert second == "sha256:ccd722928bd92476ba1745586fed6e45a102504185ad88cd89e01ff116fd146c"
    assert third == "sha256:c1377126441fb2f5ec2c21ae2a60255331d639e830f0ee1b40a36e52d4c40588"
