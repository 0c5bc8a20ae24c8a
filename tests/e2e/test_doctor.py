"""What is printed for containerd's configuration, and ``fusesnap doctor``, with the real containerds."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from testbed.binary_cache import CacheFiles, SigningKey, http_cache
from testbed.containerd import Containerd, end_containers
from testbed.containerd_configuration import (
    CRI_NAMESPACE,
    CRI_PLUGINS,
    DISABLED,
    SNAPSHOTTER,
    Release,
)
from testbed.debian import CONTAINERDS, containerd_release
from testbed.fusesnap_daemon import PROGRAM, FusesnapDaemon, Source, fusesnap_daemon
from testbed.images import Layer, NixLayerManner, write_image
from testbed.processes import run, run_unchecked, running
from testbed.registry import Registry
from testbed.synthetic import SimpleClosure
from testbed.workplace import run_directory

from fusesnap.config import Settings, load
from fusesnap.daemon.doctor import containerd as containerd_findings
from fusesnap.daemon.doctor.containerd import IdMapping, Where, examine_containerd
from fusesnap.daemon.doctor.findings import Finding, Level
from fusesnap.services.containerd_client import Plugin, ask_plugins

NixLayers = Callable[..., Layer]

# What a private containerd has beside what is printed. TOML has the keys without a table first.
ABOVE = 'root = "{work}/root"\nstate = "{work}/state"\ndisabled_plugins = {disabled}\n'
BELOW = """
[grpc]
  address = "{work}/containerd.sock"
[ttrpc]
  address = "{work}/containerd.sock.ttrpc"
"""


def block(daemon: FusesnapDaemon, release: Release) -> str:
    """What is printed for this daemon and this containerd."""
    own = ["--root", str(daemon.state), "--address", str(daemon.address)]
    version = "3" if release.major >= 2 else "2"
    return run([PROGRAM, "daemon", *own, "--print-containerd-config", version])


@contextlib.contextmanager
def configured(work: Path, release: Release, text: str) -> Iterator[Containerd]:
    """A containerd of this release with Kubernetes' calls, and ``text`` in its configuration."""
    work.mkdir()
    disabled = json.dumps([plugin for plugin in DISABLED if plugin not in CRI_PLUGINS])
    file = work / "containerd.toml"
    file.write_text(ABOVE.format(work=work, disabled=disabled) + text + BELOW.format(work=work))
    command: list[str | Path] = [release.program("containerd"), "--config", file]
    try:
        with running(command, log=work / "containerd.log", env=release.environment) as service:
            found = Containerd(service, work, SNAPSHOTTER, CRI_NAMESPACE, release)
            service.wait_until(lambda: found.ctr_unchecked("version").returncode == 0)
            yield found
    finally:
        end_containers(work)


@dataclass(frozen=True, slots=True)
class Patient:
    """A node to be examined. Its containerd has read ``file`` as it is."""

    daemon: FusesnapDaemon
    source: Source
    containerd: Containerd
    work: Path

    @property
    def file(self) -> Path:
        return self.work / "c" / "containerd.toml"

    @property
    def settings(self) -> Settings:
        given = {"root": str(self.daemon.state), "substituters": list(self.source.caches)}
        return load(None, given | {"trusted-public-keys": list(self.source.keys)})

    def doctor(self, *options: str) -> tuple[int, dict[str, Any]]:
        """Its exit code, and its findings by section and subject: level and mend."""
        own = ["--root", str(self.daemon.state)]
        own += ["--containerd-address", str(self.containerd.address)]
        done = run_unchecked([PROGRAM, "doctor", "--json", *own, *self.source.options, *options])
        answer = json.loads(done.stdout)
        assert answer["status"] == done.returncode
        return done.returncode, answer

    def examined(
        self, change: Callable[[str], str] = str, idmapping: IdMapping | None = None
    ) -> dict[str, Finding]:
        """What is found of containerd, the first of each subject, with its file changed but not read again by it."""
        original = self.file.read_text()
        changed = change(original)
        assert (changed == original) == (change is str)
        self.file.write_text(changed)
        try:
            found = examine_containerd(self.settings, Where(config=self.file), idmapping)
        finally:
            self.file.write_text(original)
        return {finding.subject: finding for finding in reversed(found)}


@pytest.fixture(scope="module", params=CONTAINERDS)
def patient(
    request: pytest.FixtureRequest, cache_files: CacheFiles, key: SigningKey
) -> Iterator[Patient]:
    """A node that was configured by what is printed; tests leave it as it is."""
    release = containerd_release(request.param)
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(run_directory("fs-"))
        cache = stack.enter_context(http_cache(cache_files, work / "nginx"))
        source = Source([cache.url], [key.public])
        (work / "fusesnap.toml").write_text(f'containerd-address = "{work}/c/containerd.sock"\n')
        options = ["--config", str(work / "fusesnap.toml")]
        daemon = stack.enter_context(fusesnap_daemon(work / "s", source=source, options=options))
        text = block(daemon, release)
        yield Patient(
            daemon, source, stack.enter_context(configured(work / "c", release, text)), work
        )


