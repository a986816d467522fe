"""Anthropic's wire: messages, their streamed events, token counts, models, errors.

Source: Anthropic API reference (version 2023-06-01), "Messages", "Streaming messages", "Count message tokens",
"Models", "Errors". What only Anthropic's own service can do is known here by name and refused by the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from llmasos.client.types.base import WireRequest, WireResponse
from llmasos.errors import UnsupportedError


class CacheControl(WireRequest):
    """Accepted and needs nothing: prefixes are cached by themselves, for as long as there is room."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class CitationsConfig(WireRequest):
    enabled: Literal[False] | None = None


class TextBlockParam(WireRequest):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: list[JsonValue] | None = Field(None, description="Of an earlier answer; the model does not see them.")


class ThinkingBlockParam(WireRequest):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlockParam(WireRequest):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"caller": ({"type": "direct"},), "toolset_name": ()}

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, JsonValue]
    cache_control: CacheControl | None = None


class TextSource(WireRequest):
    type: Literal["text"]
    media_type: Literal["text/plain"]
    data: str


class ContentSource(WireRequest):
    type: Literal["content"]
    content: str | list[TextBlockParam]


class OtherSource(BaseModel):
    """Files, addresses and base64: known to the wire, refused by name."""

    model_config = ConfigDict(extra="allow")
    type: Literal["base64", "url", "file"]


class DocumentBlockParam(WireRequest):
    """Plain text goes to the model under its title; other documents are refused by name."""

    type: Literal["document"]
    source: Annotated[TextSource | ContentSource | OtherSource, Field(discriminator="type")]
    title: str | None = None
    context: str | None = None
    citations: CitationsConfig | None = None
    cache_control: CacheControl | None = None


class OtherBlock(BaseModel):
    """Images, server tools' blocks and the like: known to the wire, refused by name."""

    model_config = ConfigDict(extra="allow")
    type: Literal[
        "image",
        "search_result",
        "redacted_thinking",
        "server_tool_use",
        "web_search_tool_result",
        "web_fetch_tool_result",
        "code_execution_tool_result",
        "bash_code_execution_tool_result",
        "text_editor_code_execution_tool_result",
        "tool_search_tool_result",
        "tool_reference",
        "mcp_tool_use",
        "mcp_tool_result",
        "container_upload",
        "compaction",
        "browser_state",
    ]


ResultBlockParam = Annotated[TextBlockParam | DocumentBlockParam | OtherBlock, Field(discriminator="type")]


class ToolResultBlockParam(WireRequest):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"toolset_name": ()}

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[ResultBlockParam] | None = None
    is_error: bool | None = Field(None, description='The model reads "Error: " before the content.')
    cache_control: CacheControl | None = None


BlockParam = Annotated[
    TextBlockParam | ThinkingBlockParam | ToolUseBlockParam | ToolResultBlockParam | DocumentBlockParam | OtherBlock,
    Field(discriminator="type"),
]


class AnthropicMessageParam(WireRequest):
    """One turn. Consecutive turns of one role count as one; a last `assistant` turn is continued by the model."""

    role: Literal["user", "assistant", "system"]
    content: str | list[BlockParam]


class AnthropicTool(WireRequest):
    """A tool of the client's. Those that Anthropic runs or defines have a `type` of their own and are refused by it."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "input_examples": ([],),
    }

    name: str = Field(min_length=1)
    description: str | None = None
    input_schema: dict[str, JsonValue]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = Field(None, description="Input is always streamed as it is written.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise UnsupportedError(
                f"The tool type {kind!r} is Anthropic's own and is not supported.",
                hint="Give a tool of your own, with name and input_schema.",
                param="tools",
            )
        return data


class ToolChoiceAuto(WireRequest):
    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class ToolChoiceAny(WireRequest):
    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoiceTool(WireRequest):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class ToolChoiceNone(WireRequest):
    type: Literal["none"]


class ThinkingEnabled(WireRequest):
    """`budget_tokens` is a wish: what bounds thinking is max_tokens."""

    type: Literal["enabled"]
    budget_tokens: int = Field(ge=1)
    display: Literal["summarized", "omitted"] | None = None


class ThinkingDisabled(WireRequest):
    type: Literal["disabled"]


class ThinkingAdaptive(WireRequest):
    type: Literal["adaptive"]
    display: Literal["summarized", "omitted"] | None = None


class ThinkingBetweenTools(BaseModel):
    """Known to the wire, refused by name."""

    model_config = ConfigDict(extra="allow")
    type: Literal["between_tools"]


class JsonOutputFormat(WireRequest):
    type: Literal["json_schema"]
    json_schema: dict[str, JsonValue] = Field(alias="schema")


class OutputConfig(WireRequest):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonOutputFormat | None = None


class AnthropicMetadata(WireRequest):
    user_id: str | None = Field(None, description="Your label for the end user; the answer does not depend on it.")


class CountTokensRequest(WireRequest):
    """Body of POST /v1/messages/count_tokens."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "context_management": ({"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
        "mcp_servers": ([],),
        "speed": ("standard",),
        "user_profile_id": (),
        "workspace_id": (),
    }
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Hello!"}]}]
        }
    )

    model: str = Field(description="Name of a served model, as in /v1/models.")
    messages: list[AnthropicMessageParam] = Field(min_length=1)
    system: str | list[TextBlockParam] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: (
        Annotated[ToolChoiceAuto | ToolChoiceAny | ToolChoiceTool | ToolChoiceNone, Field(discriminator="type")] | None
    ) = None
    thinking: (
        Annotated[
            ThinkingEnabled | ThinkingDisabled | ThinkingAdaptive | ThinkingBetweenTools, Field(discriminator="type")
        ]
        | None
    ) = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **CountTokensRequest.UNSUPPORTED,
        "container": (),
        "diagnostics": ({"previous_message_id": None},),
        "inference_geo": (),
    }
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2-135m-instruct",
                    "max_tokens": 64,
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                }
            ]
        }
    )

    max_tokens: int = Field(
        ge=1,
        description="New tokens at most. Where the context ends first, stop_reason is model_context_window_exceeded.",
    )
    stream: bool | None = Field(None, description="Send server-sent events instead of one body.")
    stop_sequences: list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=16)
    temperature: float | None = Field(None, ge=0, le=2, description="Default: the model's own, else 1.")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    metadata: AnthropicMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = Field(None, description="There is one tier.")


