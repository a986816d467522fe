"""OpenAI's Responses API on the wire: bodies, items, and every event of a stream.

Source: OpenAI API reference, Responses. Fields under "extensions" are not OpenAI's. Items are what goes in and out:
messages, function calls, their outputs, reasoning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

from llmasos.client.types.base import KeptRequest, WireRequest, WireResponse

_INT64 = 2**63
ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["completed", "failed", "in_progress", "cancelled", "queued", "incomplete"]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], MetadataValue], Field(max_length=16)]
"""Labels: up to 16, names up to 64 characters, values up to 512 (OpenAI's limits)."""
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,256}$")]


class InputText(WireRequest):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"prompt_cache_breakpoint": ()}

    type: Literal["input_text"]
    text: str


class OutputTextInput(WireRequest):
    """Text of an earlier answer; what came with it may stay."""

    type: Literal["output_text"]
    text: str
    annotations: list[JsonValue] | None = None
    logprobs: list[JsonValue] | None = None


class RefusalInput(WireRequest):
    type: Literal["refusal"]
    refusal: str


class OtherContent(BaseModel):
    """Images, audio and files: known to the wire, refused by a text model by name."""

    model_config = ConfigDict(extra="allow")
    type: str


def _content_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("input_text", "output_text", "refusal") else "<other>"


InputContent = Annotated[
    Annotated[InputText, Tag("<input_text>")]
    | Annotated[OutputTextInput, Tag("<output_text>")]
    | Annotated[RefusalInput, Tag("<refusal>")]
    | Annotated[OtherContent, Tag("<other>")],
    Discriminator(_content_tag),
]


def _text_or_list(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


TextOrContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[InputContent], Tag("<list>")], Discriminator(_text_or_list)
]


class MessageItem(WireRequest):
    """`phase` is the label of a model that writes comments before its answer; ours have no such thing."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: TextOrContent
    id: Id | None = None
    status: ItemStatus | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(WireRequest):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "async": (False,),
        "caller": ({"type": "direct"},),
        "namespace": (),
    }

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: Id | None = None
    status: ItemStatus | None = None


class FunctionCallOutputItem(WireRequest):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"caller": ({"type": "direct"},), "namespace": ()}

    type: Literal["function_call_output"]
    call_id: str
    output: TextOrContent
    name: str | None = None
    id: Id | None = None
    status: ItemStatus | None = None


class SummaryText(WireResponse):
    type: Literal["summary_text"] = "summary_text"
    text: str


class ReasoningText(WireResponse):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class ReasoningInputItem(WireRequest):
    """The model's thoughts, given back with what they led to. Read are `content`, else `encrypted_content`, else
    `summary`."""

    type: Literal["reasoning"]
    summary: list[SummaryText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    id: Id | None = None
    status: ItemStatus | None = None


class ItemReference(WireRequest):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"] = "item_reference"
    id: Id


class OtherItem(BaseModel):
    """Items of hosted tools and the like: known to the wire, refused by name."""

    model_config = ConfigDict(extra="allow")
    type: str


_ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def _item_tag(value: Any) -> str:
    if not isinstance(value, dict):
        kind = getattr(value, "type", None)
    else:
        kind = value.get("type") or ("message" if "role" in value else "item_reference" if "id" in value else "message")
    return f"<{kind}>" if kind in _ITEMS else "<other>"


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningInputItem, Tag("<reasoning>")]
    | Annotated[ItemReference, Tag("<item_reference>")]
    | Annotated[OtherItem, Tag("<other>")],
    Discriminator(_item_tag),
]


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
        Annotated[str, Tag("<text>")] | Annotated[list[InputItem], Tag("<list>")], Discriminator(_text_or_list)
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


class ResponseTopLogprob(WireResponse):
    token: str
    bytes: list[int]
    logprob: float


class ResponseLogprob(ResponseTopLogprob):
    top_logprobs: list[ResponseTopLogprob]


class OutputText(WireResponse):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[ResponseLogprob] | None = None


class OutputMessage(WireResponse):
    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class FunctionToolCall(WireResponse):
    """A function that the model wants called. `arguments` is JSON text as the model wrote it."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


class ReasoningItem(WireResponse):
    type: Literal["reasoning"] = "reasoning"
    id: str
    summary: list[SummaryText]
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    status: ItemStatus


OutputItem = Annotated[OutputMessage | FunctionToolCall | ReasoningItem, Field(discriminator="type")]


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


class EventTopLogprob(WireResponse):
    token: str
    logprob: float


class EventLogprob(EventTopLogprob):
    """As events have it: without the bytes that the whole text's have."""

    top_logprobs: list[EventTopLogprob]


class _Event(WireResponse):
    sequence_number: int


class ResponseStateEvent(_Event):
    """How the response stands. The last event of a stream is one of the last three."""

    type: Literal[
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: Response


class OutputItemEvent(_Event):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class ContentPartEvent(_Event):
    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: int
    content_index: int
    part: Annotated[OutputText | ReasoningText, Field(discriminator="type")]


class OutputTextDelta(_Event):
    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[EventLogprob]


class OutputTextDone(_Event):
    type: Literal["response.output_text.done"] = "response.output_text.done"
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[EventLogprob]


class ArgumentsDelta(_Event):
    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(_Event):
    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    item_id: str
    output_index: int
    name: str
    arguments: str


class ReasoningTextDelta(_Event):
    type: Literal["response.reasoning_text.delta"] = "response.reasoning_text.delta"
    item_id: str
    output_index: int
    content_index: int
    delta: str


class ReasoningTextDone(_Event):
    type: Literal["response.reasoning_text.done"] = "response.reasoning_text.done"
    item_id: str
    output_index: int
    content_index: int
    text: str


class SummaryPartEvent(_Event):
    type: Literal["response.reasoning_summary_part.added", "response.reasoning_summary_part.done"]
    item_id: str
    output_index: int
    summary_index: int
    part: SummaryText


class SummaryTextDelta(_Event):
    type: Literal["response.reasoning_summary_text.delta"] = "response.reasoning_summary_text.delta"
    item_id: str
    output_index: int
    summary_index: int
    delta: str


class SummaryTextDone(_Event):
    type: Literal["response.reasoning_summary_text.done"] = "response.reasoning_summary_text.done"
    item_id: str
    output_index: int
    summary_index: int
    text: str


class ResponseErrorEvent(_Event):
    """The stream can't go on. The response itself may (a background one whose server stops)."""

    type: Literal["error"] = "error"
    code: str | None = None
    message: str
    param: str | None = None


ResponseEvent = Annotated[
    ResponseStateEvent
    | OutputItemEvent
    | ContentPartEvent
    | OutputTextDelta
    | OutputTextDone
    | ArgumentsDelta
    | ArgumentsDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | SummaryPartEvent
    | SummaryTextDelta
    | SummaryTextDone
    | ResponseErrorEvent,
    Field(discriminator="type"),
]
