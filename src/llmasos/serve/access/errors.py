"""How access is refused. Codes are OpenAI's where it has one."""

from __future__ import annotations

from llmasos.errors import LLMasOSError


class UnauthorizedError(LLMasOSError):
    """No key, or none that this server knows, or one that is over."""

    http_status = 401
    code = "invalid_api_key"


class AccessUnavailableError(LLMasOSError):
    """Who asks can't be found out just now. The cause is in the log; it is nothing for strangers."""

    http_status = 503
    retry_after = 5

    def __init__(self) -> None:
        super().__init__("Keys can't be checked at the moment.", hint="Try again in a moment.")


class ForbiddenError(LLMasOSError):
    """The key is known and may not do this."""

    http_status = 403
    code = "insufficient_permissions"


class LimitError(LLMasOSError):
    """Too much in a while. `retry_after`: seconds until there is room again."""

    http_status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, hint: str = "", retry_after: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class QuotaError(LimitError):
    """A day's or month's share is used up."""

    code = "insufficient_quota"
