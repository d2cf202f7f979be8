"""http(s) URLs of media -> their bytes, within caps on hosts, addresses, redirects, bytes and time.

The name is resolved once, every address it has is judged, and the connection goes to one of those: what a second
look-up would say does not matter. TLS still proves the name. Redirects are not followed but judged anew. Nothing is
taken from the environment (proxies, netrc), no cookie is kept, nothing is decompressed.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence

import httpx

from cluster.errors import ImageTooLarge, InvalidImageUrl, MediaFetchFailed, MediaNotAllowed
from cluster.gateway.body import Loan
from cluster.media_rules import MediaRules

MAX_URL_CHARS = 8192
PORTS = {"http": 80, "https": 443}
MAX_REDIRECTS = 3
MAX_CONCURRENT_FETCHES = 32
MAX_FETCHES_OF_REQUEST = 8  # so that one with many images from a slow host does not use up the time of others
CHUNK_BYTES = 65536
HEADERS = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "tandem"}

Resolve = Callable[[str], Awaitable[Sequence[str]]]


def checked_url(rules: MediaRules, url: str, param: str | None = None) -> httpx.URL:
    """The parsed URL. Raises InvalidImageUrl for one that is malformed, MediaNotAllowed for one that may not be read:
    of a host that is not listed, with a user name in it, or with a port of its own where no private network is listed.
    """
    if len(url) > MAX_URL_CHARS:
        raise InvalidImageUrl(f"the URL has {len(url)} characters; at most {MAX_URL_CHARS} are allowed", param)
    try:
        parsed = httpx.URL(url)
        host = host_of(parsed)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise InvalidImageUrl(f"the URL is malformed: {error}", param) from None
    if parsed.scheme not in PORTS or not host:
        raise InvalidImageUrl("the URL is not of the form https://host/path", param)
    if parsed.userinfo:
        raise MediaNotAllowed("a URL with a user name or password is not read; leave it out", param)
    if not rules.lists(host):
        raise MediaNotAllowed(
            f"this server does not read images from {host[:100]!r}; send the image as a data: URL, or have the host "
            "added to gateway.media_hosts",
            param,
        )
    if parsed.port is not None and not 0 < parsed.port <= 65535:
        raise InvalidImageUrl(f"the URL names the port {parsed.port}; ports are 1..65535", param)
    if parsed.port not in (None, PORTS[parsed.scheme]) and not rules.private_networks:
        raise MediaNotAllowed(f"port {parsed.port} is not connected to; use the scheme's own", param)
    return parsed


def host_of(url: httpx.URL) -> str:
    """The host as it is looked up: ASCII, lower case, without a final dot."""
    return url.raw_host.decode("ascii").lower().removesuffix(".")


async def resolve(host: str) -> Sequence[str]:
    """All addresses of a host name, in the system's order of preference. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class MediaFetcher:
    """Reads media for the requests of one gateway; belongs to the event loop's thread."""

    def __init__(self, rules: MediaRules, *, max_bytes: int, timeout_s: float, resolve: Resolve = resolve) -> None:
        self._rules = rules
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._resolve = resolve
        self._places = asyncio.Semaphore(MAX_CONCURRENT_FETCHES)
        self._tls: ssl.SSLContext | None = None

    async def fetch_all(self, urls: Mapping[int, str], loan: Loan) -> dict[int, bytes]:
        """The media by image number, their bytes taken from `loan`. Nothing is being read any more when it returns.

        Raises InvalidImageUrl, MediaNotAllowed, ImageTooLarge, MediaFetchFailed, each naming its image; Overloaded.
        """
        places = asyncio.Semaphore(MAX_FETCHES_OF_REQUEST)

        async def fetch(index: int, url: str) -> bytes:
            async with places:
                return await self._fetch(url, f"image {index}", loan)

        tasks = {index: asyncio.create_task(fetch(index, url)) for index, url in urls.items()}
        try:
            return dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _fetch(self, url: str, param: str, loan: Loan) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s), self._places:
                return await self._follow(url, param, loan)
        except TimeoutError:
            raise MediaFetchFailed(f"the image did not arrive within {self._timeout_s:g} s", param) from None
        except httpx.TransportError as error:
            raise MediaFetchFailed(f"the image could not be read: {type(error).__name__}", param) from None

    async def _follow(self, url: str, param: str, loan: Loan) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            parsed = checked_url(self._rules, url, param)
            async with httpx.AsyncClient(verify=self._context(), trust_env=False, timeout=self._timeout_s) as client:
                response = await self._connect(client, parsed, param)
                try:
                    if not response.has_redirect_location:
                        return await self._read(response, param, loan)
                    url = _joined(parsed, response.headers["location"], param)
                finally:
                    await response.aclose()
        raise MediaFetchFailed(f"the image's URL redirects more than {MAX_REDIRECTS} times", param)

    async def _connect(self, client: httpx.AsyncClient, url: httpx.URL, param: str) -> httpx.Response:
        """The response's head, from the first address that takes the connection."""
        host = host_of(url)
        try:
            found = await self._resolve(host)
        except (OSError, UnicodeError):
            raise MediaFetchFailed(f"the host {host[:100]!r} is not known", param) from None
        addresses = [self._rules.check_address(address, param) for address in found]
        named = {**HEADERS, "host": url.netloc.decode("ascii")}
        for address in addresses:
            limits = httpx.Timeout(self._timeout_s, connect=self._timeout_s / (len(addresses) + 1))
            request = client.build_request("GET", url.copy_with(host=address), headers=named, timeout=limits)
            request.extensions["sni_hostname"] = host
            try:
                return await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
            except (httpx.InvalidURL, UnicodeError):  # it reads where a redirect leads before it is asked to
                raise InvalidImageUrl("the image's URL redirects to something malformed", param) from None
        raise MediaFetchFailed(f"the host {host[:100]!r} takes no connection, or does not prove its name", param)

    async def _read(self, response: httpx.Response, param: str, loan: Loan) -> bytes:
        if response.status_code != 200:
            raise MediaFetchFailed(f"the image's server answered with status {response.status_code}", param)
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise MediaFetchFailed("the image's server sent it compressed without being asked", param)
        declared = response.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:18]) > self._max_bytes:
            raise ImageTooLarge(f"the image has {declared[:18]} bytes; at most {self._max_bytes} are allowed", param)
        parts: list[bytes] = []
        total = 0
        async for part in response.aiter_raw(CHUNK_BYTES):
            total += len(part)
            if total > self._max_bytes:
                raise ImageTooLarge(f"the image exceeds {self._max_bytes} bytes", param)
            loan.take(len(part))
            parts.append(part)
        if not total:
            raise MediaFetchFailed("the image's server sent nothing", param)
        return b"".join(parts)

    def _context(self) -> ssl.SSLContext:
        """Made once, at the first fetch: reading the certificates takes tens of milliseconds."""
        if self._tls is None:
            self._tls = httpx.create_ssl_context(trust_env=False)
        return self._tls


def _joined(url: httpx.URL, location: str, param: str) -> str:
    try:
        joined = url.join(location)
    except (httpx.InvalidURL, UnicodeError):
        raise InvalidImageUrl("the image's URL redirects to something malformed", param) from None
    if url.scheme == "https" and joined.scheme != "https":
        raise MediaFetchFailed("the image's URL redirects from https to something else", param)
    return str(joined)
