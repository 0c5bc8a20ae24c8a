"""containerd: whether it runs, is of a version that we know, and knows us."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fusesnap.config import DEFAULT_ROOT, Settings
from fusesnap.daemon.containerd_block import NAME, REBASE, REMAP_IDS
from fusesnap.daemon.doctor.containerd_config import (
    NEW_CRI_IMAGES,
    OLD_CRI,
    TRANSFER,
    ContainerdConfig,
    Cri,
    Proxy,
    major,
    program_version,
    read,
    written_address,
)
from fusesnap.daemon.doctor.findings import (
    CONFIGURATION,
    UNAVAILABLE,
    Finding,
    Findings,
    doubtful,
    failing,
    well,
)
from fusesnap.daemon.doctor.image_endpoint import examine_image_endpoint
from fusesnap.daemon.doctor.peer import peer
from fusesnap.errors import Unavailable
from fusesnap.services.containerd_client import Plugin, ask_plugins, ask_version

DEFAULT_ADDRESS: Final = Path("/run/containerd/containerd.sock")
DEFAULT_CONFIG: Final = Path("/etc/containerd/config.toml")
SNAPSHOTTER_TYPE: Final = "io.containerd.snapshotter.v1"
OLDEST: Final = (1, 6)
_TWO: Final = 2  # the release that knows the transfer service and configuration version 3
_RESTART: Final = "systemctl restart containerd"
_START: Final = (
    "install and start containerd, or say where it is: --containerd-address, --containerd-config"
)
# Why mounts of a state directory cannot be ID-mapped; empty if they can.
IdMapping = Callable[[Path], str]


@dataclass(frozen=True, slots=True)
class Where:
    """Which containerd to look at: what was given, or what is found."""

    address: Path | None = None
    config: Path | None = None


@dataclass(frozen=True, slots=True)
class Containerd:
    """The containerd that was found, running or only installed. ``address`` is its socket."""

    address: Path
    version: str
    config: ContainerdConfig
    plugins: tuple[Plugin, ...] | None  # None if it does not run
    settings: Settings  # of the daemon that it is to know

    @property
    def major(self) -> int:
        """Of its version."""
        return major(self.version)

    def paste(self, what: str = "what") -> str:
        """How ``what`` of our block comes into its configuration."""
        words = ["fusesnap daemon"]
        if self.settings.root != DEFAULT_ROOT:
            words.append(f"--root {self.settings.root}")
        if self.settings.address is not None:
            words.append(f"--address {self.settings.address}")
        words.append(f"--print-containerd-config {3 if self.major >= _TWO else 2}")
        return f"put {what} `{' '.join(words)}` prints into {self.config.file}, and {_RESTART}"

    def plugin(self, kind: str, name: str) -> Plugin | None:
        """A plugin of the running containerd."""
        found = (each for each in self.plugins or () if (each.type, each.id) == (kind, name))
        return next(found, None)


def examine_containerd(
    settings: Settings, where: Where, idmapping: IdMapping | None
) -> list[Finding]:
    """What containerd knows of the daemon with ``settings``. ``idmapping`` is left out where None."""
    findings = Findings()
    with findings.instead_of_error("containerd", _START):
        found = _find(where, settings, findings)
        if found is not None:
            findings.extend(_about(found, idmapping))
    return findings


def _find(where: Where, settings: Settings, findings: Findings) -> Containerd | None:
    """containerd, with what is to be said about its being there."""
    file = where.config or DEFAULT_CONFIG
    with findings.instead_of_error("configuration", _correct(file)):
        address = where.address or written_address(file) or DEFAULT_ADDRESS
        listening = peer(address)
        if where.config is None and listening is not None:
            file = listening.configuration or file
        program = listening.program if listening is not None else _installed()
        if program is not None:
            return _read(address, program, file, settings, findings)
        findings.append(failing("containerd", "neither runs nor is installed", _START, UNAVAILABLE))
    return None


def _read(
    address: Path, program: Path, file: Path, settings: Settings, findings: Findings
) -> Containerd | None:
    with findings.instead_of_error("configuration", _correct(file)):
        return _ask(address, program, read(program, file), settings, findings)
    return None


def _correct(file: Path) -> str:
    # Of a type that it does not know, containerd says so, and panics.
    return f'correct {file}; the proxy plugin for fusesnap has type = "snapshot"'


def _installed() -> Path | None:
    found = shutil.which("containerd")
    return Path(found) if found else None


def _ask(
    address: Path, program: Path, config: ContainerdConfig, settings: Settings, findings: Findings
) -> Containerd | None:
    try:
        version, plugins = ask_version(address), ask_plugins(address)
        findings.append(_version(version, f"runs at {address}"))
        return Containerd(address, version, config, plugins, settings)
    except Unavailable as error:
        version = program_version(program)
        findings.append(_version(version, "is installed"))
        said = f"does not answer: {error}"
        findings.append(failing("containerd", said, "systemctl start containerd", UNAVAILABLE))
        return Containerd(address, version, config, None, settings)


def _version(version: str, said: str) -> Finding:
    numbers = tuple(int(each) for each in version.lstrip("v").split(".")[:2] if each.isdecimal())
    text = f"{version} {said}"
    if numbers and numbers < OLDEST:
        mend = "take containerd 1.6 or later: older ones are not tried"
        return failing("containerd", text, mend, UNAVAILABLE)
    return well("containerd", text)


def _about(found: Containerd, idmapping: IdMapping | None) -> Sequence[Finding]:
    findings = [_file(found)]
    proxy, finding = _proxy(found)
    findings.append(finding)
    if proxy is None:
        return findings
    findings.extend(_loaded(found, proxy))
    findings.extend(_cri(found, proxy))
    findings.extend(_transfer(found, proxy))
    findings.extend(_capabilities(proxy))
    if idmapping is not None:
        findings.extend(_user_namespaces(found, proxy, idmapping(found.settings.root)))
    return findings


def _file(found: Containerd) -> Finding:
    """Whether the file's version is one that this containerd reads."""
    config, written = found.config, found.config.written_version
    if written is None:
        return well("configuration", f"{config.file}: not there, so containerd has its defaults")
    if written > _TWO and found.major < _TWO:
        return failing(
            "configuration",
            f"{config.file}: version {written} is of containerd 2; {found.version} ignores its CRI tables",
            "fusesnap daemon --print-containerd-config 2",
            CONFIGURATION,
        )
    if written < _TWO:
        said = (
            f"{config.file}: version {written}, or none, which names plugins as containerd 1.2 did"
        )
        mend = "version = 2 with plugins by their whole names: containerd config dump writes it"
        return doubtful("configuration", said, mend)
    return well("configuration", f"{config.file}: version {written}")


