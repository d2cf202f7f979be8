"""Images by http(s) URL: what is read, from where, and what is refused; against servers on this machine."""

from __future__ import annotations

import asyncio
import base64
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cluster.config import GatewayConfig
from cluster.errors import ConfigError, InvalidImageUrl, MediaNotAllowed
from cluster.gateway.media_fetch import MAX_REDIRECTS, MediaFetcher, checked_url, resolve
from cluster.media_rules import MediaRules
from tests.cluster.gateway.harness import Gateway, assert_error, gateway, run
from tests.cluster.gateway.test_failures import call_and_leave

LOOPBACK = ("127.0.0.0/8",)
IMAGE = bytes(range(256)) * 8
INLINE = "data:image/png;base64," + base64.b64encode(b"inline").decode()
NAME = "images.test"


def answer(status: str = "200 OK", body: bytes = IMAGE, **headers: str) -> bytes:
    headers = {"content-length": str(len(body)), "connection": "close", **headers}
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Server:
    """Answers each path with its bytes; a path that has none is never answered. `heads`: what it was asked."""

    def __init__(self, answers: dict[str, bytes]) -> None:
        self.answers = answers
        self.heads: list[str] = []
        self.num_open = 0
        self.asked = asyncio.Event()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            self.asked.set()
            found = self.answers.get(head.split()[1])
            if found is None:
                await reader.read()  # until the other side closes
            else:
                writer.write(found)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.num_open -= 1
            writer.close()


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None, **answers: bytes) -> AsyncIterator[Server]:
    """A server with an answer per path: `a=...` for /a. When it is left, every connection was closed by its client."""
    server = Server({f"/{name}": value for name, value in answers.items()})
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
        while server.num_open:
            await asyncio.sleep(0.001)
    finally:
        listener.close()


def asking(*urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]}


def config(**changes: Any) -> GatewayConfig:
    values: dict[str, Any] = {"media_hosts": ("*",), "media_private_networks": LOOPBACK, "max_image_bytes": 4096}
    return GatewayConfig(**{**values, **changes})


def use_names(gate: Gateway, settings: GatewayConfig, lookup: Callable[[str], Sequence[str]]) -> None:
    """Let `lookup` resolve host names."""

    async def resolve(host: str) -> Sequence[str]:
        return lookup(host)

    gate.app.state.gateway.fetcher = MediaFetcher(
        settings.media_rules,
        max_bytes=settings.max_image_bytes,
        timeout_s=settings.media_timeout_s,
        resolve=resolve,
    )


def test_images_by_url_and_inline_reach_the_workers_in_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(a=answer(), b=answer(body=b"other")) as server, gateway(tmp_path, config=config()) as gate:
            base = f"http://127.0.0.1:{server.port}"
            response = await gate.chat(**asking(f"{base}/a", INLINE, f"HTTP://127.0.0.1:{server.port}/b"))
            assert response.status_code == 200, response.text
            assert gate.handoff.submitted[0].request.media == (IMAGE, b"inline", b"other")
            assert all(f"host: 127.0.0.1:{server.port}" in head.lower() for head in server.heads)
            assert not any("cookie" in head.lower() or "authorization" in head.lower() for head in server.heads)

    run(main())


def test_redirects_are_followed_where_each_hop_is_allowed(tmp_path: Path) -> None:
    async def main() -> None:
        settings = config(media_hosts=(NAME, ".cdn.test"))
        async with serving(b=answer()) as server, gateway(tmp_path, config=settings) as gate:
            asked: list[str] = []
            use_names(gate, settings, lambda host: asked.append(host) or ["127.0.0.1"])  # type: ignore[func-returns-value]
            base = f":{server.port}"
            server.answers["/a"] = answer("302 Found", b"", location=f"http://x.cdn.test{base}/c")
            server.answers["/c"] = answer("307 Temporary Redirect", b"", location="/b")
            response = await gate.chat(**asking(f"http://{NAME}{base}/a"))
            assert response.status_code == 200, response.text
            assert gate.handoff.submitted[0].request.media == (IMAGE,)
            assert asked == [NAME, "x.cdn.test", "x.cdn.test"], "each hop was looked up once"

    run(main())


