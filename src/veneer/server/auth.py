"""API keys: who may call which route.

Every route needs a key when keys are configured, unknown paths too; open are only `/health` and `/ready`,
because load balancers cannot send one. Two kinds of key:

* an API key (`--api-key`, repeatable) may read everything, generate and tokenize, and delete responses: whoever
  knows a response's id has been told it,
* the admin key (`--admin-api-key`) may also change things. A change is any method other than GET and HEAD on
  a route that is not in `GENERATES`, so a route added later is protected before anybody thinks of it.

Without an admin key, API keys may change things; without any API key, only changes need the admin key.
Keys are compared in constant time, as bytes, against every configured key, and never logged.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from veneer.errors import Forbidden, Unauthorized, VeneerError
from veneer.server.errors import error_response

OPEN = frozenset({"/health", "/ready"})
GENERATES = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize"}
)
RESPONSES = "/v1/responses/"  # one of them by its id
READS = frozenset({"GET", "HEAD"})


class KeyCheck:
    """The rule, free of HTTP: which key may use which method on which path."""

    def __init__(self, api_keys: Iterable[str] = (), admin_key: str | None = None) -> None:
        self._api_keys = tuple(key.encode() for key in api_keys)
        self._admin_key = admin_key.encode() if admin_key else None

    def check(self, method: str, path: str, authorization: str | None) -> None:
        """Raise `Unauthorized` or `Forbidden` unless the `Authorization` header's key may do this."""
        if path in OPEN:
            return
        changes = method not in READS and path not in GENERATES and not path.startswith(RESPONSES)
        needs_admin = changes and self._admin_key is not None
        if not self._api_keys and not needs_admin:
            return
        key = _bearer(authorization)
        is_admin = self._admin_key is not None and hmac.compare_digest(key, self._admin_key)
        if is_admin:
            return
        if not _any_equal(key, self._api_keys):
            raise Unauthorized(
                "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'."
                if key
                else "No API key was sent: this server needs one as 'Authorization: Bearer KEY'."
            )
        if needs_admin:
            raise Forbidden(
                f"This API key may not {method} {path}: changes need the key set with --admin-api-key."
            )


class AuthMiddleware:
    """ASGI middleware that applies a `KeyCheck` before any route, body parsing or 404."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str] = (), admin_key: str | None = None) -> None:
        self.app = app
        self._rule = KeyCheck(api_keys, admin_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._rule.check(scope["method"], scope["path"], Headers(scope=scope).get("authorization"))
            except VeneerError as error:
                response = error_response(error)
                if error.status == Unauthorized.status:
                    response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _bearer(authorization: str | None) -> bytes:
    """The key of a `Bearer` header as bytes (empty when there is none). Header text is latin-1."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""


def _any_equal(key: bytes, known: tuple[bytes, ...]) -> bool:
    """Compare with every known key, without stopping at a hit."""
    found = False
    for candidate in known:
        found |= hmac.compare_digest(key, candidate)
    return found
