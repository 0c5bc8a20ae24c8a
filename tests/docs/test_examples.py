"""What docs/examples holds is what the programs that it is for can read, and what docs/images.md says works."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusesnap.config import load
from fusesnap.daemon.containerd_block import Snapshotter, block
from fusesnap.images.reference import parse_reference
from fusesnap.nix.store_path import StoreDir

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "docs/examples"
UNIT = EXAMPLES / "systemd/fusesnap.service"
SOCKET = "unix:///var/lib/fusesnap/fusesnap.sock"
PACKAGE = "/opt/package"


def directives(text: str) -> dict[str, list[str]]:
    """A unit's settings by name, each with its words in order."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).extend(value.split())
    return found


def unit(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """What NixOS and Home Manager write: a line for each value of a list, ``true`` for a truth."""
    lines = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        lines += [
            f"{name}={str(each).lower() if isinstance(each, bool) else each}"
            for name, value in values.items()
            for each in (value if isinstance(value, list) else [value])
        ]
    return "\n".join(lines) + "\n"


def verify(text: str, directory: Path, name: str, *options: str) -> None:
    """Have systemd read a unit, with programs that are there; raises AssertionError with what it says."""
    path = directory / name
    path.write_text(re.sub(rf"(?:/usr/local|{PACKAGE})/bin/fusesnap", "/bin/true", text))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *options, path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_RUNTIME_DIR": str(directory)},
    )
    said = [line for line in done.stderr.splitlines() if name in line]
    assert (done.returncode, said) == (0, []), done.stderr


def evaluated(module: str, given: dict[str, Any]) -> dict[str, Any]:
    """What a Nix module makes of the options ``given``, by the real evaluator."""
    expression = (
        f"import {REPOSITORY}/tests/docs/evaluate.nix {{ module = {EXAMPLES}/nix/{module};"
        f" given = builtins.fromJSON ''{json.dumps({'services': {'fusesnap': given}})}''; }}"
    )
    done = subprocess.run(
        ["nix-instantiate", "--eval", "--strict", "--json", "--readonly-mode", "-E", expression],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "NIX_REMOTE": "dummy://"},
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# ------------------------------------------------------------------- systemd, Nix


def test_the_unit(tmp_path: Path) -> None:
    verify(UNIT.read_text(), tmp_path, "fusesnap.service")


def test_the_nixos_module_makes_the_same_unit(tmp_path: Path) -> None:
    made = evaluated("nixos-module.nix", {"enable": True, "package": PACKAGE})
    service = made["systemd"]["services"]["fusesnap"]
    names = {"after": "After", "wants": "Wants", "before": "Before"}
    head = {names[key]: " ".join(service[key]) for key in names}
    text = unit(
        {
            "Unit": {"Description": service["description"], **head},
            "Service": service["serviceConfig"],
            "Install": {"WantedBy": " ".join(service["wantedBy"])},
        }
    )
    ours, theirs = directives(UNIT.read_text()), directives(text)
    for given in (ours, theirs):
        assert given.pop("ExecStart")[1:3] == ["daemon", "--config"]
        assert given.pop("ExecReload")[1:3] == ["daemon", "reload"]
    yes = {"yes": "true"}
    assert {key: [yes.get(word, word) for word in words] for key, words in ours.items()} == theirs
    verify(text, tmp_path, "fusesnap.service")
    assert "virtualisation" not in made


def test_the_nixos_module_tells_containerd_and_kubernetes() -> None:
    made = evaluated(
        "nixos-module.nix",
        {
            "enable": True,
            "package": PACKAGE,
            "containerd": {"enable": True},
            "kubelet": {"enable": True},
            "k3s": {"enable": True},
        },
    )
    printed = tomllib.loads(
        block("2", Snapshotter(Path("/var/lib/fusesnap/fusesnap.sock"), Path("/var/lib/fusesnap")))
    )
    assert made["virtualisation"]["containerd"]["settings"] == printed
    option = f"--image-service-endpoint={SOCKET}"
    assert made["services"]["kubernetes"]["kubelet"]["extraOpts"] == option
    assert made["services"]["k3s"]["extraFlags"] == ["--snapshotter=fusesnap", option]