FAILURES: dict[str, tuple[bytes | None, str]] = {
    "too long, declared": (answer(body=b"x" * 4097), "image_too_large"),
    "a length of many digits": (answer(content_length="9" * 30), "media_fetch_failed"),
    "too long, not declared": (
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + b"x" * 100_000,
        "image_too_large",
    ),
    "too long, in chunks": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        + b"1000\r\n"
        + b"x" * 4096
        + b"\r\n1\r\nx\r\n0\r\n\r\n",
        "image_too_large",
    ),
    "shorter than declared": (answer(content_length="3000"), "media_fetch_failed"),
    "nothing": (answer(body=b""), "media_fetch_failed"),
    "not found": (answer("404 Not Found"), "media_fetch_failed"),
    "no content": (answer("204 No Content", b""), "media_fetch_failed"),
    "compressed": (answer(content_encoding="gzip"), "media_fetch_failed"),
    "no HTTP": (b"\x89PNG\r\n\r\n", "media_fetch_failed"),
    "closed": (b"", "media_fetch_failed"),
    "endless head": (b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 1_000_000, "media_fetch_failed"),
    "a redirect to itself": (answer("302 Found", b"", location="/a"), "media_fetch_failed"),
    "a redirect to a file": (answer("302 Found", b"", location="file:///etc/passwd"), "invalid_image_url"),
    "a redirect to a host inside": (answer("302 Found", b"", location="http://10.0.0.1/x"), "media_not_allowed"),
    "a redirect to a mailbox": (answer("302 Found", b"", location="mailto:a@b"), "invalid_image_url"),
    "a redirect to a script": (answer("302 Found", b"", location="javascript:alert(1)"), "invalid_image_url"),
    "a redirect to half a URL": (answer("302 Found", b"", location="http:a"), "invalid_image_url"),
    "a redirect to a bad name": (answer("302 Found", b"", location="http://xn--"), "invalid_image_url"),
    "a redirect without a target": (answer("302 Found", b""), "media_fetch_failed"),
    "silence": (None, "media_fetch_failed"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_a_server_may_answer(tmp_path: Path, name: str) -> None:
    sent, code = FAILURES[name]

    async def main() -> None:
        settings = config(media_timeout_s=0.5 if sent is None else 60.0)
        async with serving() as server, gateway(tmp_path, config=settings) as gate:
            if sent is not None:
                server.answers["/a"] = sent
            error = assert_error(await gate.chat(**asking(INLINE, f"http://127.0.0.1:{server.port}/a")), 400, code)
            assert error["param"] == "image 1"
            assert not gate.handoff.submitted
            num_asked = len(server.heads)
            assert num_asked == (MAX_REDIRECTS + 1 if "itself" in name else 1) or (sent is None and not num_asked)
            again = await gate.chat(**asking(INLINE))
            assert again.status_code == 200, "the next request is unharmed"

    run(main())


def test_bytes_beyond_the_budget_of_all_requests_are_refused_and_given_back(tmp_path: Path) -> None:
    async def main() -> None:
        settings = config(max_body_bytes=700, max_image_bytes=10_000)  # 2800 for all
        async with serving(a=answer(), b=answer()) as server, gateway(tmp_path, config=settings) as gate:
            base = f"http://127.0.0.1:{server.port}"
            assert_error(await gate.chat(**asking(f"{base}/a", f"{base}/b")), 503, "overloaded")
            assert gate.app.state.gateway.budget.used == 0
            assert (await gate.chat(**asking(f"{base}/a"))).status_code == 200

    run(main())


def test_a_client_that_leaves_ends_the_reading(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving() as server, gateway(tmp_path, config=config(media_timeout_s=600.0)) as gate:
            url = f"http://127.0.0.1:{server.port}/a"
            sent = await call_and_leave(gate, asking(url), server.asked)
            assert [m["status"] for m in sent if m["type"] == "http.response.start"] in ([], [499])
            assert len(server.heads) == 1
            assert not gate.handoff.submitted

    run(main())


def test_names_that_lead_inside_are_not_connected_to(tmp_path: Path) -> None:
    """However many addresses a name has: one that is not public is enough."""

    async def main() -> None:
        settings = config(media_private_networks=())
        async with serving(a=answer()) as server, gateway(tmp_path, config=settings) as gate:
            for found in (["127.0.0.1"], ["192.0.2.1", "127.0.0.1"], ["::ffff:127.0.0.1"], ["fe80::1%eth0"]):
                use_names(gate, settings, lambda _, found=found: found)  # type: ignore[misc]
                assert_error(await gate.chat(**asking(f"http://{NAME}/a")), 400, "media_not_allowed")
            assert_error(await gate.chat(**asking(f"http://{NAME}:{server.port}/a")), 400, "media_not_allowed")
            assert not server.heads

    run(main())


def test_an_unknown_name_is_said_to_be_unknown(tmp_path: Path) -> None:
    def unknown(host: str) -> Sequence[str]:
        raise OSError("no such host")

    async def main() -> None:
        async with gateway(tmp_path, config=config()) as gate:
            use_names(gate, config(), unknown)
            error = assert_error(await gate.chat(**asking(f"http://{NAME}/a")), 400, "media_fetch_failed")
            assert NAME in error["message"]

    run(main())
    assert run(resolve("127.0.0.1")) == ["127.0.0.1"]


def test_a_server_that_takes_no_connection_is_passed_over(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(a=answer()) as server, gateway(tmp_path, config=config()) as gate:
            use_names(gate, config(), lambda _: ["127.0.0.2", "127.0.0.1"])  # nobody listens at the first
            assert (await gate.chat(**asking(f"http://{NAME}:{server.port}/a"))).status_code == 200
            assert gate.handoff.submitted[0].request.media == (IMAGE,)

    run(main())


@pytest.mark.parametrize("certified", [NAME, "other.test", None])
def test_a_server_proves_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certified: str | None) -> None:
    """By a certificate for the name in the URL, though the connection goes to an address; None: of a stranger."""
    tls = _certificate(tmp_path, certified or NAME)
    if certified is not None:
        trusting = ssl.create_default_context(cafile=str(tmp_path / "certificate.pem"))
        monkeypatch.setattr(httpx, "create_ssl_context", lambda **_: trusting)

    async def main() -> None:
        async with serving(tls, a=answer()) as server, gateway(tmp_path, config=config()) as gate:
            use_names(gate, config(), lambda _: ["127.0.0.1"])
            response = await gate.chat(**asking(f"https://{NAME}:{server.port}/a"))
            if certified == NAME:
                assert response.status_code == 200, response.text
            else:
                assert_error(response, 400, "media_fetch_failed")
                assert not server.heads

    run(main())


def _certificate(folder: Path, name: str) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("8.8.8.8", True), ("2606:4700::1", True), ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True),
        ("127.0.0.1", False), ("0.0.0.0", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False),
        ("198.18.0.1", False), ("240.0.0.1", False), ("::", False), ("::1", False), ("fe80::1%eth0", False),
        ("fc00::1", False), ("fec0::1", False), ("ff02::1", False), ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False), ("2002:7f00:1::", False), ("2002:a00:1::", False),
        ("192.0.0.192", False), ("168.63.129.16", False), ("::127.0.0.1", False), ("::ffff:0:127.0.0.1", False),
        ("64:ff9b:1::a9fe:a9fe", False), ("3fff::1", False), ("5f00::1", False), ("192.0.0.8", False),
        ("64:ff9b::7f00:1", False), ("64:ff9b::a9fe:a9fe", False), ("2001:0:7f00:1::", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, is_public: bool) -> None:
    rules = MediaRules(("*",))
    if is_public:
        assert ipaddress.ip_address(rules.check_address(address)) == ipaddress.ip_address(address)
    else:
        with pytest.raises(MediaNotAllowed, match="public address"):
            rules.check_address(address)


