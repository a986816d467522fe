"""What goes into a response and comes out of it: messages, function calls, their outputs, reasoning.

Source: OpenAI API reference, Responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag

from llmasos.client.types.base import WireRequest, WireResponse

ItemStatus = Literal["in_progress", "completed", "incomplete"]
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


def text_or_list(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


TextOrContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[InputContent], Tag("<list>")], Discriminator(text_or_list)
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