def test_a_module_that_is_not_enabled_does_nothing() -> None:
    for module in ("nixos-module.nix", "home-manager-module.nix"):
        assert evaluated(module, {}) == {}


def test_an_option_that_is_not_there_is_an_error() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        evaluated("nixos-module.nix", {"enabled": True})
    assert "unknown options: enabled" in caught.value.stderr


def test_the_home_manager_module(tmp_path: Path) -> None:
    made = evaluated(
        "home-manager-module.nix",
        {
            "enable": True,
            "package": PACKAGE,
            "prefetch": ["/nix/store/a", "nix:0/nix/store/b"],
            "mounts": {"tools": {"source": "/nix/store/c", "mountpoint": "/home/me/tools"}},
        },
    )
    services = made["systemd"]["user"]["services"]
    assert services.keys() == {"fusesnap-tools", "fusesnap-prefetch"}
    for name, sections in services.items():
        verify(unit(sections), tmp_path, f"{name}.service", "--user")
    start = services["fusesnap-tools"]["Service"]["ExecStart"]
    assert shlex.split(start)[1:] == [
        "mount", "--config", "/etc/fusesnap.toml", "/nix/store/c", "/home/me/tools",
    ]  # fmt: skip
    start = services["fusesnap-prefetch"]["Service"]["ExecStart"]
    assert shlex.split(start)[-2:] == ["/nix/store/a", "nix:0/nix/store/b"]


# -------------------------------------------------------------------- Kubernetes


def test_the_pod() -> None:
    (pod,) = yaml.safe_load_all((EXAMPLES / "kubernetes/pod.yaml").read_text())
    assert (pod["apiVersion"], pod["kind"]) == ("v1", "Pod")
    (container,) = pod["spec"]["containers"]
    reference = parse_reference(container["image"], StoreDir())
    assert reference is not None
    assert reference.spelling == "hello-2.12"


def test_the_kubelet() -> None:
    kubelet = yaml.safe_load((EXAMPLES / "kubernetes/kubelet.yaml").read_text())
    assert kubelet["imageServiceEndpoint"] == SOCKET
    assert kubelet["kind"] == "KubeletConfiguration"


