"""What people say to ``fusesnap trace``, and what it says to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fusesnap.cli.app import cli
from fusesnap.errors import FusesnapError, InvalidArgument, InvalidData, NotFound, StorageFailure
from fusesnap.fetch.traces.database import NAME, Origin, TraceDatabase
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.startup_trace import Flaw, Lack, StartupTrace, merge_traces
from fusesnap.nix.startup_trace_text import check_trace_trust, format_trace, parse_trace
from fusesnap.nix.trace_labels import parse_trace_labels

from ..nix.traces import CLOSURE, DATA, GLIBC, HELLO, WELL, example
from ..substituter.samples import KEY

Trace = Callable[..., Result]
PARTIAL = replace(
    example(),
    closure=ClosureDigest("6" * 64),
    circumstances=replace(
        WELL,
        flaws=frozenset({Flaw.SHARED, Flaw.INTERRUPTED}),
        lacks=((HELLO, Lack.CACHED), (GLIBC, Lack.COMMITTED)),
    ),
)


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    """Run ``fusesnap trace`` on a node that has one complete trace."""
    put(tmp_path, example())

    def run(*words: str | Path, stdin: bytes | None = None) -> Result:
        done = CliRunner().invoke(
            cli, ["trace", *map(str, words), "--state", str(tmp_path)], input=stdin
        )
        if isinstance(done.exception, FusesnapError):
            raise done.exception
        return done

    return run


def put(state: Path, *traces: StartupTrace) -> None:
    database = TraceDatabase(state / NAME)
    for each in traces:
        database.put(each, Origin.RECORDED, 1_790_000_000)
    database.close()


def test_the_list_says_what_each_is(trace: Trace, tmp_path: Path) -> None:
    put(tmp_path, PARTIAL)
    lines = trace("list").stdout.splitlines()
    assert " ".join(lines[0].split()) == "CLOSURE FROM RECORDED STARTS READS FILES PATHS RAN"
    assert lines[1].split()[0] == "5" * 12
    assert lines[1].endswith("complete  hello/bin/hello")
    assert lines[2].split()[0] == "6" * 12
    assert "partial" in lines[2]
    listed = json.loads(trace("list", "--json").stdout)
    assert [each["complete"] for each in listed] == [True, False]
    assert listed[1]["lacks"] == [
        {"path": str(HELLO), "why": "cached"},
        {"path": str(GLIBC), "why": "committed"},
    ]


def test_a_node_without_traces_says_so(trace: Trace) -> None:
    assert trace("remove", "hello").stdout == f"{CLOSURE}: 1 forgotten\n"
    assert trace("list").stdout == "no start was recorded here yet\n"
    assert json.loads(trace("list", "--json").stdout) == []


@pytest.mark.parametrize("name", ["555555", "5" * 64, "hello", str(GLIBC), f"/nix/store/{DATA}"])
def test_a_trace_goes_by_many_names(trace: Trace, name: str) -> None:
    assert parse_trace(trace("export", name).stdout_bytes) == example()


def test_other_names_are_nobodys(trace: Trace, tmp_path: Path) -> None:
    for name in ("glibc", "5", "777777", "0" * 32 + "-hello", "hell"):
        with pytest.raises(NotFound, match="`fusesnap trace list` shows those"):
            trace("show", name)
    put(tmp_path, PARTIAL)
    with pytest.raises(InvalidArgument, match=r"5{12} .hello/bin/hello., 6{12}"):
        trace("show", "hello")
    assert "partial" in trace("show", "666666").stdout


def test_it_is_shown_in_order(trace: Trace, tmp_path: Path) -> None:
    said = trace("show", "hello").stdout
    assert "reads      50.8 kB in 3 pieces of 2 files in 3 paths" in said
    assert "state      complete" in said
    rows = [line.split() for line in said.splitlines()[-6:]]
    assert [row[-1] for row in rows] == [
        "FILE",
        str(HELLO),
        "bin/hello",
        str(GLIBC),
        "lib/libc.so.6",
        str(DATA),
    ]
    pieces = trace("show", "hello", "--extents").stdout.splitlines()[-3:]
    assert pieces[1].split() == ["0", "16384", f"{GLIBC}/lib/libc.so.6"]
    whole = json.loads(trace("show", "hello", "--json").stdout)
    assert whole["files"][1] == {
        "path": 1,
        "entry": 7,
        "size": 2_000_000,
        "name": "lib/libc.so.6",
    }
    assert whole["extents"][1] == {"file": 1, "offset": 0, "length": 16384}
    put(tmp_path, PARTIAL)
    said = trace("show", "666666").stdout
    assert (
        "partial: 1 paths were in the store already; the kernel may have had parts of 1 paths;"
        " the worker died in the middle of it; others read the same paths at the same time" in said
    )


def test_what_is_exported_can_be_imported(trace: Trace, tmp_path: Path) -> None:
    file = tmp_path / "file.trace"
    trace("export", "hello", "-o", file)
    trace("remove", "hello")
    assert trace("import", file).stdout == f"{CLOSURE}: 3 paths, {example().size} bytes\n"
    assert json.loads(trace("list", "--json").stdout)[0]["origin"] == "imported"
    trace("remove", "hello")
    trace("import", "-", stdin=file.read_bytes())
    assert trace("export", "hello").stdout_bytes == file.read_bytes()
    assert "hello/bin/hello" in trace("show", file).stdout


def test_what_is_no_trace_is_named_and_nothing_is_imported(trace: Trace, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(format_trace(PARTIAL)[:-1])
    (tmp_path / "good").write_bytes(format_trace(PARTIAL))
    with pytest.raises(InvalidData, match="bad: startup trace: cut short"):
        trace("import", tmp_path / "good", tmp_path / "bad")
    assert len(json.loads(trace("list", "--json").stdout)) == 1
    with pytest.raises(StorageFailure, match=r"cannot read .*nowhere: No such file"):
        trace("import", tmp_path / "nowhere")


def test_it_is_signed_for_a_cache(trace: Trace, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(f"{KEY}\n")
    (tmp_path / "cache").mkdir()
    refused = trace("export", "hello", "--cache", tmp_path / "cache")
    assert refused.exit_code == 2
    assert "without --secret-key-file" in refused.output
    trace("export", "hello", "--cache", tmp_path / "cache", "--secret-key-file", key)
    written = parse_trace((tmp_path / "cache/trace" / CLOSURE.hex).read_bytes())
    check_trace_trust(written, TrustedKeys((KEY.public_key(),)))
    said = trace("export", "hello", "--annotations", "--secret-key-file", key).stdout
    assert parse_trace_labels(json.loads(said)) == written
    refused = trace("export", "hello", "--annotations")
    assert "--annotations: nodes would not trust it" in refused.output
    key.write_text("name:no")
    with pytest.raises(InvalidData, match="key: secret key"):
        trace("export", "hello", "--secret-key-file", key)


def test_several_become_one(trace: Trace, tmp_path: Path) -> None:
    other = replace(example(), extents=example().extents[:1])
    (tmp_path / "other").write_bytes(format_trace(other))
    merged = parse_trace(trace("merge", tmp_path / "other", "hello").stdout_bytes)
    assert merged == merge_traces([other, example()])
    (tmp_path / "stranger").write_bytes(format_trace(PARTIAL))
    with pytest.raises(InvalidData, match="cannot be merged"):
        trace("merge", "hello", tmp_path / "stranger")


def test_names_are_completed(trace: Trace, tmp_path: Path) -> None:
    asked = CliRunner().invoke(
        cli,
        prog_name="fusesnap",
        env={
            "_FUSESNAP_COMPLETE": "bash_complete",
            "COMP_WORDS": f"fusesnap trace show --state {tmp_path} 55",
            "COMP_CWORD": "5",
        },
    )
    assert asked.output == f"plain,{'5' * 12}\n"


def test_an_environment_is_made_of_names_and_values(trace: Trace) -> None:
    refused = trace("record", "/nix/store/x", "-e", "NAME", "--", "true")
    assert refused.exit_code == 2
    assert "'NAME': expected NAME=VALUE" in refused.output
