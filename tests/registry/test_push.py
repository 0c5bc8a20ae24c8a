"""Pushing to a registry that misbehaves as told. Against a real one: tests/e2e/test_image_push.py."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import trio

from fusesnap.errors import FusesnapError, InvalidConfiguration, InvalidData, Unavailable
from fusesnap.images.layout import Image, ImageLayer
from fusesnap.images.platform import Platform
from fusesnap.images.synthesis import CONFIG_TYPE, MANIFEST_TYPE, json_document, manifest_of, sha256
from fusesnap.nix.store_path import StorePath
from fusesnap.registry import push as pushing
from fusesnap.registry.client import RegistryClient
from fusesnap.registry.credentials import Credentials
from fusesnap.registry.push import Pushed, push
from fusesnap.registry.reference import parse_registry_reference
from fusesnap.substituter.retry import RetryPolicy

ME = Credentials("me", "secret")
Answer = Callable[[httpx.Request], httpx.Response | None]


@dataclass(frozen=True)
class MadeImage:
    image: Image
    blobs: tuple[bytes, ...]
    store_paths: tuple[StorePath, ...] = ()

    def blob(self, layer: ImageLayer) -> Generator[bytes, None, None]:
        data = self.blobs[layer.position]
        for start in range(0, len(data), 7):
            yield data[start : start + 7]


def made(*blobs: bytes) -> MadeImage:
    layers = tuple(
        ImageLayer(number, "x", sha256(data), len(data), sha256(data), {})
        for number, data in enumerate(blobs)
    )
    config = json_document(CONFIG_TYPE, {"layers": len(layers)})
    manifest = json_document(MANIFEST_TYPE, manifest_of(config, layers))
    return MadeImage(Image(manifest, config, Platform("linux", "amd64"), layers), blobs)


@dataclass
class FakeRegistry:
    """The part of a registry that pushes meet. ``answers`` come first, and may pass with None."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    least: int = 0
    token: str | None = None  # what it wants to see
    tokens: list[dict[str, str]] = field(default_factory=list)

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(f"{request.method} {request.url.path}")
        for answer in self.answers:
            if (response := answer(request)) is not None:
                return response
        if request.url.host == "auth.example":
            return self._give_token(request)
        if (
            self.token is not None
            and request.headers.get("Authorization") != f"Bearer {self.token}"
        ):
            realm = 'Bearer realm="https://auth.example/token",service="r"'
            return httpx.Response(401, headers={"WWW-Authenticate": realm})
        return self._answer(request)

    def _give_token(self, request: httpx.Request) -> httpx.Response:
        form = dict(httpx.QueryParams(request.content.decode())) if request.content else {}
        self.tokens.append(
            {**request.url.params, **form, "auth": request.headers.get("Authorization", "")}
        )
        return httpx.Response(200, json={"token": self.token})

    def _answer(self, request: httpx.Request) -> httpx.Response:  # noqa: PLR0911 - one an endpoint
        parts = request.url.path.removeprefix("/v2/").split("/")
        match request.method, parts:
            case "GET", [""]:
                return httpx.Response(200)
            case "HEAD", [_, "blobs", digest]:
                data = self.blobs.get(digest)
                headers = {"Content-Length": str(len(data or b""))}
                return httpx.Response(404 if data is None else 200, headers=headers)
            case "POST", [name, "blobs", "uploads", ""]:
                number = f"u{next(self.numbers)}"
                self.uploads[number] = b""
                headers = {"OCI-Chunk-Min-Length": str(self.least)} if self.least else {}
                return self._at(202, name, number, **headers)
            case "PATCH", [name, "blobs", "uploads", number]:
                start = int(request.headers["Content-Range"].partition("-")[0])
                if start != len(self.uploads[number]):
                    return httpx.Response(416)
                self.uploads[number] += request.content
                return self._at(202, name, number)
            case "GET", [name, "blobs", "uploads", number]:
                last = max(len(self.uploads[number]) - 1, 0)
                return self._at(204, name, number, Range=f"0-{last}")
            case "PUT", [_, "blobs", "uploads", number]:
                data = self.uploads.pop(number) + request.content
                digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
                if digest != request.url.params["digest"]:
                    errors = [{"code": "DIGEST_INVALID", "message": "digest did not match\n"}]
                    return httpx.Response(400, json={"errors": errors})
                self.blobs[digest] = data
                return httpx.Response(201, headers={"Docker-Content-Digest": digest})
            case "DELETE", [_, "blobs", "uploads", number]:
                self.uploads.pop(number, None)
                return httpx.Response(204)
            case "PUT", [_, "manifests", tag]:
                self.manifests[tag] = (request.headers["Content-Type"], request.content)
                return self._manifest(201, request.content)
            case "HEAD", [_, "manifests", tag]:
                return self._manifest(200, self.manifests[tag][1])
        return httpx.Response(500, text=f"not expected: {request.method} {request.url}")

    def _at(self, status: int, name: str, number: str, **headers: str) -> httpx.Response:
        place = f"/v2/{name}/blobs/uploads/{number}?state=x"
        return httpx.Response(status, headers={"Location": place, **headers})

    def _manifest(self, status: int, data: bytes) -> httpx.Response:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return httpx.Response(status, headers={"Docker-Content-Digest": digest})