def test_a_listed_network_is_allowed_and_no_other() -> None:
    rules = MediaRules(("*",), ("10.1.0.0/16", "fd00::/8"))
    assert [rules.check_address(a) for a in ("10.1.2.3", "fd00::1", "::ffff:10.1.0.1")]
    for address in ("10.2.0.1", "127.0.0.1", "fc00::1"):
        with pytest.raises(MediaNotAllowed):
            rules.check_address(address)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("https://images.test/a.png?x=1#y", None),
        ("https://IMAGES.test./a.png", None),
        ("https://images.test:443/a", None),
        ("https://a.b.cdn.test/", None),
        ("https://cdn.test/", MediaNotAllowed),
        ("https://evilcdn.test/", MediaNotAllowed),
        ("https://images.test.evil.test/", MediaNotAllowed),
        ("https://images.test@evil.test/", MediaNotAllowed),
        ("https://evil.test#@images.test/", MediaNotAllowed),
        ("https://evil.test\\@images.test/", (MediaNotAllowed, InvalidImageUrl)),
        ("https://user:secret@images.test/", MediaNotAllowed),
        ("https://images.test:8443/", MediaNotAllowed),
        ("https://2130706433/", MediaNotAllowed),
        ("https://[::1]/", MediaNotAllowed),
        ("https:///a.png", InvalidImageUrl),
        ("https://images.test:99999/", InvalidImageUrl),
        ("https://images.test:0/", InvalidImageUrl),
        ("https://images.test/\r\nhost: x", InvalidImageUrl),
        ("https://" + "a" * 9000, InvalidImageUrl),
    ],
)
def test_which_urls_are_read(url: str, error: Any) -> None:
    rules = MediaRules(("images.test", ".cdn.test"))
    if error is None:
        assert rules.lists(checked_url(rules, url).host.rstrip("."))
    else:
        with pytest.raises(error):
            checked_url(rules, url)


@pytest.mark.parametrize(
    "changes",
    [
        {"media_hosts": ("https://images.test",)}, {"media_hosts": ("",)}, {"media_hosts": ("..test",)},
        {"media_hosts": ("*.test",)}, {"media_private_networks": ("10.0.0.1/8",)}, {"media_timeout_s": 0.0},
        {"media_private_networks": ("inside",)}, {"media_timeout_s": float("nan")},
    ],
)  # fmt: skip
def test_rules_that_mean_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        GatewayConfig(**changes)
