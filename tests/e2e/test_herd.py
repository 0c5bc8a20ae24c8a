"""Many containers of several images start at once on a node that has nothing: `scripts/bench herd` in small."""

from __future__ import annotations

from pathlib import Path

from benchmarks.herd import KIB, Line, fetched_again, prepare
from benchmarks.resident import MIB
from testbed.disk_usage import store_watched, taken_by_store
from testbed.workplace import default_work

CONTAINERS, IMAGES = 20, 4
# All processes of the daemon together hold some 190 MiB with nothing to do.
MEMORY = 400 * MIB


def test_each_nar_of_a_herd_crosses_the_link_once(work: Path, tmp_path: Path) -> None:
    bench = prepare(
        tmp_path,
        default_work(),
        images=IMAGES,
        shared=[100 * KIB] * 2,
        own=[100 * KIB] * 3,
        line=Line(),
    )
    with bench.node(work) as node:
        herd = node.herd(bench.images, "fusesnap")
        before = node.link.down()
        with node.memory() as peaks:
            herd.start(CONTAINERS)  # raises if one did not read all that it should
        paths = {path.store_path for image in bench.images for path in image.paths}
        asked = {each.path for each in node.cache.requests() if each.path.startswith("/nar/")}
        assert len(asked) == len(paths)
        assert fetched_again(node.cache) == set()
        # Heads of answers, and what is on its way when something gives way to a reader.
        assert bench.size <= node.link.down() - before <= 1.1 * bench.size + 300_000
        assert peaks.total_pss < MEMORY


def test_the_size_limit_holds_while_a_herd_starts_on_a_node_full_of_old_images(
    work: Path, tmp_path: Path
) -> None:
    own = [200 * KIB] * 4
    bench = prepare(
        tmp_path, default_work(), images=2 * IMAGES, shared=[], own=own, line=Line(rate=200e6)
    )
    # All of the new images fit, and half of the old ones beside them. The shell's path is in all of them.
    limit = 2 * MIB + IMAGES * 3 * sum(own) // 2
    settings = work / "limit.toml"
    settings.write_text(f"[store]\nmax-size = {limit}\n")
    with bench.node(work, ["--config", settings]) as node:
        old = node.herd(bench.images[:IMAGES], "fusesnap")
        old.start(IMAGES)
        old.remove_images()
        full = taken_by_store(node.daemon.state)
        assert full > IMAGES * sum(own)
        new = node.herd(bench.images[IMAGES:], "fusesnap")
        with store_watched(node.daemon.state) as most:
            new.start(CONTAINERS)
        assert full < most.size <= limit
        names = {
            path.store_path.base_name for image in bench.images[IMAGES:] for path in image.paths
        }
        store = node.daemon.state / "layer/.fusesnap-store"
        assert names <= {path.name for path in store.iterdir()}
