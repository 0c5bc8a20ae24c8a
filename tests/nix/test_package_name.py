from __future__ import annotations

import pytest

from fusesnap.nix.package_name import PackageName


@pytest.mark.parametrize(
    ("name", "package", "output"),
    [
        ("redis-7.0.15", "redis", ""),
        ("glibc-2.38-44", "glibc", ""),
        ("glibc-2.38-44-bin", "glibc", "-bin"),
        ("python3.11-requests-2.31.0", "python3.11-requests", ""),
        ("perl5.38.2-URI-5.21-devdoc", "perl5.38.2-URI", "-devdoc"),
        ("hook", "hook", ""),
        ("nix-2.18.1-x86_64-linux", "nix", "-x86_64-linux"),
        ("font-awesome", "font-awesome", ""),
        ("a-", "a", ""),
        ("-", "", ""),
    ],
)
def test_a_name_is_a_package_a_version_and_perhaps_an_output(
    name: str, package: str, output: str
) -> None:
    assert PackageName.parse(name) == PackageName(package, output)
