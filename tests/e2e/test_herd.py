"""Many containers of several images start at once on a node that has nothing: `scripts/bench herd` in small."""

from __future__ import annotations

from pathlib import Path

from benchmarks.herd import KIB, Line, fetched_again, prepare
from benchmarks.resident import MIB
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