class TextBlock(WireResponse):
    type: Literal["text"] = "text"
    text: str
    citations: list[JsonValue] | None = None


class ThinkingBlock(WireResponse):
    """`signature` is made of the text; it is not secret and nothing checks it."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str


class ToolUseBlock(WireResponse):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, JsonValue]


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]
AnthropicStopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class OutputTokensDetails(WireResponse):
    thinking_tokens: int


class AnthropicUsage(WireResponse):
    """`input_tokens` are those that had to be computed; those read from the prefix cache are counted apart."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails | None = None
    service_tier: Literal["standard"] | None = None


class AnthropicMessage(WireResponse):
    """`warnings` is an extension: what of the request had no effect, and why."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block]
    stop_reason: AnthropicStopReason | None
    stop_sequence: str | None
    usage: AnthropicUsage
    warnings: list[str] | None = None


class MessageStart(WireResponse):
    type: Literal["message_start"] = "message_start"
    message: AnthropicMessage


class ContentBlockStart(WireResponse):
    type: Literal["content_block_start"] = "content_block_start"
    index: int
    content_block: Block


class TextDeltaBody(WireResponse):
    type: Literal["text_delta"] = "text_delta"
    text: str


class ThinkingDeltaBody(WireResponse):
    type: Literal["thinking_delta"] = "thinking_delta"
    thinking: str


class SignatureDeltaBody(WireResponse):
    type: Literal["signature_delta"] = "signature_delta"
    signature: str


class InputJsonDeltaBody(WireResponse):
    type: Literal["input_json_delta"] = "input_json_delta"
    partial_json: str


class ContentBlockDelta(WireResponse):
    type: Literal["content_block_delta"] = "content_block_delta"
    index: int
    delta: Annotated[
        TextDeltaBody | ThinkingDeltaBody | SignatureDeltaBody | InputJsonDeltaBody, Field(discriminator="type")
    ]


class ContentBlockStop(WireResponse):
    type: Literal["content_block_stop"] = "content_block_stop"
    index: int


class StopDelta(WireResponse):
    stop_reason: AnthropicStopReason
    stop_sequence: str | None


class MessageDelta(WireResponse):
    """Counts are those of the whole message."""

    type: Literal["message_delta"] = "message_delta"
    delta: StopDelta
    usage: AnthropicUsage


class MessageStop(WireResponse):
    type: Literal["message_stop"] = "message_stop"


class Ping(WireResponse):
    type: Literal["ping"] = "ping"


MessageEvent = (
    MessageStart | ContentBlockStart | ContentBlockDelta | ContentBlockStop | MessageDelta | MessageStop | Ping
)


class TokensCount(WireResponse):
    input_tokens: int


class AnthropicModel(WireResponse):
    type: Literal["model"] = "model"
    id: str
    display_name: str
    created_at: str = Field(description="RFC 3339: when the server began to serve it.")
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int | None = None
    max_tokens: int | None = None


class AnthropicModelList(WireResponse):
    data: list[AnthropicModel]
    first_id: str | None
    last_id: str | None
    has_more: bool


class AnthropicErrorDetails(WireResponse):
    """`error_code` is stable; `param` (an extension) names the field that is wrong."""

    error_code: str | None = None
    param: str | None = None


class AnthropicErrorDetail(WireResponse):
    type: str
    message: str
    details: AnthropicErrorDetails | None = None


class AnthropicErrorBody(WireResponse):
    type: Literal["error"] = "error"
    error: AnthropicErrorDetail
    request_id: str | None = None