def test_a_node_that_was_configured_by_what_is_printed_is_well(
    patient: Patient, simple: SimpleClosure
) -> None:
    if patient.containerd.release.major < 2:
        # These do not know where we are: the mend is a link.
        image_disk = patient.examined()["image disk"]
        assert image_disk.level is Level.WARNING
        run(shlex.split(image_disk.mend))
    status, answer = patient.doctor("--sample", simple.tree)
    assert status == 0
    # The machine may have little room, or an older kernel.
    of_machine = ("fuse", "space")
    grave = [each for each in answer["findings"] if each["level"] != "ok"]
    assert [each for each in grave if each["subject"] not in of_machine] == []
    subjects = {(each["section"], each["subject"]) for each in answer["findings"]}
    assert subjects >= {
        ("machine", "fuse"),
        ("machine", "overlay"),
        ("state", "daemon"),
        ("caches", "clock"),
        ("containerd", "plugin"),
        ("containerd", "kubernetes"),
        ("containerd", "annotations"),
        ("containerd", "image disk"),
        ("containerd", "image endpoint"),
    }
    signed = [each["said"] for each in answer["findings"] if "is signed by" in each["said"]]
    assert signed == [f"signatures: {Path(simple.tree).name} is signed by testbed-1"]


def test_each_fault_of_containerds_file_is_found_and_mended(patient: Patient) -> None:
    socket, second = str(patient.daemon.address), patient.containerd.release.major >= 2

    def fault(subject: str, change: Callable[[str], str]) -> Finding:
        found = patient.examined(change)[subject]
        assert found.level is Level.FAILURE, found
        return found

    found = fault(
        "proxy plugin", lambda text: text.replace(SNAPSHOTTER, "other").replace(socket, "/other")
    )
    assert found.mend.startswith("put what `fusesnap daemon --root ")
    assert (
        f"--print-containerd-config {3 if second else 2}` prints into {patient.file}" in found.mend
    )
    found = fault("proxy plugin", lambda text: text.replace(socket, "/run/other.sock"))
    assert "'/run/other.sock'" in found.said
    assert f'address = "{socket}"' in found.mend
    found = fault("proxy plugin", lambda text: text.replace('"snapshot"', '"content"'))
    assert "must be 'snapshot'" in found.said
    # With this containerd does not even start.
    found = fault("configuration", lambda text: text.replace('"snapshot"', '"snapshotter"'))
    assert "unknown proxy plugin type" in found.said
    assert 'type = "snapshot"' in found.mend
    found = fault(
        "plugin", lambda text: text.replace(f"proxy_plugins.{SNAPSHOTTER}", "proxy_plugins.f")
    )
    assert found.mend == "systemctl restart containerd"
    found = fault("configuration", lambda text: f"{text}\n[")
    assert str(patient.file) in found.mend
    if second:
        change = f'snapshotter = "{SNAPSHOTTER}"\n  differ'
        found = fault(
            "transfer", lambda text: text.replace(change, 'snapshotter = "native"\n  differ')
        )
        assert "unpack_config" in found.mend
    else:
        found = fault("configuration", lambda text: text.replace("version = 2", "version = 3"))


def test_what_is_only_doubtful_is_said_too(patient: Patient) -> None:
    chosen = f'snapshotter = "{SNAPSHOTTER}"\n  disable'
    other = 'snapshotter = "overlayfs"\n  disable'
    found = patient.examined(lambda text: text.replace(chosen, other))
    assert found["kubernetes"].level is Level.WARNING
    assert "pods use overlayfs" in found["kubernetes"].said
    assert "annotations" not in found
    found = patient.examined(lambda text: text.replace("annotations = false", "annotations = true"))
    assert found["annotations"].level is Level.WARNING
    assert "disable_snapshot_annotations = false in [plugins." in found["annotations"].mend
    off = "disabled_plugins = " + json.dumps([*CRI_PLUGINS[:2], ""])[:-3]
    found = patient.examined(lambda text: text.replace("disabled_plugins = [", off))
    assert "CRI plugin is disabled" in found["kubernetes"].said


