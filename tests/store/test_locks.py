from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from fusesnap.errors import StorageFailure
from fusesnap.store import locks
from fusesnap.store.locks import directory_lock, path_lock, path_lock_if_free


def test_a_path_is_locked_once(tmp_path: Path) -> None:
    with path_lock(tmp_path, "a"):
        with pytest.raises(StorageFailure, match=r"cannot lock .*/a.lock: another") as caught:
            path_lock(tmp_path, "a", wait_seconds=0).__enter__()
        assert caught.value.errno == errno.ETIMEDOUT
        with path_lock_if_free(tmp_path, "a") as free:
            assert not free
        with path_lock(tmp_path, "b", wait_seconds=0), path_lock_if_free(tmp_path, "c") as free:
            assert free
    with path_lock(tmp_path, "a", wait_seconds=0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_within_unlocks(tmp_path: Path) -> None:
    with pytest.raises(KeyError), path_lock(tmp_path, "a"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mark", [b"d", b""], ids=["as nix", "killed in between"])
def test_a_lock_file_that_was_removed_meanwhile_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: bytes
) -> None:
    """Its owner removed it between our open and our lock; another owner makes a new one."""
    lock = tmp_path / "a.lock"
    opened: list[int] = []
    original = locks._open_lock_file

    def open_and_lose(path: Path) -> int:
        descriptor = original(path)
        opened.append(descriptor)
        if len(opened) == 1:
            lock.write_bytes(mark)
            lock.unlink()
        return descriptor

    monkeypatch.setattr(locks, "_open_lock_file", open_and_lose)
    with path_lock(tmp_path, "a", wait_seconds=0):
        assert len(opened) == 2
        assert lock.exists()


def test_who_waits_for_our_lock_sees_that_it_is_stale(tmp_path: Path) -> None:
    """Nix looks at the size of the file that it has locked."""
    with path_lock(tmp_path, "a"):
        waiting = (tmp_path / "a.lock").open("rb")
    with waiting:
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert waiting.read() == b"d"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.lock").symlink_to(tmp_path / "outside")
    with pytest.raises(StorageFailure) as caught:
        path_lock(tmp_path, "a", wait_seconds=0).__enter__()
    assert caught.value.errno == errno.ELOOP
    assert not (tmp_path / "outside").exists()


def test_a_directory_is_locked_once(tmp_path: Path) -> None:
    with directory_lock(tmp_path), pytest.raises(StorageFailure, match="cannot lock"):
        directory_lock(tmp_path, wait_seconds=0).__enter__()
    with directory_lock(tmp_path, wait_seconds=0):
        pass
    with pytest.raises(StorageFailure, match="No such file"):
        directory_lock(tmp_path / "no").__enter__()