async def pushed(
    image: MadeImage,
    registry: FakeRegistry,
    credentials: Credentials | None = None,
    show: pushing.Show = lambda *_: None,
    *,
    plain_http: bool = False,
) -> Pushed:
    async def at_once(seconds: float) -> None:
        await trio.lowlevel.checkpoint()

    transport = httpx.MockTransport(registry.handle)
    async with httpx.AsyncClient(transport=transport) as client:
        own = RegistryClient(
            client,
            parse_registry_reference("r.example/x:1"),
            credentials,
            RetryPolicy(sleep=at_once),
            plain_http=plain_http,
        )
        return await push(image, own, show)


async def refused(
    image: MadeImage, registry: FakeRegistry, kind: type[FusesnapError], **more: Any
) -> str:
    with pytest.raises(FusesnapError) as caught:
        await pushed(image, registry, **more)
    assert isinstance(caught.value, kind)
    assert registry.manifests == {}
    assert registry.uploads == {}
    return str(caught.value)


def once(method: str, path: str, *responses: httpx.Response | Exception) -> Answer:
    """Answers requests whose path contains ``path`` with ``responses``, one each."""
    waiting = list(responses)

    def answer(request: httpx.Request) -> httpx.Response | None:
        if waiting and request.method == method and path in request.url.path:
            response = waiting.pop(0)
            if isinstance(response, Exception):
                raise response
            return response
        return None

    return answer


def whole(image: MadeImage, registry: FakeRegistry) -> bool:
    found = image.image
    expected = {str(layer.digest): image.blobs[layer.position] for layer in found.layers}
    expected[str(found.config.digest)] = found.config.data
    manifest = {"1": (found.manifest.media_type, found.manifest.data)}
    return registry.blobs == expected and registry.manifests == manifest and not registry.uploads


async def test_an_image_is_pushed_whole_and_its_manifest_last() -> None:
    image, registry = made(b"one", b"", b"two" * 100, b"one"), FakeRegistry()
    done = await pushed(image, registry)
    assert whole(image, registry)
    assert done == Pushed(image.image.manifest.digest, 4, 303 + len(image.image.config.data), 0)
    assert registry.requests[-2:] == ["PUT /v2/x/manifests/1", "HEAD /v2/x/manifests/1"]


async def test_what_is_there_is_not_sent_again() -> None:
    image, registry = made(b"one", b"two"), FakeRegistry()
    registry.blobs[str(image.image.layers[0].digest)] = b"one"
    done = await pushed(image, registry)
    assert whole(image, registry)
    assert (done.sent, done.present) == (2, 1)
    registry.requests.clear()
    again = await pushed(image, registry)
    assert (again.sent, again.sent_bytes, again.present) == (0, 0, 3)
    assert Counter(request.split()[0] for request in registry.requests) == {
        "GET": 1,
        "HEAD": 4,
        "PUT": 1,
    }


