#!/usr/bin/env python3
"""Write tests/nix/assets: one file for each reason to refuse a NAR, a narinfo or a nix-cache-info.

The bytes are made here by hand, not by the package's own writers, and are the same at every run;
a test compares what is committed with what this script would write.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from nacl.signing import SigningKey

ASSETS = Path(__file__).resolve().parent.parent / "tests" / "nix" / "assets"

SIGNING_KEY = SigningKey(hashlib.sha256(b"fusesnap test key").digest())
PUBLIC_KEY = "test-1:" + base64.b64encode(bytes(SIGNING_KEY.verify_key)).decode()
STORE_PATH = "/nix/store/0c0b0cixn1p4b9zslj1mlb1ckzh3cfzx-hello"
NAR_HASH = "sha256:0hc7x4mami1jj3iay66b0qs9lm2ipl1hhsckccbxcn882rk6f1s5"
REFERENCE = "3n58xw4373jp0ljirf06d8077j15pc4j-glibc-2.37"


def string(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)


def strings(*items: bytes) -> bytes:
    return b"".join(map(string, items))


MAGIC = string(b"nix-archive-1")
LINK = strings(b"(", b"type", b"symlink", b"target", b"x", b")")


def file(data: bytes, *marks: bytes) -> bytes:
    return strings(b"(", b"type", b"regular", *marks, b"contents", data, b")")


def entry(name: bytes, node: bytes = LINK) -> bytes:
    return strings(b"entry", b"(", b"name", name, b"node") + node + string(b")")


def directory(*entries: bytes) -> bytes:
    return strings(b"(", b"type", b"directory") + b"".join(entries) + string(b")")


def nested(depth: int) -> bytes:
    node = LINK
    for _ in range(depth):
        node = directory(entry(b"d", node))
    return node


def nars() -> dict[str, bytes]:
    """Archives, each with one fault."""
    odd = file(b"odd")
    name_padding = directory(entry(b"odd")).replace(b"odd\0\0\0\0\0", b"odd\0\0\0\0\1")
    roots = {
        "unsorted": directory(entry(b"b"), entry(b"a")),
        "duplicate": directory(entry(b"a"), entry(b"a")),
        "dot": directory(entry(b".")),
        "dotdot": directory(entry(b"..")),
        "slash": directory(entry(b"a/b")),
        "nul": directory(entry(b"a\0b")),
        "empty-name": directory(entry(b"")),
        "long-name": directory(entry(b"n" * 256)),
        "huge-name": directory(strings(b"entry", b"(", b"name") + b"\xff" * 8),
        "too-deep": nested(513),
        "trailing": LINK + b"\0",
        "truncated": odd[:-1],
        "padding": odd.replace(b"odd\0\0\0\0\0", b"odd\0\0\0\0\1"),
        "name-padding": name_padding,
        "target-padding": LINK.replace(b"x\0\0\0\0\0\0\0", b"x\0\0\0\0\0\0\1"),
        "long-target": strings(b"(", b"type", b"symlink", b"target", b"t" * 4096, b")"),
        "empty-target": strings(b"(", b"type", b"symlink", b"target", b"", b")"),
        "target-nul": strings(b"(", b"type", b"symlink", b"target", b"x\0y", b")"),
        "no-target": strings(b"(", b"type", b"symlink", b")"),
        "executable-marker": file(b"", b"executable", b"yes"),
        "no-contents": strings(b"(", b"type", b"regular", b")"),
        "huge-file": strings(b"(", b"type", b"regular", b"contents")
        + (1 << 63).to_bytes(8, "little"),
        "unknown-type": strings(b"(", b"type", b"device", b")"),
        "token-padding": directory().replace(b"directory\0\0", b"directory\0\1"),
        "unknown-token": strings(b"(", b"type", b"directory", b"attribute"),
        "huge-token": strings(b"(", b"type") + b"\xff" * 16,
        "entry-without-name": strings(b"(", b"type", b"directory", b"entry", b"(", b"node"),
        "two-roots": LINK + LINK,
    }
    archives = {f"nar-{name}.nar": MAGIC + root for name, root in roots.items()}
    archives["nar-magic.nar"] = string(b"nix-archive-2") + LINK
    archives["nar-html.nar"] = b"<html><body><h1>503 Service Unavailable</h1></body></html>\n"
    archives["nar-empty.nar"] = b""
    return archives


def sign(message: str) -> str:
    signature = SIGNING_KEY.sign(message.encode()).signature
    return base64.b64encode(signature).decode()


FIELDS = {
    "StorePath": STORE_PATH,
    "URL": "nar/0hc7x4mami1jj3iay66b0qs9lm2ipl1hhsckccbxcn882rk6f1s5.nar.xz",
    "Compression": "xz",
    "FileHash": "sha256:1xvr77kpmal6q3d8mph38d7fmx0kc85pnbk2qdvp3v9z45pg4khp",
    "FileSize": "192",
    "NarHash": NAR_HASH,
    "NarSize": "480",
    "References": REFERENCE,
    "Sig": "test-1:" + sign(f"1;{STORE_PATH};{NAR_HASH};480;/nix/store/{REFERENCE}"),
}


def text(fields: dict[str, str]) -> bytes:
    return "".join(f"{name}: {value}\n" for name, value in fields.items()).encode()


def without(field: str) -> bytes:
    return text({name: value for name, value in FIELDS.items() if name != field})


def narinfos() -> dict[str, bytes]:
    """Narinfos: one that is good, and others, each with one fault."""
    good = text(FIELDS)
    wrong = sign("something else")
    changed = {
        "wrong-signature": {"Sig": f"test-1:{wrong}"},
        "foreign-signature": {"Sig": f"foreign-1:{wrong}"},
        "short-signature": {"Sig": FIELDS["Sig"][:-8]},
        "signature-form": {"Sig": "test-1"},
        "other-references": {"References": ""},
        "other-store-dir": {"StorePath": STORE_PATH.replace("/nix/", "/gnu/")},
        "below-store-path": {"StorePath": STORE_PATH + "/bin/hello"},
        "bare-store-path": {"StorePath": STORE_PATH.removeprefix("/nix/store/")},
        "store-path-hash": {"StorePath": STORE_PATH.replace("0c0b", "0e0u")},
        "empty-url": {"URL": ""},
        "url-dotdot": {"URL": "nar/../../secret"},
        "url-dotdot-encoded": {"URL": "nar/%2e%2e/%2e./secret"},
        "url-file": {"URL": "file:///etc/shadow"},
        "url-absolute": {"URL": "/etc/shadow"},
        "nar-hash-md5": {"NarHash": "md5:3y8bwfr609h3lh9ch0izcqq7fl"},
        "nar-hash-short": {"NarHash": NAR_HASH[:-1]},
        "nar-hash-bare": {"NarHash": NAR_HASH.removeprefix("sha256:")},
        "nar-size-zero": {"NarSize": "0"},
        "nar-size-negative": {"NarSize": "-480"},
        "nar-size-huge": {"NarSize": str(2**63)},
        "full-reference": {"References": f"/nix/store/{REFERENCE}"},
        "other-content-address": {"Sig": f"foreign-1:{wrong}", "CA": f"fixed:r:{NAR_HASH}"},
    }
    files = {name: text(FIELDS | fields) for name, fields in changed.items()}
    for field in ("StorePath", "URL", "NarHash", "NarSize"):
        files["no-" + field.lower()] = without(field)
    files |= {
        "good": good,
        "unsigned": without("Sig"),
        "duplicate-field": good + f"NarHash: {NAR_HASH}\n".encode(),
        "cut-short": good[:-1],
        "no-space": good.replace(b"NarSize: ", b"NarSize:"),
        "carriage-returns": good.replace(b"\n", b"\r\n"),
        "empty-line": good + b"\n",
        "binary": b"\x28\xb5\x2f\xfd" + good,
        "nul": good.replace(b"References: ", b"References: \0"),
        "html": b"<html><body><h1>503 Service Unavailable</h1></body></html>\n",
        "empty": b"",
    }
    return {f"narinfo-{name}.narinfo": data for name, data in files.items()}


def cache_infos() -> dict[str, bytes]:
    """Descriptions of caches, each with one fault."""
    files = {
        "no-store-dir": b"WantMassQuery: 1\nPriority: 40\n",
        "empty-store-dir": b"StoreDir:\n",
        "html": b"<html><body>Please log in: http://portal.example/</body></html>\n",
        "priority": b"StoreDir: /nix/store\nPriority: high\n",
        "duplicate-field": b"StoreDir: /nix/store\nStoreDir: /gnu/store\n",
        "binary": b"StoreDir: /nix/store\n\xff\xfe",
        "empty": b"",
    }
    return {f"cache-info-{name}": data for name, data in files.items()}


def assets() -> dict[str, bytes]:
    """Return all files by name."""
    return nars() | narinfos() | cache_infos()


def main() -> None:
    ASSETS.mkdir(exist_ok=True)
    for name, data in assets().items():
        (ASSETS / name).write_bytes(data)


if __name__ == "__main__":
    main()
