"""Who may ask."""

import hmac

from aiohttp import web

from coordinator.errors import Forbidden, Unauthorized


def check_token(request: web.Request, token: str | None) -> None:
    """Raise `Unauthorized` or `Forbidden` unless no token is configured or the request carries it."""
    if token is None:
        return
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise Unauthorized("send the configured token: Authorization: Bearer <token>")
    if not hmac.compare_digest(given.encode("utf-8", "replace"), token.encode()):
        raise Forbidden("the token is not the configured one")
