"""OpenAI's core wire: chat completions, completions, embeddings, models; and vLLM's routes for adapters.

Source: OpenAI API reference. Fields under "extensions" are not OpenAI's; their names are those of vLLM and Hugging
Face.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag

from llmasos.client.types.base import WireRequest, WireResponse

_INT64 = 2**63


class FunctionCall(WireResponse):
    """`arguments` is JSON text as the model wrote it."""

    name: str
    arguments: str


class ToolCall(WireResponse):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(WireRequest):
    type: Literal["text"]
    text: str


class RefusalPart(WireRequest):
    """What the assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


class MediaPart(BaseModel):
    """Image, audio, file and other parts: refused by a text model by name."""

    model_config = ConfigDict(extra="allow")
    type: str


def _part_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("text", "refusal") else "<other>"


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[RefusalPart, Tag("<refusal>")]
    | Annotated[MediaPart, Tag("<other>")],
    Discriminator(_part_tag),
]


def _content_tag(value: Any) -> str:
    return "<parts>" if isinstance(value, list) else "<text>"


class ChatMessage(WireRequest):
    """One message of a conversation. `developer` is the newer name of `system`."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"audio": (), "function_call": (), "annotations": ([],)}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Tag("<parts>")], Discriminator(_content_tag)
        ]
        | None
    ) = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = Field(None, description="Extension: what the model reasoned before it answered.")
    reasoning: str | None = Field(None, description="Extension: another name of reasoning_content.")


class FunctionDefinition(WireRequest):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(WireRequest):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(WireRequest):
    name: str


class NamedToolChoice(WireRequest):
    type: Literal["function"]
    function: NamedFunction


class AllowedTool(WireRequest):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(WireRequest):
    mode: Literal["auto", "required"]
    tools: list[AllowedTool] = Field(min_length=1)


class AllowedToolsChoice(WireRequest):
    """Some of the tools: `auto` may call one of them, `required` must."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class StreamOptions(WireRequest):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}

    include_usage: bool | None = Field(None, description="Send one last chunk with the token counts.")


class JsonSchemaFormat(WireRequest):
    """`strict` false asks for no more than true: the schema is always enforced."""

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, JsonValue] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(WireRequest):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(WireRequest):
    """What the whole output must look like: exactly one of these (vLLM's names)."""

    json_schema: dict[str, JsonValue] | str | bool | None = Field(None, alias="json", description="A JSON Schema.")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = Field(None, description="In Lark's notation or GBNF.")
    json_object: bool | None = Field(None, description="true: any JSON object.")