def _proxy(found: Containerd) -> tuple[Proxy | None, Finding]:
    """The proxy plugin that stands for us."""
    proxies = found.config.proxies()
    socket = found.settings.socket.absolute()
    ours = [each for each in proxies if _same(each.address, socket)]
    snapshotters = [each for each in ours if each.is_snapshotter]
    if snapshotters:
        proxy = snapshotters[0]
        return proxy, well("proxy plugin", f"{proxy.name} at {proxy.address}")
    if ours:
        said = f"{ours[0].name}: its type is {ours[0].type!r}, must be 'snapshot'"
        return None, failing("proxy plugin", said, found.paste(), CONFIGURATION)
    named = [each for each in proxies if each.name == NAME]
    if named:
        said = f"{NAME} has the address {named[0].address!r}, the daemon serves {socket}"
        mend = f'address = "{socket}" in [proxy_plugins.{NAME}], and {_RESTART}; or is this the daemon\'s --config?'
        return None, failing("proxy plugin", said, mend, CONFIGURATION)
    said = f"none has the address {socket}"
    return None, failing("proxy plugin", said, found.paste(), CONFIGURATION)


def _same(address: str, socket: Path) -> bool:
    return address == str(socket) or (
        address.startswith("/") and Path(address).resolve() == socket.resolve()
    )