@pytest.mark.parametrize("size", [99, 100, 101, 200, 250])
async def test_large_blobs_go_in_parts(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "PART", 100)
    image, registry = made(bytes(range(size))), FakeRegistry()
    shown: list[tuple[str, int, int]] = []
    await pushed(image, registry, show=lambda *state: shown.append(state))
    assert whole(image, registry)
    patches = sum(request.startswith("PATCH") for request in registry.requests)
    assert patches == (0 if size <= 100 else -(-size // 100))
    total = size + len(image.image.config.data)
    assert shown[-1][1:] == (total, total)


async def test_a_registry_may_want_larger_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "PART", 10)
    image, registry = made(bytes(100)), FakeRegistry(least=60)
    await pushed(image, registry)
    assert sum(request.startswith("PATCH") for request in registry.requests) == 2


async def test_a_part_of_which_only_some_arrived_is_completed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pushing, "PART", 100)
    image, registry = made(bytes(range(250))), FakeRegistry()
    broken = 0

    def cut(request: httpx.Request) -> httpx.Response | None:
        nonlocal broken
        if request.method != "PATCH" or broken == 3:
            return None
        broken += 1
        (number,) = (name for name in registry.uploads if name in request.url.path)
        registry.uploads[number] += request.content[: [0, 40, 100][broken - 1]]
        raise httpx.ReadError("reset")

    registry.answers.append(cut)
    await pushed(image, registry)
    assert whole(image, registry)
    assert broken == 3


async def test_what_may_mend_is_tried_again() -> None:
    image, registry = made(b"one"), FakeRegistry()
    throttled = httpx.Response(429, headers={"Retry-After": "1"})
    registry.answers += [
        once("GET", "/v2/", httpx.ConnectError("refused")),
        once("HEAD", "/blobs/", httpx.Response(503)),
        once("POST", "/uploads/", throttled),
        once("PUT", "/manifests/", httpx.Response(500)),
    ]
    await pushed(image, registry)
    assert whole(image, registry)


async def test_what_does_not_mend() -> None:
    registry = FakeRegistry(answers=[once("GET", "/v2/", *[httpx.Response(502)] * 9)])
    assert "https://r.example: /v2/: 502 bad gateway" in await refused(
        made(b"one"), registry, Unavailable
    )


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        (once("GET", "/v2/", httpx.Response(404)), InvalidData, "expected a registry (/v2/)"),
        (once("POST", "/uploads", httpx.Response(202)), InvalidData, "expected a Location"),
        (
            once(
                "POST", "/uploads", httpx.Response(202, headers={"Location": "http://r.example/x"})
            ),
            InvalidData,
            "expected an https:// URL to go on",
        ),
        (
            once("HEAD", "/blobs", httpx.Response(200, headers={"Content-Length": "1"})),
            InvalidData,
            "expected 3 bytes, it has 1",
        ),
        (
            once(
                "PUT",
                "/uploads",
                httpx.Response(201, headers={"Docker-Content-Digest": "sha256:1"}),
            ),
            InvalidData,
            "it says sha256:1",
        ),
        (
            once("PUT", "/uploads", httpx.Response(413, json={"errors": [{"code": "TOO_LARGE"}]})),
            Unavailable,
            "413 request entity too large: too_large",
        ),
        (
            once(
                "POST", "/uploads", httpx.Response(403, json={"errors": [{"message": "read only"}]})
            ),
            InvalidConfiguration,
            "not allowed to push x without a password (403, read only): `docker login r.example`",
        ),
    ],
)
async def test_answers_that_end_it(answer: Answer, kind: type[FusesnapError], reason: str) -> None:
    registry = FakeRegistry(answers=[answer])
    said = await refused(made(b"one"), registry, kind)
    assert said.startswith("https://r.example: ")
    assert reason in said


async def test_a_layer_that_is_not_what_the_manifest_says() -> None:
    image = made(b"one")
    said = await refused(MadeImage(image.image, (b"two",)), FakeRegistry(), InvalidData)
    assert "layer 0 (sha256:" in said


