"""The errors a caller can meet, each with its place in OpenAI's error shape.

    VeneerError
    ├── InvalidRequest        400  the request itself is wrong; `param` names the field
    │   ├── AdapterRefused    400  an adapter's files cannot be served exactly as they are
    │   └── StorageFull       400  the disk has no room for what was sent
    ├── Unauthorized          401
    ├── Forbidden             403
    ├── NotFound              404
    ├── Conflict              409  the state of the thing does not allow this now
    │   └── MergeCancelled    409  somebody ended the merge
    ├── TooLarge              413
    ├── QueueFull             429  `retry_after` seconds
    ├── DeadlineExceeded      504
    └── EngineUnavailable     503  the engine is starting, draining or dead

A message names the thing, shows the value, states the rule and says what to do.
"""

from __future__ import annotations


class VeneerError(Exception):
    """Base of all errors that are reported to a client."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(VeneerError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class AdapterRefused(InvalidRequest):
    code = "adapter_refused"


class StorageFull(InvalidRequest):
    code = "storage_full"


class Unauthorized(VeneerError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(VeneerError):
    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFound(VeneerError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(VeneerError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class MergeCancelled(Conflict):
    code = "merge_cancelled"

    def __init__(self) -> None:
        super().__init__("The merge was cancelled; nothing of it is left.")


class TooLarge(VeneerError):
    status = 413
    type = "invalid_request_error"
    code = "too_large"


class QueueFull(VeneerError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineUnavailable(VeneerError):
    status = 503
    type = "server_error"
    code = "engine_unavailable"


class DeadlineExceeded(VeneerError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


_BY_STATUS: dict[int, type[VeneerError]] = {
    kind.status: kind
    for kind in (
        InvalidRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        Conflict,
        TooLarge,
        EngineUnavailable,
        DeadlineExceeded,
    )
}


def from_wire(status: int, code: str, message: str, param: str | None) -> VeneerError:
    """Rebuild an error that crossed the process boundary as plain values."""
    if status == QueueFull.status:
        return QueueFull(message)
    return _BY_STATUS.get(status, VeneerError)(message, param=param, code=code)