def _loaded(found: Containerd, proxy: Proxy) -> list[Finding]:
    """Whether the running containerd has read that."""
    if found.plugins is None:
        return []
    plugin = found.plugin(SNAPSHOTTER_TYPE, proxy.name)
    if plugin is None:
        said = f"the running containerd does not know {proxy.name} yet"
        return [failing("plugin", said, _RESTART, CONFIGURATION)]
    if plugin.error:
        said = f"{proxy.name} could not be loaded: {plugin.error}"
        return [failing("plugin", said, f"fusesnap daemon, then {_RESTART}", UNAVAILABLE)]
    loaded = plugin.exports.get("address")  # since containerd 1.7
    if loaded and loaded.removeprefix("unix://") != proxy.address:
        said = f"the running containerd has {proxy.name} at {loaded}, not at {proxy.address}"
        return [failing("plugin", said, _RESTART, CONFIGURATION)]
    return [well("plugin", f"containerd has loaded {proxy.name}")]


def _cri(found: Containerd, proxy: Proxy) -> list[Finding]:
    """What Kubernetes' pods use."""
    cri = found.config.cri()
    if cri is None:
        return [well("kubernetes", "the CRI plugin is disabled: for ctr and nerdctl only")]
    findings = _cri_errors(found)
    users = [name for name, snapshotter in cri.runtimes.items() if snapshotter == proxy.name]
    if cri.snapshotter == proxy.name:
        findings.append(well("kubernetes", f"pods use {proxy.name}"))
    elif users:
        said = f"pods of runtime {', '.join(users)} use {proxy.name}"
        findings.append(well("kubernetes", said))
    else:
        return [*findings, _not_chosen(found, cri, proxy)]
    findings.append(_annotations(found, cri))
    findings.extend(_image_file_system(found, proxy))
    if found.plugins is not None:
        findings.append(examine_image_endpoint(found.settings, found.address))
    return findings


def _cri_errors(found: Containerd) -> list[Finding]:
    """Whether CRI's plugins run."""
    names = (OLD_CRI, NEW_CRI_IMAGES)
    plugins = (found.plugin(*name.rpartition(".")[::2]) for name in names)
    return [
        failing(
            "kubernetes",
            f"{each.type}.{each.id}: {each.error}",
            "see containerd's log",
            UNAVAILABLE,
        )
        for each in plugins
        if each is not None and each.error
    ]


def _not_chosen(found: Containerd, cri: Cri, proxy: Proxy) -> Finding:
    said = f"pods use {cri.snapshotter}; {proxy.name} is used only where it is named"
    mend = f"for pods, {found.paste()}"
    if found.major >= _TWO and found.config.written_version == _TWO:
        # migrateConfig in containerd's plugins/cri/images: without `runtimes` it returns at once.
        said += "; of a file of version 2 containerd 2 takes CRI's snapshotter only beside a table of runtimes"
    return doubtful("kubernetes", said, mend)


def _annotations(found: Containerd, cri: Cri) -> Finding:
    """Whether snapshotters are told which image a layer is of.

    The labels of a Nix layer come all the same, as tried with 1.6, 1.7 and 2.1; what is promised is all of them.
    """
    if cri.annotations:
        return well("annotations", "snapshotters are told what layers are")
    name = f'"{NEW_CRI_IMAGES}"' if found.major >= _TWO else f'"{OLD_CRI}".containerd'
    return doubtful(
        "annotations",
        "disable_snapshot_annotations = true: snapshotters are not told all that is known of a layer",
        f"disable_snapshot_annotations = false in [plugins.{name}], and {_RESTART}",
    )


