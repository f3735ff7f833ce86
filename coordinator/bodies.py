"""A request's body: bounded in size and in time, for one on its way holds memory and a connection."""

import asyncio
from typing import Final

from aiohttp import web

from coordinator.config import Limits
from coordinator.errors import BadRequest, SlowBody, TooLarge

BODY_WITHIN_S: Final = 10.0
"""Who sends more slowly is cut off."""


async def whole_body(request: web.Request, limits: Limits) -> bytes:
    """All of it. Raises `TooLarge`, `SlowBody`, `BadRequest`."""
    length = request.content_length
    if length is not None and length > limits.max_body_bytes:
        raise _too_large(limits)
    try:
        if request.content.is_eof():
            body = request.content.read_nowait()  # nearly always it has come with the headers
            if len(body) > limits.max_body_bytes:
                raise _too_large(limits)
            return body
        async with asyncio.timeout(BODY_WITHIN_S):
            return await request.read()
    except TimeoutError as error:
        raise SlowBody(f"the body must arrive within {BODY_WITHIN_S:g} s; nothing was done") from error
    except ConnectionError as error:
        # Nobody is there to hear it; but it is no defect of this node either, and none must be logged.
        raise BadRequest("the connection ended before the body did") from error


def _too_large(limits: Limits) -> TooLarge:
    return TooLarge(f"the body exceeds {limits.max_body_bytes} bytes (max_body_bytes)")
