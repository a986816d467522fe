"""Every error a user can catch, in one tree.

    LLMasOSError                     exit  HTTP
    ├── InvalidInputError             2    400   a value that the caller gave is wrong
    │   ├── ContextOverflowError      2    400   prompt + new tokens exceed the model's context
    │   ├── NoChatTemplateError       2    400   chat asked of a model that has no template
    │   └── UnsupportedError          2    400   a sensible wish that this model or build can't grant
    ├── NotFoundError                 3    404   no such model, file, application
    ├── FormatError                   4    422   the bytes of a file are not what they claim to be
    │   ├── PickleRefusedError        4    422   a checkpoint that could run code when loaded
    │   └── UnknownArchitectureError  4    422   a model family that this build does not know
    ├── StoreError                    5    500   the library on disk could not be read or written
    │   ├── ChecksumError             5    502   downloaded bytes do not match their hash
    │   ├── DiskFullError             5    507   no room for what should be written
    │   └── BusyError                 5    409   another process holds the same thing
    ├── NetworkError                  6    502   a host could not be reached or answered wrongly
    │   ├── OfflineError              6    503   a request to the outside was refused: offline mode
    │   └── ProviderError             6    502   a server that was asked answered with an error
    │       ├── BadRequestError       2    400   it refuses a value (400, 413, 415, 422); an InvalidInputError, too
    │       ├── AuthenticationError   6    502   it does not know the key (401)
    │       ├── PermissionDeniedError 6    502   the key may not do this (403)
    │       ├── ProviderNotFoundError 3    404   it has no such thing (404, 410); a NotFoundError, too
    │       ├── RateLimitError        6    503   too much was asked in a while (429)
    │       └── UnavailableError      6    503   it is busy, stopping, or its model died (502, 503, 504, 529)
    ├── DeviceError                   7    500   the asked device or dtype is not there
    │   └── InsufficientMemoryError   7    507   a plan does not fit into free memory
    ├── ToolLoopError                 1    500   a model's tool calls could not be carried through
    │   ├── ToolLimitError            1    500   it still called tools after as many answers as were allowed
    │   └── ToolError                 1    500   a tool raised an exception
    └── ServerError                   8    500   the server could not start (port in use, ...)
        └── ModelCrashedError         8    503   a model's process has ended; the request may be sent again

Each carries `message` (what happened, with the value) and `hint` (what to do next). The numbers are part of the
public interface: command-line exit codes and HTTP statuses follow this table and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class LLMasOSError(Exception):
    """Base of all errors that are meant for people.

    `message` says what happened and names the value; `hint` gives the next step, a command where there is one.
    """

    exit_code: int = 1
    http_status: int = 500

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def code(self) -> str:
        """Stable snake_case name, e.g. `context_overflow`; used in HTTP error bodies and `--json` output."""
        stem = type(self).__name__.removesuffix("Error")
        return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(stem))

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class InvalidInputError(LLMasOSError):
    """`param` names the field, flag or argument that is wrong, where there is one."""

    exit_code, http_status = 2, 400

    def __init__(self, message: str, *, hint: str = "", param: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class ContextOverflowError(InvalidInputError):
    """The request needs `prompt_tokens + max_tokens` positions and the model has `context_length`. `at_least`: the
    prompt was counted only as far as that."""

    def __init__(self, prompt_tokens: int, max_tokens: int, context_length: int, *, at_least: bool = False) -> None:
        self.prompt_tokens, self.max_tokens, self.context_length = prompt_tokens, max_tokens, context_length
        room = context_length - prompt_tokens
        asked = (
            f" and {max_tokens} new ones were asked for, together {prompt_tokens + max_tokens}" if max_tokens else ""
        )
        super().__init__(
            f"The prompt has {'more than ' * at_least}{prompt_tokens} tokens{asked}; this model's context holds "
            f"{context_length}.",
            hint=f"Shorten the prompt or ask for at most {room} new tokens."
            if room > 0
            else f"Shorten the prompt by at least {min(1, max_tokens) - room} tokens.",
            param="max_tokens" if max_tokens else "input",
        )


class NoChatTemplateError(InvalidInputError):
    pass


class UnsupportedError(InvalidInputError):
    pass


class NotFoundError(LLMasOSError):
    exit_code, http_status = 3, 404


class FormatError(LLMasOSError):
    exit_code, http_status = 4, 422


class PickleRefusedError(FormatError):
    pass


class UnknownArchitectureError(FormatError):
    pass


class StoreError(LLMasOSError):
    exit_code, http_status = 5, 500


class ChecksumError(StoreError):
    http_status = 502


class DiskFullError(StoreError):
    http_status = 507


class BusyError(StoreError):
    http_status = 409


class NetworkError(LLMasOSError):
    exit_code, http_status = 6, 502


class OfflineError(NetworkError):
    http_status = 503


class ProviderError(NetworkError):
    """What a server said no with.

    `status`: the HTTP status, 0 where there is none (an error inside a stream). `server_code`: the server's own name
    for what happened, e.g. `context_length_exceeded` or `model_crashed`. `param`: the field that it names.
    `request_id`: what its log has the request under. `retry_after`: the seconds that it asks to wait. Empty or None
    where it does not tell.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        status: int = 0,
        server_code: str = "",
        param: str | None = None,
        request_id: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.server_code = server_code
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after


class BadRequestError(ProviderError, InvalidInputError):
    exit_code, http_status = 2, 400


class AuthenticationError(ProviderError):
    pass


class PermissionDeniedError(ProviderError):
    pass


class ProviderNotFoundError(ProviderError, NotFoundError):
    exit_code, http_status = 3, 404


class RateLimitError(ProviderError):
    http_status = 503


class UnavailableError(ProviderError):
    http_status = 503


class DeviceError(LLMasOSError):
    exit_code, http_status = 7, 500


class InsufficientMemoryError(DeviceError):
    http_status = 507


class ToolLoopError(LLMasOSError):
    """`messages`: the conversation so far."""

    def __init__(self, message: str, *, hint: str = "", messages: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(message, hint=hint)
        self.messages = list(messages)


class ToolLimitError(ToolLoopError):
    pass


class ToolError(ToolLoopError):
    """`__cause__` is what the tool raised."""


class ServerError(LLMasOSError):
    exit_code, http_status = 8, 500


class ModelCrashedError(ServerError):
    """`retry_after`: seconds after which the model may be there again."""

    http_status = 503
    retry_after = 1


INT64 = 1 << 63


def error_facts(error: LLMasOSError) -> dict[str, Any]:
    """An error for the way to another process, in what JSON and msgpack have: the names of its class and of those above
    it, its text, its simple attributes."""
    simple = {
        name: value
        for name, value in vars(error).items()
        if name not in ("message", "hint")
        and (value is None or isinstance(value, str | float) or (isinstance(value, int) and -INT64 <= value < INT64))
    }
    kinds = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, LLMasOSError)]
    return {"kinds": kinds, "message": error.message, "hint": error.hint, "fields": simple}


def error_of(facts: Mapping[str, Any]) -> LLMasOSError:
    """The error again, of the nearest class of this module."""
    known = (globals().get(name) for name in facts["kinds"])
    kind = next((one for one in known if isinstance(one, type) and issubclass(one, LLMasOSError)), ServerError)
    error = kind.__new__(kind)
    error.__dict__.update(facts["fields"])
    error.message, error.hint = facts["message"], facts["hint"]
    error.args = (error.message,)
    return error
