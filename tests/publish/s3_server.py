"""A bucket that speaks enough of S3's protocol, and that refuses what is not signed as it must be.

Source: AWS, "Authenticating Requests: Using the Authorization Header (AWS Signature Version 4)".
"""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

ACCESS_KEY, SECRET_KEY, REGION, BUCKET = "test-access", "test-secret", "eu-test-1", "bucket"
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/([^,]+), ?SignedHeaders=([^,]+), ?Signature=([0-9a-f]{64})"
)


class Bucket:
    """``objects`` by key, with the headers that they were put with; ``failures`` answers 503 so many times first."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.failures = 0
        self.refused = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/cache?endpoint=127.0.0.1:{self.port}&scheme=http&region={REGION}"


def expected_signature(method: str, target: str, headers: dict[str, str]) -> str | None:
    """What the request must carry, or None where its Authorization cannot be read."""
    match = _AUTHORIZATION.fullmatch(headers.get("authorization", ""))
    if match is None or match[1] != ACCESS_KEY:
        return None
    scope, names = match[2], match[3].split(";")
    parts = urlsplit(target)
    pairs = sorted(parse_qsl(parts.query, keep_blank_values=True))
    canonical = "\n".join(
        (
            method,
            quote(unquote(parts.path), safe="/-_.~"),
            "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in pairs),
            *(f"{name}:{headers.get(name, '').strip()}" for name in names),
            "",
            match[3],
            headers.get("x-amz-content-sha256", ""),
        )
    )
    text = "\n".join(
        (
            "AWS4-HMAC-SHA256",
            headers.get("x-amz-date", ""),
            scope,
            hashlib.sha256(canonical.encode()).hexdigest(),
        )
    )
    key = f"AWS4{SECRET_KEY}".encode()
    for word in (*scope.split("/")[:3], "aws4_request"):
        key = hmac.digest(key, word.encode(), "sha256")
    return hmac.digest(key, text.encode(), "sha256").hex()


def _handler(bucket: Bucket) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            """Say nothing."""

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            key = self._key(body)
            if key is not None:
                kept = {name: self.headers[name] for name in ("Content-Type", "Cache-Control")}
                bucket.objects[key] = (body, kept)
                self._answer(200)

        def do_GET(self) -> None:
            key = self._key()
            if key == "":
                self._list()
            elif key is not None and key in bucket.objects:
                self._answer(200, bucket.objects[key][0])
            elif key is not None:
                self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

        def do_HEAD(self) -> None:
            self.do_GET()

        def _key(self, body: bytes = b"") -> str | None:
            """The object that is meant; None where an answer was sent already."""
            headers = {name.lower(): value for name, value in self.headers.items()}
            announced = headers.get("x-amz-content-sha256", "")
            signed = headers.get("authorization", "")[-64:]
            if expected_signature(self.command, self.path, headers) != signed or announced not in (
                hashlib.sha256(body).hexdigest(),
                "UNSIGNED-PAYLOAD",
            ):
                bucket.refused += 1
                self._answer(403, b"<Error><Code>SignatureDoesNotMatch</Code></Error>")
                return None
            if bucket.failures:
                bucket.failures -= 1
                self._answer(503, b"<Error><Code>SlowDown</Code></Error>")
                return None
            return unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}").lstrip("/")

        def _list(self) -> None:
            prefix = dict(parse_qsl(urlsplit(self.path).query)).get("prefix", "")
            found = "".join(
                f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>x</ETag>"
                "<LastModified>2024-01-01T00:00:00Z</LastModified></Contents>"
                for key, (data, _) in sorted(bucket.objects.items())
                if key.startswith(prefix) and "/" not in key[len(prefix) :]
            )
            text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
            self._answer(200, text.encode())

        def _answer(self, status: int, body: bytes = b"") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"x"')
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


@contextmanager
def s3_server() -> Iterator[Bucket]:
    """Serve a bucket for the time of the context."""
    bucket = Bucket()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(bucket))
    server.daemon_threads = True
    bucket.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
