"""OpenAI's Responses API on the wire: requests, answers, conversations. Items and events have modules of their own.

Source: OpenAI API reference, Responses. Fields under "extensions" are not OpenAI's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

from llmasos.client.types.base import KeptRequest, WireRequest, WireResponse
from llmasos.client.types.response_items import Id, InputItem, OutputItem, OutputMessage, text_or_list

_INT64 = 2**63
ResponseStatus = Literal["completed", "failed", "in_progress", "cancelled", "queued", "incomplete"]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], MetadataValue], Field(max_length=16)]
"""Labels: up to 16, names up to 64 characters, values up to 512 (OpenAI's limits)."""


class FunctionTool(WireRequest):
    """`strict` false asks for no more than true."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class OtherTool(BaseModel):
    """Tools that OpenAI hosts (web_search, file_search …) and free-form ones: refused by name."""

    model_config = ConfigDict(extra="allow")
    type: str


def _tool_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "<function>" if kind == "function" else "<other>"


ResponseTool = Annotated[
    Annotated[FunctionTool, Tag("<function>")] | Annotated[OtherTool, Tag("<other>")], Discriminator(_tool_tag)
]


class FunctionChoice(WireRequest):
    type: Literal["function"]
    name: str


class AllowedTools(WireRequest):
    """The model may (`auto`) or must (`required`) call one of these and none of the others."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[dict[str, JsonValue]] = Field(min_length=1)


class OtherChoice(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: str


def _choice_tag(value: Any) -> str:
    if isinstance(value, str):
        return "<text>"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("function", "allowed_tools") else "<other>"


ResponseToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")]
    | Annotated[FunctionChoice, Tag("<function>")]
    | Annotated[AllowedTools, Tag("<allowed_tools>")]
    | Annotated[OtherChoice, Tag("<other>")],
    Discriminator(_choice_tag),
]


class TextFormat(WireRequest):
    """`strict` false asks for no more than true: a schema is always enforced."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, JsonValue] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _fields_fit_the_type(self) -> TextFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("a format of type 'json_schema' has no schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f"a format of type {self.type!r} takes no schema")
        return self


class TextConfig(WireRequest):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ReasoningConfig(WireRequest):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"context": ("auto",), "mode": ("standard",)}

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="auto and detailed: the reasoning itself is given as its summary. concise is refused."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(None, description="Older name of summary.")


class ResponseStreamOptions(WireRequest):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}


class ConversationReference(WireRequest):
    id: Id


class InputRequest(KeptRequest):
    """What the prompt is made of: shared by POST /v1/responses and /v1/responses/input_tokens."""

    model: str = Field(description="Name of a served model, as in /v1/models.")
    input: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[InputItem], Tag("<list>")], Discriminator(text_or_list)
    ] = Field(description="A user's message as text, or a list of items.")
    instructions: str | None = Field(None, description="The system message; not carried over to later responses.")
    previous_response_id: Id | None = Field(None, description="A stored response that this one goes on from.")
    conversation: Id | ConversationReference | None = Field(
        None, description="A stored conversation that this response goes on from and is added to."
    )
    tools: list[ResponseTool] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None


class ResponseRequest(InputRequest):
    """Body of POST /v1/responses."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "access_programs": (),
        "background_options": ({}, {"completion_window": "soonest"}),
        "context_management": ([],),
        "image": ({},),
        "moderation": (),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "service_tier": ("auto", "default"),
        "truncation": ("disabled",),
    }
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2-135m-instruct",
                    "input": "What is the capital of France?",
                    "max_output_tokens": 64,
                    "temperature": 0,
                }
            ]
        }
    )

    background: bool | None = Field(None, description="Answer at once and go on working; needs store.")
    include: list[str] | None = Field(
        None, description="message.output_text.logprobs and reasoning.encrypted_content; others are refused."
    )
    max_output_tokens: int | None = Field(None, ge=1, description="Default: what the context still holds.")
    max_tool_calls: int | None = Field(None, ge=1, description="Limits calls of hosted tools, of which there are none.")
    metadata: Metadata | None = Field(None, description="Your labels; the answer does not depend on them.")
    prompt_cache_key: str | None = Field(None, description="Your label; the answer does not depend on it.")
    safety_identifier: str | None = Field(None, description="Your label; the answer does not depend on it.")
    store: bool | None = Field(None, description="Keep the response for later. Default true; false keeps nothing.")
    stream: bool | None = Field(None, description="Send server-sent events instead of one body.")
    stream_options: ResponseStreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="Default: the model's own, else 1.")
    top_p: float | None = Field(None, ge=0, le=1)
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="Alternatives per token; needs include: message.output_text.logprobs."
    )
    user: str | None = Field(None, description="Your label for the end user; the answer does not depend on it.")

    # extensions
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Extension.")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Extension.")
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64, description="Extension.")
    stop: str | list[str] | None = Field(None, description="Extension: the text ends before the first of them.")
    top_k: int | None = Field(None, ge=0, description="Extension: keep the k likeliest tokens; 0 keeps all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Extension.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="Extension.")
    priority: int | None = Field(None, ge=-_INT64, lt=_INT64, description="Extension: smaller is sooner. Default 0.")
    cache_salt: str | None = Field(
        None, min_length=1, description="Extension: requests with different salts share no cached prefixes."
    )


class InputTokensRequest(InputRequest):
    """Body of POST /v1/responses/input_tokens."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"personality": (), "truncation": ("disabled",)}


class InputTokens(WireResponse):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class ResponseError(WireResponse):
    code: str
    message: str


class IncompleteDetails(WireResponse):
    reason: Literal["max_output_tokens", "content_filter"]


class InputTokensDetails(WireResponse):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(WireResponse):
    reasoning_tokens: int = 0


class ResponseUsage(WireResponse):
    input_tokens: int
    input_tokens_details: InputTokensDetails = Field(default_factory=InputTokensDetails)
    output_tokens: int
    output_tokens_details: OutputTokensDetails = Field(default_factory=OutputTokensDetails)
    total_tokens: int


class Response(WireResponse):
    """Answer of /v1/responses. `tools`, `tool_choice`, `text` … repeat what was asked."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    conversation: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, Any] | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool = True
    temperature: float | None = None
    text: dict[str, Any] | None = None
    tool_choice: Any = "auto"
    tools: list[dict[str, Any]] = Field(default_factory=list)
    top_logprobs: int | None = None
    top_p: float | None = None
    truncation: str | None = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    @property
    def output_text(self) -> str:
        """All text of the output, joined."""
        messages = (item for item in self.output if isinstance(item, OutputMessage))
        return "".join(part.text for message in messages for part in message.content)


class DeletedResponse(WireResponse):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class ItemList(WireResponse):
    """Items as they are stored. `first_id` and `last_id` are empty when there is none."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool


class Conversation(WireResponse):
    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: dict[str, str]


class DeletedConversation(WireResponse):
    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: bool = True


class ConversationRequest(KeptRequest):
    """Body of POST /v1/conversations."""

    items: list[InputItem] | None = Field(None, max_length=20)
    metadata: Metadata | None = None


class ConversationUpdate(KeptRequest):
    """Body of POST /v1/conversations/{id}."""

    metadata: Metadata | None


class ConversationItemsRequest(KeptRequest):
    """Body of POST /v1/conversations/{id}/items."""

    items: list[InputItem] = Field(min_length=1, max_length=20)
