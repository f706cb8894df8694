"""What a client is told when it does not get what it asked for, in the form of OpenAI's API."""

from typing import Any


class APIError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the field of the body that it is about.
        code: a word for programs.
        retry_after: after which another attempt may succeed [seconds].
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def kind(self) -> str:
        """The `type` that OpenAI's API has for this status."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """A request that cannot be answered as it is."""
    return APIError(400, message, param=param, code=code)
