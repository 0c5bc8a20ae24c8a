"""``fusesnap mount``, as root and as an ordinary user, of store paths and of images."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from testbed.binary_cache import CacheFiles, HttpCache, SigningKey, hash_part, http_cache
from testbed.fusesnap_daemon import PROGRAM, Source
from testbed.images import Directory, File, Layer, opaque, ordinary_layer, whiteout, write_image
from testbed.nix_store import NixStore
from testbed.processes import Service, run, run_unchecked, running
from testbed.synthetic import SimpleClosure

from .reading import fingerprint, restored, without_times

# The checkout may lie where root alone may read: so this ordinary user may read everything, and nothing else more.
NOBODY = (
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)
NixLayers = Callable[..., Layer]


@contextlib.contextmanager
def mounted(
    source: str | Path,
    mountpoint: Path,
    caches: Sequence[str],
    keys: Sequence[str],
    state: Path,
    wrapper: Sequence[str] = (),
) -> Iterator[Service]:
    """``fusesnap mount`` for the time of the context."""
    mountpoint.mkdir(exist_ok=True)
    command = [
        *wrapper,
        PROGRAM,
        "mount",
        "--state",
        state,
        *Source(caches, keys).options,
        source,
        mountpoint,
    ]
    with running(command, log=state.with_name("mount.log"), env={"HOME": str(state)}) as service:
        service.wait_for_line(str(source))
        yield service
    assert str(mountpoint) not in Path("/proc/self/mountinfo").read_text()


def mount_command(
    cache: HttpCache, key: SigningKey, state: Path, *words: str | Path
) -> list[str | Path]:
    """``fusesnap mount`` with this cache and key."""
    return [PROGRAM, "mount", "--state", state, *Source([cache.url], [key.public]).options, *words]


def test_a_store_path_shows_its_closure(
    cache: HttpCache, simple: SimpleClosure, nix_store: NixStore, key: SigningKey, tmp_path: Path
) -> None:
    with mounted(simple.root, tmp_path / "m", [cache.url], [key.public], tmp_path / "s"):
        names = os.listdir(tmp_path / "m/nix/store")
        assert sorted(f"/nix/store/{name}" for name in names) == sorted(simple.closure.paths)
        assert cache.requested_nars(simple.closure.paths) == set()
        for path in simple.closure.paths:
            expected = fingerprint(restored(nix_store, path, tmp_path), ".")
            assert without_times(fingerprint(tmp_path / "m", path)) == without_times(expected), path


def test_files_can_be_mapped_and_the_free_space_is_the_stores(
    cache: HttpCache, simple: SimpleClosure, nix_store: NixStore, key: SigningKey, tmp_path: Path
) -> None:
    with mounted(simple.root, tmp_path / "m", [cache.url], [key.public], tmp_path / "s"):
        data = tmp_path / "m" / simple.large.lstrip("/") / "data"
        expected = (nix_store.real(simple.large) / "data").read_bytes()
        with data.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            # From the end, in pages: no order that read-ahead would hope for.
            for start in range(len(mapped) - len(mapped) % 4096, -1, -4096 * 37):
                assert mapped[start : start + 4096] == expected[start : start + 4096]
            assert mapped[:] == expected
        shown, real = os.statvfs(tmp_path / "m"), os.statvfs(tmp_path / "s")
        assert (shown.f_blocks, shown.f_bsize) == (real.f_blocks, real.f_bsize)
        with pytest.raises(OSError, match="Read-only file system"):
            (tmp_path / "m/new").write_text("")


def test_a_bundle_tells_of_the_whole_closure_at_once(
    published: CacheFiles, simple: SimpleClosure, key: SigningKey, tmp_path: Path
) -> None:
    with http_cache(published, tmp_path / "nginx") as cache:
        cache.clear_requests()
        with mounted(simple.root, tmp_path / "m", [cache.url], [key.public], tmp_path / "s"):
            names = os.listdir(tmp_path / "m/nix/store")
            assert len(names) == len(simple.closure.paths)
            said = (tmp_path / f"m{simple.script}").read_bytes()
            assert b"hello from a store path" in said
        asked = {request.path for request in cache.requests()}
    assert f"/bundle/{hash_part(simple.root)}" in asked
    assert [path for path in asked if path.endswith((".narinfo", ".narindex"))] == []


def test_only_what_is_read_is_fetched(
    cache: HttpCache, simple: SimpleClosure, key: SigningKey, tmp_path: Path
) -> None:
    with mounted(simple.root, tmp_path / "m", [cache.url], [key.public], tmp_path / "s"):
        program = tmp_path / "m" / simple.busybox.lstrip("/") / "bin/echo"
        assert run([program, "from", "a", "lazy", "path"]) == "from a lazy path\n"
    assert cache.requested_nars(simple.closure.paths) == {simple.busybox}


def test_many_readers_share_one_transfer(
    cache: HttpCache, simple: SimpleClosure, key: SigningKey, tmp_path: Path
) -> None:
    with mounted(simple.root, tmp_path / "m", [cache.url], [key.public], tmp_path / "s"):
        data = tmp_path / "m" / simple.large.lstrip("/") / "data"
        readers = [
            subprocess.Popen(["sha256sum", data], stdout=subprocess.PIPE, text=True)
            for _ in range(16)
        ]
        sums = {reader.communicate()[0] for reader in readers}
    assert len(sums) == 1
    nar = "/" + cache.files.narinfo(simple.large)["URL"]
    assert [request.path for request in cache.requests()].count(nar) == 1


@pytest.fixture
def fuse_for_everyone() -> Iterator[None]:
    """As udev sets it up (50-udev-default.rules); a machine without udev has it for root alone."""
    device = Path("/dev/fuse")
    before = device.stat().st_mode & 0o777
    device.chmod(0o666)
    yield
    device.chmod(before)


@pytest.mark.usefixtures("fuse_for_everyone")
def test_an_ordinary_user_mounts_too(
    cache: HttpCache, simple: SimpleClosure, key: SigningKey, work: Path
) -> None:
    work.chmod(0o755)
    home = work / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    (home / "m").mkdir()
    os.chown(home / "m", 65534, 65534)
    with mounted(simple.root, home / "m", [cache.url], [key.public], home / "s", NOBODY):
        file = home / "m" / simple.text.lstrip("/")
        assert run([*NOBODY, "cat", file]) == "a text that is its own address\n"
        listing = run([*NOBODY, "ls", home / "m" / simple.tree.lstrip("/") / "wide"])
        assert len(listing.splitlines()) == 1000


@pytest.fixture
def image(nix_layers: NixLayers, simple: SimpleClosure, tmp_path: Path) -> Path:
    """Ordinary layers below and above a Nix layer, with everything that they can do to it."""
    unused = simple.unused.lstrip("/")
    tree = simple.tree.lstrip("/")
    large = simple.large.lstrip("/")
    below = ordinary_layer(
        {
            "etc/one": b"1\n",
            "etc/two": b"2\n",
            "gone/a": b"",
            "kept": File(b"x", mode=0o4755, uid=12, gid=34, mtime=56),
            "link": "etc/one",
        }
    )
    above = ordinary_layer(
        {
            whiteout("etc/two"): File(),
            opaque("gone"): File(),
            "gone/b": b"b",
            whiteout(unused): File(),
            f"{tree}/added": b"added\n",
            f"{tree}/odd/added": b"too\n",
            whiteout(f"{tree}/self"): File(),
            f"{tree}/executable": b"replaced\n",
            large: Directory(mode=0o700),
            opaque(large): File(),
            f"{large}/mine": b"mine\n",
        }
    )
    return write_image(tmp_path / "image.tar", [below, nix_layers(), above], name="t:1")


@pytest.mark.parametrize("kind", ["oci-archive", "oci"])
def test_an_image_is_merged_with_the_store(
    kind: str,
    image: Path,
    cache: HttpCache,
    simple: SimpleClosure,
    key: SigningKey,
    tmp_path: Path,
) -> None:
    source = f"oci-archive:{image}"
    if kind == "oci":
        run(["skopeo", "--insecure-policy", "copy", "-q", source, f"oci:{tmp_path}/layout:t"])
        source = f"oci:{tmp_path}/layout"
    with mounted(source, tmp_path / "m", [cache.url], [key.public], tmp_path / "s"):
        root = tmp_path / "m"
        tree = root / simple.tree.lstrip("/")
        assert os.listdir(root / "etc") == ["one"]
        assert os.listdir(root / "gone") == ["b"]
        kept = (root / "kept").stat()
        assert (kept.st_mode & 0o7777, kept.st_uid, kept.st_gid, kept.st_mtime) == (
            0o4755,
            12,
            34,
            56,
        )
        assert (root / "link").readlink() == Path("etc/one")
        assert not (root / simple.unused.lstrip("/")).exists()
        assert (tree / "added").read_text() == "added\n"
        assert (tree / "odd/added").read_text() == "too\n"
        assert not (tree / "self").exists()
        assert "self" not in os.listdir(tree)
        assert (tree / "executable").read_text() == "replaced\n"
        assert (tree / "wide/file-7").read_text() == "7\n"
        assert len(os.listdir(tree / "odd")) == 17
        assert os.listdir(root / simple.large.lstrip("/")) == ["mine"]
        assert run([root / simple.busybox.lstrip("/") / "bin/echo", "lazy"]) == "lazy\n"


def test_in_the_background_it_returns_once_it_is_mounted(
    cache: HttpCache, simple: SimpleClosure, key: SigningKey, tmp_path: Path
) -> None:
    mountpoint = tmp_path / "m"
    mountpoint.mkdir()
    said = run(mount_command(cache, key, tmp_path / "s", "--background", simple.root, mountpoint))
    assert said.startswith(f"{simple.root} is mounted at {mountpoint}")
    assert (mountpoint / simple.text.lstrip("/")).read_text() == "a text that is its own address\n"
    run(["umount", mountpoint])


def test_in_the_background_an_error_is_said_and_nothing_goes_on(
    cache: HttpCache, key: SigningKey, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    source = "/nix/store/00000000000000000000000000000000-nothing"
    done = run_unchecked(
        mount_command(cache, key, tmp_path / "s", "--background", source, tmp_path / "m")
    )
    assert (done.returncode, done.stdout) == (66, "")
    assert "no substituter has it" in done.stderr
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_a_mount_through_a_link_is_known_by_its_own_name(
    cache: HttpCache, simple: SimpleClosure, key: SigningKey, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    link = tmp_path / "link"
    link.symlink_to("m")
    command = mount_command(cache, key, tmp_path / "s", simple.root, link)
    with running(command, log=tmp_path / "log") as service:
        service.wait_for_line(simple.root)
        assert "mounted there already" in run_unchecked(command).stderr
        service.kill()
        done = run_unchecked(command)  # the mount is there still, and nobody answers
        run(["umount", tmp_path / "m"])
    assert "mounted there already" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_working_directory_is_no_place_to_import_from(
    cache: HttpCache, simple: SimpleClosure, key: SigningKey, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "select.py").write_text("raise SystemExit('imported')\n")
    run(
        mount_command(cache, key, tmp_path / "s", "--background", simple.root, tmp_path / "m"),
        cwd=tmp_path,
    )
    run(["umount", tmp_path / "m"])


def test_the_state_directory_of_the_configuration_is_used(
    cache: HttpCache, simple: SimpleClosure, key: SigningKey, tmp_path: Path
) -> None:
    (tmp_path / "fusesnap.toml").write_text(
        f'root = "{tmp_path}/elsewhere"\nsubstituters = ["{cache.url}"]\n'
        f'trusted-public-keys = ["{key.public}"]\n'
    )
    run([PROGRAM, "prefetch", "--config", tmp_path / "fusesnap.toml", simple.text])
    store = tmp_path / "elsewhere/layer/.fusesnap-store"
    assert os.listdir(store) == [Path(simple.text).name]


@pytest.mark.parametrize("what", ["missing", "file", "full", "mounted"])
def test_a_mount_point_that_will_not_do(
    what: str, cache: HttpCache, simple: SimpleClosure, key: SigningKey, tmp_path: Path
) -> None:
    mountpoint = tmp_path / "m"
    command = mount_command(cache, key, tmp_path / "s2", simple.root, mountpoint)
    with contextlib.ExitStack() as stack:
        if what == "file":
            mountpoint.write_text("")
        elif what == "full":
            (mountpoint / "something").mkdir(parents=True)
        elif what == "mounted":
            arguments = ([cache.url], [key.public], tmp_path / "s")
            stack.enter_context(mounted(simple.root, mountpoint, *arguments))
        done = run_unchecked(command)
    words = {
        "missing": f"{mountpoint}: no such directory",
        "file": f"{mountpoint}: not a directory",
        "full": f"{mountpoint}: not empty",
        "mounted": f"{mountpoint}: something is mounted there already",
    }
    assert words[what] in done.stderr
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("source", "said", "code"),
    [
        ("oci-archive:/no/such/file", "/no/such/file", 74),
        ("/nix/store/short", "'short' is not a store path", 65),
        ("/nix/store/00000000000000000000000000000000-nothing", "no substituter has it", 66),
        ("nonsense", "nonsense", 78),
    ],
)
def test_a_source_that_is_none(
    source: str, said: str, code: int, cache: HttpCache, key: SigningKey, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    done = run_unchecked(mount_command(cache, key, tmp_path / "s", source, tmp_path / "m"))
    assert said in done.stderr
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)


def test_without_a_key_nothing_is_trusted(
    cache: HttpCache, simple: SimpleClosure, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    done = run_unchecked(
        [PROGRAM, "mount", "--state", tmp_path / "s", "-s", cache.url, simple.root, tmp_path / "m"]
    )
    assert done.returncode == 77
    assert "testbed-1" in done.stderr


def test_a_machine_without_fuse_is_told_what_to_do(
    cache: HttpCache, simple: SimpleClosure, key: SigningKey, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    mount = mount_command(cache, key, tmp_path / "s", simple.root, tmp_path / "m")
    # A /dev without fuse, seen by this command alone.
    hide = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    done = run_unchecked(["unshare", "--mount", "sh", "-c", f'{hide} && exec "$@"', "sh", *mount])
    assert done.returncode == 69
    assert "/dev/fuse is not there" in done.stderr


def test_on_a_full_disk_a_reader_is_told_so_and_others_go_on(
    cache: HttpCache, simple: SimpleClosure, key: SigningKey, tmp_path: Path
) -> None:
    disk, view = tmp_path / "disk", tmp_path / "m"
    disk.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk])
    try:
        with mounted(simple.root, view, [cache.url], [key.public], disk / "s") as service:
            large = view / simple.large.lstrip("/") / "data"
            script = view / simple.script.lstrip("/")
            for _ in range(2):
                with pytest.raises(OSError, match="No space left on device") as caught:
                    large.read_bytes()
                assert caught.value.errno == errno.ENOSPC
                assert b"hello" in script.read_bytes()
            assert simple.large.rpartition("/")[2] in service.log_text()
            run(["mount", "-o", "remount,size=40m", disk])
            assert len(large.read_bytes()) == 5_000_000
    finally:
        run(["umount", disk])
