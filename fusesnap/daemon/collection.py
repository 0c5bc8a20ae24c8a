"""Collecting garbage because a person says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fusesnap.config import Settings
from fusesnap.daemon.build import open_store
from fusesnap.nix.store_path import StoreDir
from fusesnap.store.collection import Survey
from fusesnap.store.local_store import Collected


def collect_garbage(
    settings: Settings, max_size: int | None, show: Callable[[int, int], None], *, dry_run: bool
) -> dict[str, Any]:
    """Remove what no root reaches until the store has at most ``max_size`` bytes; all of it for ``None``.

    ``show`` is called now and then with the bytes that are freed, and those to free. Returns JSON values: what was
    removed, or would be for ``dry_run``, and how the store stands; sizes in bytes on disk. Raises ``StorageFailure``.
    """
    store_dir = StoreDir(settings.store_dir)
    with open_store(settings, store_dir) as store:
        survey = store.survey()
        wanted = None if max_size is None else max(0, survey.size - max_size)
        done = would = Collected.of(survey.first(wanted))
        if not dry_run:
            done = store.collect(wanted, lambda so_far: show(so_far.size, would.size))
            survey = store.survey()
    return {
        "dry_run": dry_run,
        "removed": [store_dir.format(path) for path in done.paths],
        "freed": done.size,
        **standing(survey),
    }


def standing(survey: Survey) -> dict[str, int]:
    """How a store stands, as JSON values; sizes in bytes on disk."""
    return {
        "size": survey.size,
        "paths": survey.paths,
        "collectable_size": survey.collectable_size,
        "collectable_paths": len(survey.collectable),
    }
