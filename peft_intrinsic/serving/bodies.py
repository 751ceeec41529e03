"""The bodies of requests and errors, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

Zero = Annotated[float, Field(ge=0, le=0)]
"""An option that is not supported, with the value that has no effect."""


class Strict(BaseModel):
    """An object whose unknown fields raise an error. Fields that are null count as missing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        """Remove fields that are null."""
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False


class Generation(Strict):
    """What completions and chats have in common."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1, ge=0, le=2)
    top_p: float = Field(1, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""
    n: Literal[1] = 1
    presence_penalty: Zero = 0
    frequency_penalty: Zero = 0


class Completion(Generation):
    """The body of /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1)]
    best_of: Literal[1] = 1
    echo: Literal[False] = False


class Part(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a chat."""

    role: str
    content: str | list[Part]

    def as_text(self) -> dict[str, str]:
        """The message with its parts joined, as chat templates take it."""
        joined = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": joined}


class Chat(Generation):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] = False


class Classification(Strict):
    """The body of /classify."""

    model: str
    input: str | Annotated[list[str], Field(min_length=1)]


class ApiError(Exception):
    """An error for the client.

    Args:
        status: HTTP status.
        message: what was wrong, and what to do.
        code: a word for it.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "code": code, "param": None}}

    def respond(self) -> JSONResponse:
        """Make the response."""
        return JSONResponse(self.body, self.status)


def explain(errors: Sequence[Any]) -> str:
    """Name the fields that are wrong, by the errors of pydantic."""
    found: dict[str, str] = {}
    for error in errors:
        names = [str(part) for part in error["loc"][1:] if part != "str" and "[" not in str(part)]
        field = ".".join(names) if names and error["type"] != "json_invalid" else "The body"
        unknown = error["type"] == "extra_forbidden"
        found.setdefault(field, "is not supported. Leave it out." if unknown else f"is invalid: {error['msg']}.")
    return " ".join(f"{field} {problem}" for field, problem in found.items())