class SamplingRequest(WireRequest):
    """What chat and text completions share. Null or absent means the default."""

    model: str = Field(description="Name of a served model, as in /v1/models.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(
        None, description="Token id (as a string) to a number added to its logit, -100 to 100."
    )
    n: int | None = Field(
        None, ge=1, le=128, description="Completions per prompt, as many as the model's line has room for. Default 1."
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: str | list[str] | None = Field(None, description="Up to 16 strings; the text ends before the first of them.")
    stream: bool | None = Field(None, description="Send server-sent events instead of one body.")
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(
        None, ge=0, le=2, description="0 takes the likeliest token each time. Default: the model's own, else 1."
    )
    top_p: float | None = Field(None, ge=0, le=1)
    user: str | None = Field(None, description="Your label for the end user; the answer does not depend on it.")

    # extensions
    top_k: int | None = Field(None, ge=0, description="Extension: keep the k likeliest tokens; 0 keeps all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Extension.")
    typical_p: float | None = Field(None, ge=0, le=1, description="Extension.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="Extension.")
    stop_token_ids: list[int] | None = Field(None, max_length=64, description="Extension.")
    ignore_eos: bool | None = Field(None, description="Extension: go on after the end-of-sequence token.")
    num_beams: int | None = Field(None, ge=1, le=64, description="Extension: beam search. Can't be streamed.")
    length_penalty: float | None = Field(None, ge=-10, le=10, description="Extension: for beam search.")
    early_stopping: bool | None = Field(None, description="Extension: for beam search.")
    priority: int | None = Field(None, ge=-_INT64, lt=_INT64, description="Extension: smaller is sooner. Default 0.")
    cache_salt: str | None = Field(
        None, min_length=1, description="Extension: requests with different salts share no cached prefixes."
    )
    structured_outputs: StructuredOutputs | None = Field(None, description="Extension: the form of the output.")


class ChatCompletionRequest(SamplingRequest):
    """Body of POST /v1/chat/completions."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2-135m-instruct",
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                    "max_tokens": 64,
                    "temperature": 0,
                }
            ]
        }
    )

    messages: list[ChatMessage] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives per token; needs logprobs=true.")
    max_tokens: int | None = Field(None, ge=1, description="Older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, ge=1, description="Default: what the context still holds.")
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice | None = Field(
        None,
        description="auto (the default, with tools), none, required, a named function, or some of the tools. Where the "
        "model's template has no place for tools, they are listed in the system message.",
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None,
        description="For templates that have a word for it, else refused; none also where it can be switched off.",
    )
    metadata: dict[str, str] | None = Field(None, description="Your labels; the answer does not depend on them.")
    safety_identifier: str | None = Field(None, description="Your label; the answer does not depend on it.")
    prompt_cache_key: str | None = Field(None, description="Your label; the answer does not depend on it.")

    # extensions
    include_reasoning: bool | None = Field(None, description="Extension: false leaves the reasoning out. Default true.")
    chat_template_kwargs: dict[str, JsonValue] | None = Field(
        None, description="Extension: variables for the chat template, e.g. enable_thinking."
    )
    continue_final_message: bool | None = Field(
        None, description="Extension: the model goes on with the last message, which is the assistant's."
    )


class CompletionRequest(SamplingRequest):
    """Body of POST /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "smollm2-135m-instruct", "prompt": "The quick brown fox", "max_tokens": 16}]
        }
    )

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text, several texts, one prompt as token ids, or several; up to 2048."
    )
    best_of: int | None = Field(
        None, ge=1, le=128, description="Make so many and keep the n likeliest (per token). Can't be streamed."
    )
    suffix: str | None = Field(
        None,
        description="Text behind the completion, for models that were trained to fill in the middle; else refused.",
    )
    echo: bool | None = Field(
        None, description="Put the prompt before the completion. Can't be streamed together with logprobs."
    )
    logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives per token.")
    max_tokens: int | None = Field(None, ge=0, description="Default 16.")


class EmbeddingRequest(WireRequest):
    """Body of POST /v1/embeddings."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "all-minilm-l6-v2", "input": ["A cat sat.", "A dog ran."]}]}
    )

    model: str = Field(description="Name of a served model, as in /v1/models.")
    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text, several texts, one input as token ids, or several; up to 2048."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: little-endian float32. Default float."
    )
    dimensions: int | None = Field(
        None, ge=1, description="The model's own, or fewer where its config allows it (Matryoshka embeddings)."
    )
    user: str | None = Field(None, description="Your label for the end user; the answer does not depend on it.")


class RerankDocument(WireRequest):
    text: str


class RerankRequest(WireRequest):
    """Body of POST /v1/rerank (Jina's and Cohere's)."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "max_chunks_per_doc": (),
        "max_tokens_per_doc": (),
        "rank_fields": (["text"],),
        "truncation": (False,),
    }
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "all-minilm-l6-v2", "query": "a pet", "documents": ["A cat sat.", "Rain fell."], "top_n": 1}
            ]
        }
    )

    model: str = Field(description="Name of a served model, as in /v1/models.")
    query: str = Field(min_length=1)
    documents: list[str | RerankDocument] = Field(min_length=1, max_length=2048)
    top_n: int | None = Field(None, ge=1, description="How many of the best come back. Default: all.")
    return_documents: bool | None = Field(None, description="Send the texts back, too. Default true.")
    user: str | None = Field(None, description="Your label for the end user; the answer does not depend on it.")


class ScoreRequest(WireRequest):
    """Body of POST /v1/score (vLLM's): one text and several, or two lists of the same length."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "all-minilm-l6-v2", "text_1": "a pet", "text_2": ["A cat sat.", "Rain fell."]}]
        }
    )

    model: str = Field(description="Name of a served model, as in /v1/models.")
    text_1: str | list[str] = Field(description="The query, or one for each of text_2.")
    text_2: str | list[str]
    user: str | None = Field(None, description="Your label for the end user; the answer does not depend on it.")


class TokenizeRequest(WireRequest):
    """Body of POST /tokenize (vLLM's): a `prompt`, or `messages` that go through the chat template."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "smollm2-135m-instruct", "prompt": "The quick brown fox"}]}
    )

    model: str = Field(description="Name of a served model, as in /v1/models.")
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Put the model's own tokens around the text. Default: true for a prompt, false for messages."
    )
    add_generation_prompt: bool | None = Field(
        None, description="End where the assistant's answer begins. Default true."
    )
    continue_final_message: bool | None = Field(None, description="End where the last message ends.")
    chat_template_kwargs: dict[str, JsonValue] | None = None
    return_token_strs: bool | None = Field(None, description="Send the tokens' texts, too.")


