"""Who may ask: whoever shows the token, or a certificate that the node was told to trust."""

import hmac
from collections.abc import Sequence

from aiohttp import web

from coordinator.errors import Forbidden, Unauthorized


def check_token(request: web.Request, token: str | None, older: Sequence[str] = ()) -> None:
    """Raise `Unauthorized` or `Forbidden` unless no token is configured, or the request carries it or an `older` one.

    A client certificate counts as the token: the TLS handshake has verified it, or there would be no request. Nodes ask
    for one only when `tls.client_ca` is set.
    """
    if token is None or shows_certificate(request):
        return
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise Unauthorized("send the configured token: Authorization: Bearer <token>")
    shown = given.encode("utf-8", "replace")
    # All are compared, so that the time taken does not tell which one was close.
    matches = [hmac.compare_digest(shown, each.encode()) for each in (token, *older)]
    if not any(matches):
        raise Forbidden("the token is not the configured one")


def check_origin(request: web.Request) -> None:
    """Raise `Forbidden` for a request that a page of another site made in somebody's browser.

    Browsers let any page post to loopback, where a node may have no token, and name the page's origin when they do.
    """
    origin = request.headers.get("Origin")
    if origin is not None and origin.rpartition("//")[2] != request.host:
        raise Forbidden("pages of other sites may not use this node")


def shows_certificate(request: web.Request) -> bool:
    """Whether the client has proved, in the TLS handshake, that a certificate of a trusted issuer is its own."""
    return request.transport is not None and bool(request.transport.get_extra_info("peercert"))
