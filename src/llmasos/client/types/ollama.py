"""Ollama's wire: chat, generate, embeddings, models, pulls.

Source: Ollama's API reference and the request bodies that its official clients send. `warnings` in answers is an
extension: what of the request had no effect, and why. Requests are strict; numbers may be whole floats (`40.0`), as
clients in languages without integers write them, and fields that clients send empty ask for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from llmasos.client.types.base import WireRequest, WireResponse

_INT64 = 2**63


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Duration = Annotated[str | float, Field(description='Seconds, or text such as "5m" or "1h30m"; negative: for ever.')]


_LOADING = "it is decided when the model is loaded"
_NO_SAMPLER = "there is no such sampler"


def _no_effect(reason: str, *harmless: float) -> Any:
    """A field that is accepted and named in the answer's warnings, but for values that ask for what happens anyway."""
    return Field(default=None, description=f"No effect: {reason}.", json_schema_extra={"x-harmless": list(harmless)})


class OllamaOptions(WireRequest):
    """Those that can have no effect here are named in the answer's `warnings`; an unknown name is an error."""

    temperature: float | None = Field(default=None, ge=0, le=2, description="Default: the model's own, else 1.")
    top_k: Whole | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, ge=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, ge=0, le=1)
    seed: Whole | None = Field(default=None, ge=-_INT64, lt=_INT64, description="Negative: none.")
    num_predict: Whole | None = Field(
        default=None, description="New tokens at most. Default, 0 and below: what the context still holds."
    )
    num_ctx: Whole | None = Field(
        default=None, description="Room that is wanted. There may be more; a warning says where there is less."
    )
    stop: list[Annotated[str, Field(min_length=1)]] | str | None = None
    repeat_penalty: float | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)

    draft_num_predict: Whole | None = _no_effect(_LOADING)
    embedding_only: bool | None = _no_effect(_LOADING)
    f16_kv: bool | None = _no_effect(_LOADING)
    logits_all: bool | None = _no_effect(_LOADING)
    low_vram: bool | None = _no_effect(_LOADING)
    main_gpu: Whole | None = _no_effect(_LOADING)
    mirostat: Whole | None = _no_effect(_NO_SAMPLER, 0)
    mirostat_eta: float | None = _no_effect(_NO_SAMPLER)
    mirostat_tau: float | None = _no_effect(_NO_SAMPLER)
    num_batch: Whole | None = _no_effect(_LOADING)
    num_gpu: Whole | None = _no_effect(_LOADING, -1)
    num_keep: Whole | None = _no_effect("nothing of a conversation is ever dropped")
    num_thread: Whole | None = _no_effect(_LOADING, 0)
    numa: bool | None = _no_effect(_LOADING)
    penalize_newline: bool | None = _no_effect("penalties treat all tokens alike", True)
    repeat_last_n: Whole | None = _no_effect("repeat_penalty looks at the whole text", -1)
    tfs_z: float | None = _no_effect(_NO_SAMPLER, 1)
    use_mlock: bool | None = _no_effect(_LOADING)
    use_mmap: bool | None = _no_effect(_LOADING)
    vocab_only: bool | None = _no_effect(_LOADING)

    def warnings(self) -> list[str]:
        """Options that are set and have no effect, and why."""
        found = []
        for name, field in type(self).model_fields.items():
            extra, value = field.json_schema_extra, getattr(self, name)
            harmless = extra.get("x-harmless") if isinstance(extra, dict) else None
            if isinstance(harmless, list) and value is not None and value not in harmless:
                found.append(f"options.{name} has n{(field.description or '')[1:]}")
        return found


class _Named(WireRequest):
    """`name` is the older word for `model`."""

    model: str = Field(min_length=1, description="A model's name; `:latest` may be there or not.")

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and "name" in data:
            data = dict(data)
            name = data.pop("name")
            if not data.get("model"):
                data["model"] = name
        return data