async def test_a_cancelled_push_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "PART", 10)
    registry = FakeRegistry()
    with trio.CancelScope() as scope:
        await pushed(made(bytes(100)), registry, show=lambda *_: scope.cancel())
    assert scope.cancelled_caught
    assert registry.uploads == {}
    assert registry.manifests == {}


# ---------------------------------------------------------------- authentication


async def test_a_token_is_asked_for_with_the_password() -> None:
    image, registry = made(b"one"), FakeRegistry(token="t1")
    await pushed(image, registry, ME)
    assert whole(image, registry)
    assert registry.tokens == [
        {"service": "r", "scope": "repository:x:pull,push", "auth": "Basic bWU6c2VjcmV0"}
    ]


async def test_a_token_is_asked_for_with_a_token() -> None:
    registry = FakeRegistry(token="t1")
    await pushed(made(b"one"), registry, Credentials("", identity_token="id"))
    (asked,) = registry.tokens
    assert (asked["grant_type"], asked["refresh_token"], asked["auth"]) == (
        "refresh_token",
        "id",
        "",
    )


async def test_a_token_that_ended_is_asked_for_again() -> None:
    image, registry = made(b"one"), FakeRegistry(token="t1")

    def end(request: httpx.Request) -> httpx.Response | None:
        if request.method == "POST" and "/uploads/" in request.url.path:
            registry.token = f"t{len(registry.tokens) + 1}" if len(registry.tokens) < 2 else "t2"
        return None

    registry.answers.append(end)
    await pushed(image, registry, ME)
    assert whole(image, registry)
    assert len(registry.tokens) == 2


async def test_a_password_that_is_wrong() -> None:
    registry = FakeRegistry(token="t1", answers=[once("GET", "/token", *[httpx.Response(401)] * 5)])
    said = await refused(made(b"one"), registry, InvalidConfiguration, credentials=ME)
    assert "not allowed to push x as 'me' (401)" in said
    assert "secret" not in said


async def test_a_basic_challenge_without_a_password() -> None:
    challenge = httpx.Response(401, headers={"WWW-Authenticate": 'Basic realm="r"'})
    registry = FakeRegistry(answers=[once("GET", "/v2/", challenge)])
    said = await refused(made(b"one"), registry, InvalidConfiguration)
    assert "without a password (401)" in said


@pytest.mark.parametrize(
    ("realm", "kind", "reason"),
    [
        ("http://auth.example/token", InvalidConfiguration, "without TLS: --plain-http allows it"),
        ("file:///etc/passwd", InvalidData, "expected a URL as realm"),
        ("", InvalidData, "expected a URL as realm"),
    ],
)
async def test_passwords_do_not_go_anywhere(
    realm: str, kind: type[FusesnapError], reason: str
) -> None:
    challenge = httpx.Response(401, headers={"WWW-Authenticate": f'Bearer realm="{realm}"'})
    registry = FakeRegistry(answers=[once("GET", "/v2/", challenge)])
    assert reason in await refused(made(b"one"), registry, kind, credentials=ME)
    assert registry.tokens == []


async def test_another_host_that_takes_the_bytes_sees_no_token() -> None:
    registry = FakeRegistry(token="t1")
    seen: list[str | None] = []

    def elsewhere(request: httpx.Request) -> httpx.Response | None:
        if request.url.host == "storage.example":
            seen.append(request.headers.get("Authorization"))
            data = request.content
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            registry.blobs[digest] = data
            return httpx.Response(201)
        if request.method == "POST" and "/uploads/" in request.url.path:
            return httpx.Response(202, headers={"Location": "https://storage.example/up?key=1"})
        return None

    registry.answers.append(elsewhere)
    image = made(b"one")
    await pushed(image, registry, ME)
    assert whole(image, registry)
    assert seen == [None, None]


@pytest.mark.parametrize("answer", ["{}", "[]", '{"token": ""}', '{"token": "a\\nb"}'])
async def test_an_answer_without_a_token(answer: str) -> None:
    registry = FakeRegistry(
        token="t", answers=[once("GET", "/token", httpx.Response(200, text=answer))]
    )
    assert "expected a token" in await refused(made(b"one"), registry, InvalidData)