def _image_file_system(found: Containerd, proxy: Proxy) -> list[Finding]:
    """Whether kubelet watches the file system that we fill."""
    root = found.settings.root
    watched = (
        Path(proxy.root) if proxy.root and found.major >= _TWO else _default_root(found, proxy)
    )
    try:
        same = watched.stat().st_dev == root.stat().st_dev
    except OSError as error:
        if not root.exists():
            return []
        said = f"kubelet watches {watched}: {error.strerror}"
        return [doubtful("image disk", said, _watch(found, proxy, watched))]
    if same:
        return [well("image disk", f"kubelet watches {watched}, on the file system of {root}")]
    said = f"kubelet watches {watched}, and {root} is on another file system"
    return [doubtful("image disk", said, _watch(found, proxy, watched))]


def _default_root(found: Containerd, proxy: Proxy) -> Path:
    return found.config.root / f"{SNAPSHOTTER_TYPE}.{proxy.name}"


def _watch(found: Containerd, proxy: Proxy, watched: Path) -> str:
    root = found.settings.root
    if found.major >= _TWO:
        return f'root = "{root}" in [proxy_plugins.{proxy.name}.exports], and {_RESTART}'
    return f"ln -sT {root} {watched}"


def _transfer(found: Containerd, proxy: Proxy) -> list[Finding]:
    """Whether the transfer service unpacks for us: what 2.x pulls with, unless it is told otherwise."""
    if found.major < _TWO:
        return []
    plugin = found.plugin(*TRANSFER.rpartition(".")[::2])
    if plugin is not None and plugin.error:
        said = f"the transfer service could not be loaded: {plugin.error}"
        return [failing("transfer", said, "see containerd's log", UNAVAILABLE)]
    allowed = found.config.unpack_snapshotters()
    if allowed is None or proxy.name not in allowed:
        said = f"the transfer service does not unpack for {proxy.name}: what it pulls for it fails"
        return [failing("transfer", said, found.paste("the unpack_config that"), CONFIGURATION)]
    if allowed == [proxy.name]:
        said = f"the transfer service unpacks for {proxy.name} alone"
        mend = "an unpack_config for overlayfs too, if images for it are pulled"
        return [doubtful("transfer", said, mend)]
    return [well("transfer", f"the transfer service unpacks for {', '.join(allowed)}")]


def _capabilities(proxy: Proxy) -> list[Finding]:
    """Layers that are unpacked before their parents lose the whiteouts that need a layer below."""
    if REBASE not in proxy.capabilities:
        return []
    said = f"{proxy.name} declares {REBASE}: files that a layer removes may be there again"
    mend = f"take {REBASE} out of capabilities in [proxy_plugins.{proxy.name}], and {_RESTART}"
    return [failing("capabilities", said, mend, CONFIGURATION)]


def _user_namespaces(found: Containerd, proxy: Proxy, impossible: str) -> list[Finding]:
    """Whether containerd lets us ID-map mounts where that is possible, and only there."""
    if found.major < _TWO:
        return []
    table = f"[proxy_plugins.{proxy.name}]"
    declared = REMAP_IDS in proxy.capabilities
    if declared and impossible:
        said = (
            f"{proxy.name} declares {REMAP_IDS}, but mounts cannot be ID-mapped here: {impossible}"
        )
        mend = f"take {REMAP_IDS} out of capabilities in {table}, and {_RESTART}"
        return [failing("user namespaces", said, mend, CONFIGURATION)]
    if declared or impossible:
        said = (
            f"mounts cannot be ID-mapped here: {impossible}"
            if impossible
            else "mounts are ID-mapped"
        )
        return [well("user namespaces", said)]
    said = "mounts can be ID-mapped here, and containerd is not told so: it copies images instead"
    mend = f'capabilities = ["{REMAP_IDS}"] in {table}, and {_RESTART}'
    return [doubtful("user namespaces", said, mend)]
