"""Settings: what is not said, what is said twice, and what is said wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusesnap.config import DEFAULT_KEY, DEFAULT_SUBSTITUTER, MetricsAddress, load, parse_size
from fusesnap.errors import InvalidConfiguration

KEY = "testbed-1:" + "A" * 43 + "="


def write(directory: Path, text: str) -> Path:
    path = directory / "fusesnap.toml"
    path.write_text(text)
    return path


def test_without_anything_said_it_is_the_public_cache_and_its_key() -> None:
    settings = load(None, {})
    assert settings.substituters == [DEFAULT_SUBSTITUTER]
    assert settings.trusted_public_keys == [DEFAULT_KEY]
    assert settings.socket == Path("/var/lib/fusesnap/fusesnap.sock")


def test_the_public_caches_key_does_not_vouch_for_another_cache() -> None:
    settings = load(None, {"substituters": ["https://cache.example.org/"]})
    assert settings.substituters == ["https://cache.example.org"]
    assert settings.trusted_public_keys == []


def test_the_command_line_comes_on_top_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f'root = "/a"\nsubstituters = ["http://x"]\ntrusted-public-keys = ["{KEY}"]\n'
        "[fetch]\ntransfers = 3\n",
    )
    settings = load(path, {"root": "/b", "substituters": [], "address": None})
    assert settings.root == Path("/b")
    assert settings.substituters == ["http://x"]
    assert settings.trusted_public_keys == [KEY]
    assert settings.fetch.transfers == 3
    assert settings.fetch.lookups == 64


def test_a_state_directory_in_the_file_comes_before_the_usual_one(tmp_path: Path) -> None:
    usual = Path("/usual")
    assert load(None, {"root": None}, root=usual).root == usual
    assert load(write(tmp_path, ""), {"root": None}, root=usual).root == usual
    assert load(write(tmp_path, 'root = "/a"'), {"root": None}, root=usual).root == Path("/a")
    assert load(write(tmp_path, 'root = "/a"'), {"root": "/b"}, root=usual).root == Path("/b")


@pytest.mark.parametrize(
    ("text", "offender"),
    [
        ('colour = "red"', "unknown key 'colour'; known are address"),
        ("[fetch]\ncolour = 1", "unknown key 'fetch.colour'; known are bandwidth"),
        ('substituters = ["ftp://x"]', "'ftp://x': a substituter is"),
        ('trusted-public-keys = ["nonsense"]', "trusted-public-keys"),
        ('store-dir = "nix/store"', "'nix/store': an absolute path"),
        ("[fetch]\ntransfers = 0", "fetch.transfers"),
        ("root = ", "not a TOML file"),
        ('root = "here"', "root: 'here': an absolute path is expected"),
        ('address = "here.sock"', "address: 'here.sock': an absolute path is expected"),
        ('root = "/a\\u0000b"', "root: '/a\\x00b': an absolute path"),
        ('store-dir = "/nix/store/../x"', "store-dir: store directory '/nix/store/../x' is not"),
        ('substituters = ["http://"]', "'http://': a substituter's URL names a host"),
        ('substituters = ["https://[::1"]', "substituters: Invalid IPv6 URL"),
        ('substituters = ["file:///"]', "'file:///': a substituter's URL names a directory"),
        ("[fetch]\nstall-timeout = inf", "fetch.stall-timeout: Input should be a finite number"),
        ("trusted_public_keys = []", "unknown key 'trusted_public_keys'; known are"),
        ('recognise-by-content = "perhaps"', "recognise-by-content"),
    ],
)
def test_an_error_names_file_key_and_expectation(tmp_path: Path, text: str, offender: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InvalidConfiguration) as caught:
        load(path, {})
    assert str(path) in str(caught.value)
    assert offender in str(caught.value)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        load(write(tmp_path, "colour = 1\nshape = 2"), {})
    assert len(str(caught.value).splitlines()) == 2


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r"absent\.toml: No such file"):
        load(tmp_path / "absent.toml", {})


def test_settings_survive_the_way_to_another_process() -> None:
    settings = load(None, {"fetch": {"transfers": 5}})
    values: dict[str, Any] = settings.model_dump(mode="json", by_alias=True)
    assert load(None, values) == settings


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("500K", 500 << 10),
        ("1.5g", 3 << 29),
        ("2 TiB".replace(" ", ""), 2 << 40),
        (" 10MB ", 10 << 20),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", -1, "1.5", 1.5, True, "10X", "G", "1e9", None])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="a number of bytes is expected"):
        parse_size(text)


def test_limits_of_the_store(tmp_path: Path) -> None:
    file = tmp_path / "fusesnap.toml"
    file.write_text('[store]\nmax-size = "50G"\nmin-free = 1000\n')
    store = load(file, {}).store
    assert (store.max_size, store.min_free) == (50 << 30, 1000)
    file.write_text('[store]\nmax-size = "much"\n')
    with pytest.raises(InvalidConfiguration, match=r"store\.max-size: 'much': a number of bytes"):
        load(file, {})
    file.write_text("[store]\nmaximum = 1\n")
    with pytest.raises(InvalidConfiguration, match=r"'store\.maximum'; known are check-every, max"):
        load(file, {})


def test_tokens_are_by_cache_and_only_servers_take_them(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'ca-file = "/etc/ca.pem"\n[token-files]\n"https://cache.example.org" = "/run/token"\n',
    )
    settings = load(path, {})
    assert settings.token_files == {"https://cache.example.org": Path("/run/token")}
    assert settings.ca_file == Path("/etc/ca.pem")
    path = write(tmp_path, '[token-files]\n"cache.example.org" = "/run/token"\n')
    with pytest.raises(
        InvalidConfiguration, match=r"token-files: 'cache.example.org': the https://"
    ):
        load(path, {})


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9464", MetricsAddress("127.0.0.1", 9464)),
        ("[::1]:9464", MetricsAddress("::1", 9464)),
        ("node.example.org:0", MetricsAddress("node.example.org", 0)),
        ("unix:/run/m.sock", MetricsAddress(path="/run/m.sock")),
    ],
)
def test_metrics_are_at_an_address_or_a_socket(
    tmp_path: Path, text: str, address: MetricsAddress
) -> None:
    settings = load(write(tmp_path, f'metrics = "{text}"\n'), {})
    assert settings.metrics == text
    assert MetricsAddress.parse(text) == address


@pytest.mark.parametrize(
    "text",
    ["", ":9464", "9464", "host", "host:", "host:http", "::1:9464", "host:99999", "unix:relative"],
)
def test_another_address_of_metrics_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidConfiguration, match=r"fusesnap.toml: metrics: .*(expected|port)"):
        load(write(tmp_path, f'metrics = "{text}"\n'), {})


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        ("", {"loader", "references"}),
        ("complete = false", {"loader"}),
        ('complete = false\nlook-ahead = "references"', {"references"}),
        ('look-ahead = "none"', set()),
    ],
)
def test_bytes_that_may_cost_something_are_not_fetched_on_a_guess(
    tmp_path: Path, text: str, follows: set[str]
) -> None:
    settings = load(write(tmp_path, f"[fetch]\n{text}\n"), {})
    assert settings.fetch.follows == follows