class DetokenizeRequest(WireRequest):
    """Body of POST /detokenize (vLLM's)."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "smollm2-135m-instruct", "tokens": [504, 2365]}]}
    )

    model: str = Field(description="Name of a served model, as in /v1/models.")
    tokens: list[int]


class LoadAdapterRequest(WireRequest):
    """Body of POST /v1/load_lora_adapter (vLLM's)."""

    lora_name: str = Field(min_length=1, description="Name that the adapter will be served under.")
    lora_path: str = Field(min_length=1, description="Its folder on the server, or a name in the home's adapters.")
    base_model_name: str | None = Field(None, description="The served model it belongs to, if there are several.")


class UnloadAdapterRequest(WireRequest):
    """Body of POST /v1/unload_lora_adapter (vLLM's)."""

    lora_name: str


class PromptTokensDetails(WireResponse):
    cached_tokens: int | None = None


class CompletionTokensDetails(WireResponse):
    reasoning_tokens: int | None = None


class Usage(WireResponse):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class EmbeddingUsage(WireResponse):
    prompt_tokens: int = 0
    total_tokens: int = 0


class TopLogprob(WireResponse):
    """`bytes` is the token's UTF-8, for tokens that hold a part of a character; null where unknown."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob] = Field(default_factory=list)


class ChatLogprobs(WireResponse):
    content: list[ChatTokenLogprob] | None = None
    refusal: list[ChatTokenLogprob] | None = None


ChatFinishReason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


class ChatReply(WireResponse):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same, for clients that read this name
    tool_calls: list[ToolCall] | None = None


class ChatChoice(WireResponse):
    index: int
    message: ChatReply
    finish_reason: ChatFinishReason | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletion(WireResponse):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class FunctionCallDelta(WireResponse):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(WireResponse):
    """A piece of the tool call number `index`: pieces of `arguments` are to be joined."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta | None = None


class ChatDelta(WireResponse):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(WireResponse):
    index: int
    delta: ChatDelta
    finish_reason: ChatFinishReason | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(WireResponse):
    """One event of a stream. The last one has no choices and the `usage`, if that was asked for."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(WireResponse):
    """Parallel lists, one entry per token. `text_offset`: where the token starts in the choice's text."""

    tokens: list[str] = Field(default_factory=list)
    token_logprobs: list[float | None] = Field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] = Field(default_factory=list)


class CompletionChoice(WireResponse):
    index: int
    text: str
    finish_reason: Literal["stop", "length", "content_filter"] | None = None
    logprobs: CompletionLogprobs | None = None


class TextCompletion(WireResponse):
    """Answer of /v1/completions; streamed events have the same shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Embedding(WireResponse):
    """`embedding` is a list of floats, or base64 text of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(WireResponse):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage | None = None


ScoringMethod = Literal["cross-encoder", "cosine"]
"""A head that reads both texts together (0 to 1), or how alike their embeddings are (-1 to 1)."""


class RerankResult(WireResponse):
    """`index`: the document's place in the request."""

    index: int
    relevance_score: float
    document: RerankDocument | None = None


class Reranking(WireResponse):
    """The best first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: EmbeddingUsage
    method: ScoringMethod = Field(description="Extension: how the scores were made.")


class PairScore(WireResponse):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(WireResponse):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PairScore]
    usage: EmbeddingUsage
    method: ScoringMethod = Field(description="Extension: how the scores were made.")


class Tokens(WireResponse):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class TokensText(WireResponse):
    """Answer of /detokenize."""

    prompt: str


class ModelCapabilities(WireResponse):
    """What a model can be asked for, as its files say."""

    completion: bool = False
    chat: bool = False
    tools: bool = False
    reasoning: bool = False
    embeddings: bool = False


class Model(WireResponse):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = ""
    context_length: int | None = Field(None, description="Extension: prompt and new tokens together, at most.")
    max_model_len: int | None = Field(None, description="Extension: vLLM's name of context_length.")
    capabilities: ModelCapabilities | None = Field(None, description="Extension.")
    parent: str | None = Field(None, description="Extension: the model that an adapter belongs to.")


class DeletedModel(WireResponse):
    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


class ModelList(WireResponse):
    object: Literal["list"] = "list"
    data: list[Model]