def test_plugins_that_could_not_begin(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = ask_plugins(patient.containerd.address)
    # Tracing, which Debian's 1.6 is built without, has no endpoint here.
    built_without = patient.containerd.release.text.startswith("1.6.")
    assert ("otlp" in {each.id for each in plugins if each.error}) != built_without
    transfer = ["transfer"] if patient.containerd.release.major >= 2 else []
    kubernetes = ("cri", "images")[patient.containerd.release.major >= 2]
    for broken, subjects in (
        ("fusesnap", ["plugin"]),
        (kubernetes, ["kubernetes"]),
        ("local", transfer),
    ):

        def answer(address: Path, broken: str = broken) -> tuple[Plugin, ...]:
            return tuple(
                replace(each, error="out of order") if each.id == broken else each
                for each in plugins
            )

        monkeypatch.setattr(containerd_findings, "ask_plugins", answer)
        failing = [each for each in patient.examined().values() if each.level is Level.FAILURE]
        assert [each.subject for each in failing] == subjects
        assert all("out of order" in each.said and each.mend for each in failing)


def test_a_file_of_the_first_version(patient: Patient) -> None:
    number = 3 if patient.containerd.release.major >= 2 else 2
    found = patient.examined(lambda text: text.replace(f"version = {number}\n", ""))
    assert found["configuration"].level is Level.WARNING
    assert "version = 2" in found["configuration"].mend


def test_the_file_is_read_as_its_containerd_reads_it(patient: Patient) -> None:
    """Before 2.0 a file that is imported replaces the whole section of a plugin."""
    second = patient.containerd.release.major >= 2
    table = CRI_PLUGINS[1] if second else CRI_PLUGINS[0]
    patient.file.with_name("more.toml").write_text(
        f'version = {3 if second else 2}\n[plugins."{table}"]\nstats_collect_period = 20\n'
    )
    found = patient.examined(lambda text: f'imports = ["more.toml"]\n{text}')
    assert found["kubernetes"].level is (Level.OK if second else Level.WARNING)
    if second:
        # Of version 2 it takes CRI's snapshotter only beside runtimes.
        found = patient.examined(
            lambda text: text.replace("version = 3", "version = 2").replace(
                'cri.v1.images"', 'grpc.v1.cri".containerd'
            )
        )
        assert found["kubernetes"].level is Level.WARNING
        assert "beside a table of runtimes" in found["kubernetes"].said


def test_the_ids_of_user_namespaces(patient: Patient) -> None:
    kind, capabilities = 'type = "snapshot"\n', '  capabilities = ["remap-ids"]\n'

    def undeclare(text: str) -> str:
        return text.replace(capabilities, "") + "# as it may have been printed\n"

    def declare(text: str) -> str:
        return undeclare(text).replace(kind, kind + capabilities)

    def found(impossible: str, change: Callable[[str], str]) -> Finding | None:
        return patient.examined(change, lambda root: impossible).get("user namespaces")

    if patient.containerd.release.major < 2:
        assert found("", declare) is None
        return
    levels = {
        (declared, impossible): finding.level
        for declared, change in ((False, undeclare), (True, declare))
        for impossible in ("", "the kernel is too old")
        if (finding := found(impossible, change)) is not None
    }
    assert levels == {
        (False, ""): Level.WARNING,
        (False, "the kernel is too old"): Level.OK,
        (True, ""): Level.OK,
        (True, "the kernel is too old"): Level.FAILURE,
    }


def test_layers_are_not_to_be_unpacked_without_their_parents(patient: Patient) -> None:
    def declare(text: str) -> str:
        kind = 'type = "snapshot"\n'
        return text.replace('  capabilities = ["remap-ids"]\n', "").replace(
            kind, f'{kind}  capabilities = ["rebase"]\n'
        )

    finding = patient.examined(declare).get("capabilities")
    if patient.containerd.release.text.startswith("1.6."):
        assert finding is None  # it knows no capabilities
        return
    assert finding is not None
    assert (finding.level, "take rebase out" in finding.mend) == (Level.FAILURE, True)
    assert "capabilities" not in patient.examined()


def test_it_pulls_and_runs_lazily_as_kubernetes_and_as_ctr_do(
    patient: Patient,
    image_registry: Registry,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
) -> None:
    containerd = patient.containerd
    layers = [base_layer, nix_layers(NixLayerManner.PATHS)]
    archive = write_image(patient.work / "image.tar", layers, name="doctor:cri", command=[])
    pulled = image_registry.push(archive, f"doctor:{patient.work.name}")
    containerd.cri_pull(pulled)
    said = containerd.run(pulled, "one", f"{simple.root}/bin/echo", "by the kubelet's call")
    assert said == "by the kubelet's call\n"
    if containerd.release.major >= 2:
        containerd.ctr("images", "rm", "--sync", pulled)
        containerd.pull(pulled, transfer=True)
        said = containerd.run(pulled, "two", f"{simple.root}/bin/echo", "by transfer")
        assert said == "by transfer\n"