class _Generating(_Named):
    """What chat and generate share. Null or absent means the default."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"_debug_render_only": (False,)}

    stream: bool | None = Field(default=None, description="One JSON object per line, as it comes. Default true.")
    format: Literal["", "json"] | dict[str, JsonValue] | None = Field(
        default=None, description="json, or a JSON Schema that the answer follows."
    )
    options: OllamaOptions | None = None
    keep_alive: Duration | None = Field(default=None, description="How long the model stays after this; 0: it goes.")
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(default=None, ge=0, le=20)
    truncate: bool | None = Field(default=None, description="A prompt that is too long is refused, never cut.")
    shift: bool | None = Field(default=None, description="An answer ends where the context does.")


class OllamaCallFunction(WireRequest):
    name: str
    arguments: dict[str, JsonValue]
    index: Whole | None = None


class OllamaToolCall(WireRequest):
    """Clients in other languages add a type."""

    function: OllamaCallFunction
    id: str | None = None
    type: Literal["function"] | None = None


class OllamaMessage(WireRequest):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"images": ([],)}

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[OllamaToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaToolFunction(WireRequest):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class OllamaTool(WireRequest):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"items": ({}, [])}

    type: Literal["function"] | None = None
    function: OllamaToolFunction


class OllamaChatRequest(_Generating):
    """Body of POST /api/chat. Without messages the model is loaded, or with keep_alive 0 unloaded."""

    messages: list[OllamaMessage] | None = None
    tools: list[OllamaTool] | None = None


class OllamaGenerateRequest(_Generating):
    """Body of POST /api/generate. Without a prompt the model is loaded, or with keep_alive 0 unloaded."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **_Generating.UNSUPPORTED,
        "context": ([],),
        "height": (0,),
        "images": ([],),
        "steps": (0,),
        "suffix": ("",),
        "template": ("",),
        "width": (0,),
    }

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = Field(
        default=None, description="The prompt goes to the model as it is, without a chat template."
    )


class OllamaEmbedRequest(_Named):
    """Body of POST /api/embed."""

    input: str | list[str]
    truncate: bool | None = Field(
        default=None, description="true: texts beyond the context are cut, and warnings name them. Default: refused."
    )
    dimensions: Whole | None = Field(
        default=None, ge=0, description="The model's own (also 0), or fewer where its config allows it."
    )
    options: OllamaOptions | None = None
    keep_alive: Duration | None = None


class OllamaEmbeddingsRequest(_Named):
    """Body of POST /api/embeddings, the older form of /api/embed."""

    prompt: str | None = None
    options: OllamaOptions | None = None
    keep_alive: Duration | None = None


class OllamaShowRequest(_Named):
    """`verbose` asks for a tokenizer's tables, which are not shown."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"options": ({},), "system": ("",), "template": ("",)}

    verbose: bool | None = None


class OllamaDeleteRequest(_Named):
    pass


class OllamaPullRequest(_Named):
    """`model`: a name of the catalogue, or `hf.co/owner/repository:variant`."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"password": ("",), "username": ("",)}

    stream: bool | None = None
    insecure: bool | None = Field(default=None, description="true is refused: what is fetched is always checked.")


class OllamaCalledFunction(WireResponse):
    index: int
    name: str
    arguments: dict[str, JsonValue]


class OllamaCall(WireResponse):
    id: str
    function: OllamaCalledFunction


class OllamaReply(WireResponse):
    role: Literal["assistant"] = "assistant"
    content: str
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None


class OllamaTimings(WireResponse):
    """Counts of tokens; durations in nanoseconds, as the server measured them."""

    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class _Answer(OllamaTimings):
    """A line of a stream, or all of it. What is known at the end is on the last line, whose `done` is true."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load", "unload"] | None = None
    logprobs: list[JsonValue] | None = None
    warnings: list[str] | None = None


class OllamaChatResponse(_Answer):
    message: OllamaReply


class OllamaGenerateResponse(_Answer):
    response: str
    thinking: str | None = None


class OllamaEmbedResponse(WireResponse):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int
    warnings: list[str] | None = None


class OllamaEmbeddingsResponse(WireResponse):
    embedding: list[float]
    warnings: list[str] | None = None


class OllamaDetails(WireResponse):
    """Empty where it is not known, as Ollama has it."""

    parent_model: str = ""
    format: str = ""
    family: str = ""
    families: list[str] | None = None
    parameter_size: str = ""
    quantization_level: str = ""
    context_length: int | None = None
    embedding_length: int | None = None


class OllamaModel(WireResponse):
    """`size`: bytes of the model's files. `digest`: the SHA-256 of its file, or of its files' hashes."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails
    capabilities: list[str] | None = None


class OllamaModelList(WireResponse):
    models: list[OllamaModel]


class OllamaRunning(WireResponse):
    """`size`: bytes of memory, on all devices; `size_vram`: those on an accelerator."""

    name: str
    model: str
    size: int
    digest: str
    details: OllamaDetails
    expires_at: str
    size_vram: int
    context_length: int


class OllamaRunningList(WireResponse):
    models: list[OllamaRunning]


class OllamaShowResponse(WireResponse):
    """`template` is the model's own chat template, in Jinja."""

    license: str
    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, JsonValue]
    capabilities: list[str]
    modified_at: str


class OllamaProgress(WireResponse):
    """`status` is for people; the last one is `success`. Bytes where they are known."""

    status: str
    digest: str | None = None
    total: int | None = None
    completed: int | None = None


class OllamaVersion(WireResponse):
    version: str
    llmasos: str


class OllamaErrorBody(WireResponse):
    """`code` and `param` are extensions: a stable name, and the field that is wrong."""

    error: str
    code: str | None = None
    param: str | None = None
