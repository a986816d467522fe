"""The engine's dials. Names are vLLM's; what is None is derived from the model and the device. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from llmasos.errors import InvalidInputError, UnsupportedError

_COUNTS = (
    *("max_num_seqs", "max_num_batched_tokens", "max_model_len", "page_size"),
    *("tensor_parallel_size", "max_loras", "max_lora_rank", "kv_cache_memory"),
)
_SWITCHES = "enable_prefix_caching", "enforce_eager", "batch_invariant"
KV_DTYPES: tuple[str, ...] = ("auto", "bfloat16", "float16", "float32", "fp8", "int8")


@dataclass(frozen=True)
class SpeculativeConfig:
    """Names as in vLLM. Raises InvalidInputError."""

    method: Literal["ngram", "draft"] = "ngram"
    """ngram: continue as the text did where its last tokens occurred before. draft: ask a smaller model."""
    model: str | None = None
    """The draft model; it must have the same vocabulary."""
    num_speculative_tokens: int = 8
    """At most so many drafts per sequence and step."""
    prompt_lookup_max: int = 4
    """The longest run of last tokens that is looked up."""
    prompt_lookup_min: int = 2

    def __post_init__(self) -> None:
        if self.method not in ("ngram", "draft"):
            raise InvalidInputError(f"method={self.method!r} is neither 'ngram' nor 'draft'.", param="method")
        if (self.method == "draft") != (self.model is not None):
            need = "needs a model" if self.method == "draft" else "takes no model"
            raise InvalidInputError(f"Speculation by {self.method} {need}.", param="model")
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64:
                raise InvalidInputError(f"{name}={value!r} is not a whole number between 1 and 64.", param=name)
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise InvalidInputError(
                f"prompt_lookup_min={self.prompt_lookup_min} is more than prompt_lookup_max={self.prompt_lookup_max}.",
                param="prompt_lookup_min",
            )

    @classmethod
    def of(cls, **options: Any) -> SpeculativeConfig:
        """From keyword arguments; an unknown name is an InvalidInputError that lists the known ones."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(options) - known):
            raise InvalidInputError(
                f"{unknown[0]!r} is not an option of speculation.",
                hint=f"Known: {', '.join(sorted(known))}.",
                param="speculative",
            )
        return cls(**options)


@dataclass(frozen=True)
class EngineConfig:
    """How one model is served. Raises InvalidInputError that names the field."""

    max_num_seqs: int = 256
    """Completions that run at once; more wait."""
    max_num_batched_tokens: int | None = None
    """Tokens of one pass. None: 8192 on a GPU, 1024 on a CPU, and no less than twice max_num_seqs."""
    max_model_len: int | None = None
    """Tokens that prompt and answer may have together. None: the model's context."""
    page_size: int | None = None
    """Tokens of one page of keys and values, a power of two from 16. None: 64 on a GPU, 16 on a CPU."""
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8", "int8"] = "auto"
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that weights, activations, graphs and pages take together."""
    kv_cache_memory: int | None = None
    """Bytes of pages. None: what the share above leaves; on a CPU half of the memory that is free, and no more than
    max_num_seqs whole contexts need."""
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    """No CUDA graphs."""
    batch_invariant: bool = False
    """The same text for the same request whatever runs beside it, bit for bit; slower."""
    tensor_parallel_size: int = 1
    max_loras: int = 8
    """Adapters that lie in memory at once; more may be loaded."""
    max_lora_rank: int | None = None
    """None: 64; adapters of the library may have any."""
    speculative: SpeculativeConfig | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InvalidInputError(f"{name}={value!r} is not a whole number of at least 1.", param=name)
        if self.page_size is not None and (self.page_size < 16 or self.page_size & (self.page_size - 1)):
            raise InvalidInputError(f"page_size={self.page_size} is not a power of two from 16.", param="page_size")
        if self.kv_cache_dtype not in KV_DTYPES:
            raise InvalidInputError(
                f"kv_cache_dtype={self.kv_cache_dtype!r} is not known.",
                hint=f"Use {', '.join(KV_DTYPES)}.",
                param="kv_cache_dtype",
            )
        if not isinstance(self.gpu_memory_utilization, int | float) or not 0 < self.gpu_memory_utilization <= 1:
            raise InvalidInputError(
                f"gpu_memory_utilization={self.gpu_memory_utilization!r} is not a share between 0 and 1.",
                param="gpu_memory_utilization",
            )
        if self.batch_invariant and self.tensor_parallel_size > 1:
            raise UnsupportedError(
                "batch_invariant needs one process: sums over several depend on what else is in a pass.",
                hint="Use tensor_parallel_size=1.",
                param="batch_invariant",
            )
        for name in _SWITCHES:
            if not isinstance(value := getattr(self, name), bool):
                raise InvalidInputError(f"{name}={value!r} is neither True nor False.", param=name)
        if self.speculative is not None and not isinstance(self.speculative, SpeculativeConfig):
            raise InvalidInputError(
                f"speculative={self.speculative!r} is no SpeculativeConfig.",
                hint='Give SpeculativeConfig(method="ngram"), from llmasos.inference.',
                param="speculative",
            )

    @classmethod
    def of(cls, **options: Any) -> EngineConfig:
        """From keyword arguments; an unknown name is an InvalidInputError that lists the known ones."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(options) - known):
            raise InvalidInputError(
                f"{unknown[0]!r} is not an engine option.",
                hint=f"Known: {', '.join(sorted(known))}.",
                param=unknown[0],
            )
        if isinstance(speculative := options.get("speculative"), Mapping):  # as files and other processes write it
            options["speculative"] = SpeculativeConfig.of(**speculative)
        return cls(**options)
