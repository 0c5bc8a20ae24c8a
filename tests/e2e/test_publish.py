"""What ``fusesnap publish`` writes is a binary cache to every Nix."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from testbed.binary_cache import CacheFiles, SigningKey, signing_key
from testbed.debian import NIXES, nix_command
from testbed.nix_store import NixStore
from testbed.processes import CommandFailed, run
from testbed.synthetic import SimpleClosure

from fusesnap.cli.app import main

from .conftest import Publish

CONFIG = "experimental-features = nix-command\nsandbox = false\nbuild-users-group =\n"


def copy(nix: list[str], cache: CacheFiles, target: Path, public_key: str, root: str) -> None:
    """Substitute a closure, with signatures checked."""
    options = ["--option", "require-sigs", "true", "--option", "trusted-public-keys", public_key]
    run(
        [*nix, "copy", "--from", f"file://{cache.directory}", "--to", f"local?root={target}", *options, root],
        env={"NIX_CONFIG": CONFIG, "HOME": str(target)},
    )  # fmt: skip


@pytest.mark.parametrize("version", ["the host's", *NIXES])
def test_real_nix_substitutes_every_path(
    published: CacheFiles, simple: SimpleClosure, key: SigningKey, tmp_path: Path, version: str
) -> None:
    nix = nix_command(version) if version in NIXES else ["nix"]
    with pytest.raises(CommandFailed, match="signature"):
        other = signing_key(tmp_path / "keys", key.public.partition(":")[0]).public
        copy(nix, published, tmp_path / "refused", other, simple.root)
    copy(nix, published, tmp_path / "store", key.public, simple.root)
    verify = ["nix-store", "--store", f"local?root={tmp_path / 'store'}"]
    run([*verify, "--verify", "--check-contents"], env={"NIX_CONFIG": CONFIG})
    valid = run([*verify, "--query", "--requisites", simple.root], env={"NIX_CONFIG": CONFIG})
    assert set(valid.split()) == set(simple.closure.paths)


def test_a_cache_is_published_again_from_itself_and_checked(
    published: CacheFiles, simple: SimpleClosure, key: SigningKey, tmp_path: Path, publish: Publish
) -> None:
    second, url = tmp_path / "second", f"file://{published.directory}"
    options = ("--to", second, "--secret-key-file", key.secret_file)
    trusted = ("--trusted-public-key", key.public)
    done = publish("--from", url, *options, *trusted, "--closure", "--json", simple.root)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert {f"/nix/store/{each['path']}" for each in results["paths"]} == set(simple.closure.paths)
    (bundle,) = results["bundles"]
    assert (second / bundle["names"][0]).read_bytes() == (second / bundle["names"][1]).read_bytes()
    checked = publish("--check", "--to", second, *trusted)
    count = len(simple.closure.paths)
    assert checked.returncode == 0, checked.stdout
    assert f"{count} are well, 0 have no index, 0 paths that they reference" in checked.stdout
    assert "2 bundles: 2 are well" in checked.stdout


def test_a_damaged_cache_is_told(
    published: CacheFiles, simple: SimpleClosure, key: SigningKey, publish: Publish
) -> None:
    file = published.nar_file(simple.root)
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        done = publish("--check", "--to", published.directory, "--trusted-public-key", key.public)
    finally:
        file.write_bytes(good)
    assert done.returncode == 65
    assert done.stdout.startswith(Path(simple.root).name)
    assert "1 of" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--to", "x"], 2, "Missing option '--secret-key-file'"),
        (["--check", "--to", "x"], 78, "nothing can be checked without a key"),
        (["--to", "x", "--secret-key-file", "KEY"], 2, "Missing argument 'PATH...'"),
        (["--to", "x", "--secret-key-file", "KEY", "--trace", "BAD", "ROOT"], 2, "--trace needs --closure"),
        (["--to", "x", "--secret-key-file", "KEY", "--closure", "--trace", "BAD", "ROOT"], 65, "bad-key: "),
        (["--to", "ftp://x", "--secret-key-file", "KEY", "/nix/store/x"], 65, "is not a store path"),
        (["--to", "ftp://x", "--secret-key-file", "KEY", "--from", "STORE", "ROOT"], 78, "scheme is 'ftp'"),
        (["--to", "x", "--secret-key-file", "BAD", "ROOT"], 65, "bad-key: secret key is not"),
        (["--to", "x", "--secret-key-file", "KEY", "--from", "/proc", "ROOT"], 78, "no store there"),
        (["--to", "OUT", "--secret-key-file", "KEY", "--from", "STORE", "GONE"], 66, "not valid in"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(
    arguments: list[str],
    code: int,
    said: str,
    nix_store: NixStore,
    simple: SimpleClosure,
    key: SigningKey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad-key").write_text("no key")
    words = {
        "BAD": str(tmp_path / "bad-key"),
        "KEY": str(key.secret_file),
        "STORE": str(nix_store.directory),
        "ROOT": simple.root,
        "GONE": "/nix/store/" + "0" * 32 + "-gone",
        "OUT": str(tmp_path / "out"),
    }
    command = ["fusesnap", "publish", *(words.get(word, word) for word in arguments)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    complaint = capsys.readouterr().err
    assert (ended.value.code, said in complaint) == (code, True), complaint