def test_the_daemon_set() -> None:
    text = (EXAMPLES / "kubernetes/daemonset.yaml").read_text()
    daemon_set = yaml.safe_load(text)
    spec = daemon_set["spec"]["template"]["spec"]
    assert daemon_set["spec"]["selector"]["matchLabels"].items() <= (
        daemon_set["spec"]["template"]["metadata"]["labels"].items()
    )
    (install,) = spec["initContainers"]
    mounts = {mount["name"] for mount in install["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["volumes"]}
    subprocess.run(["sh", "-nc", install["command"][-1]], check=True)
    # The files that it wants are those that the comment tells to put there.
    named = re.findall(r"--from-file=(\S+)", text)
    assert all((REPOSITORY / name).is_file() for name in named)
    assert {Path(name).name for name in named} == {
        "install.sh",
        "fusesnap.toml",
        "fusesnap.service",
    }


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Mapping[str, str]]:
    """A directory as a machine's root, and programs that only say that they were called."""
    programs = tmp_path / "programs"
    programs.mkdir()
    python = """
        case $1 in -c) exit 0;; esac
        mkdir -p "$3/bin"
        printf '#!/bin/sh\\necho pip "$@" >>%s/calls\\n' {tmp} >"$3/bin/pip"
        printf '#!%s/bin/python\\n' "$3" >"$3/bin/fusesnap.head"
        cat >"$3/bin/fusesnap" <<'END'
#!/bin/sh
case "$*" in *--print-containerd-config*) echo "version = ${{3}}";; *) echo fusesnap "$@" >>{tmp}/calls;; esac
END
        chmod +x "$3/bin/pip" "$3/bin/fusesnap"
    """
    for name, body in (
        ("python3", python.format(tmp=tmp_path)),
        ("systemctl", f'echo systemctl "$@" >>{tmp_path}/calls'),
        ("modprobe", "exit 1"),
    ):
        program = programs / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    root = tmp_path / "root"
    root.mkdir()
    return root, {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "DESTDIR": str(root),
        "FUSESNAP_PACKAGE": "fusesnap==0.1.0",
    }


def install(machine: tuple[Path, Mapping[str, str]], files: Path) -> list[str]:
    """Run install.sh; returns what it called."""
    root, environment = machine
    calls = root.parent / "calls"
    calls.unlink(missing_ok=True)
    script = EXAMPLES / "kubernetes/install.sh"
    subprocess.run(["sh", script, files], env=dict(environment), check=True, capture_output=True)
    return calls.read_text().splitlines()


def test_install(machine: tuple[Path, Mapping[str, str]], tmp_path: Path) -> None:
    root, _ = machine
    files = tmp_path / "files"
    files.mkdir()
    (files / "fusesnap.toml").write_text((EXAMPLES / "kubernetes/fusesnap.toml").read_text())
    (files / "fusesnap.service").write_text(UNIT.read_text())
    assert install(machine, files) == [
        "pip install -q fusesnap==0.1.0",
        "systemctl daemon-reload",
        "systemctl enable --now fusesnap",
        "systemctl reload-or-restart fusesnap",
        "systemctl restart containerd",
        "systemctl try-restart kubelet",
        "fusesnap doctor",
    ]
    assert (root / "usr/local/bin/fusesnap").readlink() == Path("/opt/fusesnap/bin/fusesnap")
    assert "conf.d/*.toml" in (root / "etc/containerd/config.toml").read_text()
    assert (root / "etc/containerd/conf.d/fusesnap.toml").read_text() == "version = 3\n"
    kubelet = yaml.safe_load((root / "etc/kubernetes/kubelet.conf.d/50-fusesnap.conf").read_text())
    assert kubelet["imageServiceEndpoint"] == SOCKET
    head = (root / "opt/fusesnap/bin/fusesnap.head").read_text()
    assert head == f"#!{root}/opt/fusesnap/bin/python\n"
    # Again: nothing to do.
    assert install(machine, files) == ["systemctl enable --now fusesnap", "fusesnap doctor"]
    # A new configuration is taken over without restarting anything.
    (files / "fusesnap.toml").write_text("")
    assert "systemctl reload-or-restart fusesnap" in install(machine, files)


def test_install_does_not_rewrite_a_containerd_configuration(
    machine: tuple[Path, Mapping[str, str]], tmp_path: Path
) -> None:
    root, environment = machine
    (root / "etc/containerd").mkdir(parents=True)
    (root / "etc/containerd/config.toml").write_text("version = 2\n")
    (tmp_path / "fusesnap.toml").write_text("")
    (tmp_path / "fusesnap.service").write_text("")
    done = subprocess.run(
        ["sh", EXAMPLES / "kubernetes/install.sh", tmp_path],
        env=dict(environment),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert 'must have: imports = ["/etc/containerd/conf.d/*.toml"]' in done.stderr


# -------------------------------------------------------------- k3s, nerdctl, TOML


def test_k3s() -> None:
    config = yaml.safe_load((EXAMPLES / "k3s/config.yaml").read_text())
    assert config == {"snapshotter": "fusesnap", "image-service-endpoint": SOCKET}
    first, _, rest = (EXAMPLES / "k3s/config-v3.toml.tmpl").read_text().partition("\n")
    assert first == '{{ template "base" . }}'
    printed = tomllib.loads(
        block("3", Snapshotter(Path("/var/lib/fusesnap/fusesnap.sock"), Path("/var/lib/fusesnap")))
    )
    ours = tomllib.loads(rest)
    assert ours["proxy_plugins"] == printed["proxy_plugins"]
    transfer = "io.containerd.transfer.v1.local"
    assert ours["plugins"][transfer] == printed["plugins"][transfer]


def test_nerdctl() -> None:
    settings = tomllib.loads((EXAMPLES / "nerdctl/nerdctl.toml").read_text())
    assert settings == {"snapshotter": "fusesnap"}


@pytest.mark.parametrize("path", ["kubernetes/fusesnap.toml", "k3s/fusesnap.toml"])
def test_configurations(path: str) -> None:
    assert load(EXAMPLES / path, {}).substituters == ["https://cache.nixos.org"]


def test_configurations_in_the_documentation(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs/images.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    for number, settings in enumerate(blocks):
        path = tmp_path / f"{number}.toml"
        path.write_text(settings if settings.startswith("[") else f"[builder]\n{settings}")
        load(path, {})
