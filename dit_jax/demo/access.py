"""Who is answered, and with what headers: the Host and Origin of a request, the size of its body, the time that it may take.

The page has no password. What keeps other pages in the same browser out are the checks here: a page of another site sends its own
Origin (CSRF), and a name that an attacker's DNS points at this machine stands in the Host (DNS rebinding).
"""

import asyncio
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BODY = 16 * 1024  # bytes
BODY_SECONDS = 10.0
JSON_TYPE = "application/json"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Refused(Exception):
    """A request that is not answered with what it asks for; `status` is of HTTP."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status

    def response(self) -> JSONResponse:
        return JSONResponse({"error": str(self)}, self.status)


class Guard:
    """ASGI middleware: refuses other hosts and origins and large bodies, and sets HEADERS on every answer.

    Args:
        hosts: names under which the page may be reached, besides localhost and every numeric address. A numeric address cannot
            be pointed elsewhere by DNS.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] = ()):
        self.app, self.hosts = app, {name.lower() for name in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            check(scope["method"], Headers(scope=scope), self.hosts)
        except Refused as refused:
            await refused.response()(scope, receive, with_headers)
            return
        await self.app(scope, receive, with_headers)


def check(method: str, headers: Headers, hosts: Collection[str]) -> None:
    """Raises Refused unless the request comes from the page itself, or from a program on behalf of the user."""
    for name in ("host", "origin", "content-length", "content-type"):
        if len(headers.getlist(name)) > 1:
            raise Refused(400, f"the header {name} stands twice")
    host = headers.get("host", "")
    if not is_known(host, hosts):
        raise Refused(421, f"this server does not answer for {host[:100]!r}; start it with --hosts=<name>, or use its address")
    origin = headers.get("origin")
    if origin is not None and (urlsplit(origin).scheme not in ("http", "https") or urlsplit(origin).netloc != host):
        raise Refused(403, f"a page of {origin[:100]!r} may not use this server")
    if method not in ("GET", "HEAD") and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise Refused(403, "a page of another site may not use this server")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise Refused(400, "the header content-length is no number")
    if len(length) > 9 or int(length) > MOST_BODY:
        raise Refused(413, f"the request has {length[:20]} bytes; at most {MOST_BODY} are read")


def is_known(host: str, hosts: Collection[str]) -> bool:
    """Whether a Host header is localhost, a numeric address, or one of these names, each with or without a port."""
    try:
        name, _ = urlsplit(f"//{host}").hostname, urlsplit(f"//{host}").port
    except ValueError:
        return False
    if name is None or "@" in host or "/" in host:
        return False
    if name == "localhost" or name in hosts:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def json_body(request: Request) -> bytes:
    """The body of a request whose content type is JSON.

    Raises:
        Refused: another content type, which a form of another site could send; a body that is too large or does not arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON_TYPE:
        raise Refused(415, f"the content type is {kind[:60]!r}; send {JSON_TYPE}")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BODY:
                    raise Refused(413, f"the request is larger than the {MOST_BODY} bytes that are read")
    except TimeoutError:
        raise Refused(408, f"the request did not arrive within {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise Refused(400, "the client went away") from None
    return bytes(body)
