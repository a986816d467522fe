"""ModelConfig: everything that distinguishes one architecture from another, as data.

One frozen dataclass describes decoders and encoders alike. Families (`llmasos.models.families`) fill it from a Hugging
Face `config.json` or from GGUF metadata; nothing downstream asks for a model's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Position = Literal["rope", "learned", "alibi", "none"]
NormKind = Literal["layernorm", "rmsnorm", "nonparametric"]
Block = Literal["pre", "post_residual", "post_branch", "sandwich", "parallel"]
Activation = Literal["gelu", "gelu_tanh", "gelu_quick", "relu", "relu2", "silu"]
QKNorm = Literal["none", "head", "full", "per_head"]
LayerType = Literal["full", "sliding"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context. `kind` and parameters as in Hugging Face:
    linear, dynamic (NTK), llama3, yarn (arXiv:2309.00071), longrope (arXiv:2402.13753)."""

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Sizes are counts of elements; `context_length` is in tokens."""

    architecture: str
    """Hugging Face class name, e.g. LlamaForCausalLM."""
    family: str
    """Row of the family table, e.g. llama."""

    # sizes
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    embedding_size: int = 0
    """Width of the token embeddings where it differs from hidden_size (OPT-350m); 0: the same."""

    # position
    position: Position = "rope"
    position_offset: int = 0
    """Added to positions before the learned table is read (OPT 2, RoBERTa padding index + 1)."""
    rope_theta: float = 10000.0
    rope_local_theta: float = 0.0
    """Base frequency of sliding-window layers where it differs (Gemma 3); 0: the same, scaling included."""
    rotary_dim: int = 0
    """Leading dimensions of a head that rotate; 0: all."""
    rope_interleaved: bool = False
    """Pairs are neighbours (GPT-J, GGUF's LLaMA layout) instead of halves (GPT-NeoX, Hugging Face's LLaMA)."""
    rope_scaling: RopeScaling | None = None
    rope_float32: bool = False
    """Rotations multiply in float32 (OLMo) instead of the stream's dtype."""
    nope_layers: tuple[int, ...] = ()
    """Layers without rotary positions (SmolLM3)."""

    # norm
    norm: NormKind = "rmsnorm"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norm_unit_offset: bool = False
    """RMSNorm multiplies by (1 + weight) (Gemma)."""
    norm_late_rounding: bool = False
    """RMSNorm rounds to the stream's dtype after the weight (OLMo 2) instead of before."""
    embedding_norm: bool = False
    final_norm: bool = True

    # wiring of a block
    block: Block = "pre"
    shared_norm: bool = False
    """Parallel blocks whose attention and MLP read the same normed input (GPT-J, Phi, Falcon-7B)."""

    # attention
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QKNorm = "none"
    attention_scale: float | None = None
    """Multiplies q·k; None: head_dim ** -0.5."""
    scale_by_layer: bool = False
    """Divides the score of layer i by i + 1 (GPT-2's scale_attn_by_inverse_layer_idx)."""
    attention_softcap: float = 0.0
    clip_qkv: float = 0.0
    sliding_window: int = 0
    layer_types: tuple[LayerType, ...] = ()
    """One per layer; empty: all full, or all sliding if sliding_window is set."""
    alibi_scale: float = 1.0
    """Multiplies the ALiBi slopes (Falcon: head_dim ** -0.5)."""
    alibi_bf16: bool = False
    """Slope times position of the key is rounded to bfloat16, whatever the model's dtype (Falcon)."""
    causal: bool = True

    # MLP
    gated: bool = True
    activation: Activation = "silu"
    mlp_bias: bool = False

    # ends
    tie_embeddings: bool = False
    head_bias: bool = False
    final_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    # encoders
    num_token_types: int = 0
    masked_lm: bool = False
    """Has the head that fills masks."""
    num_labels: int = 0
    """Classes of the sequence classification head; 0: no such head."""
    labels: tuple[str, ...] = ()
    classifier_activation: Literal["tanh", "relu"] = "tanh"
    pad_token_id: int | None = None
    pooler: bool = False
    """Has BERT's pooler: a dense layer and tanh on the first token."""

    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Keys of the original config that change no arithmetic (token ids, dropout, names); written back on save."""

    @property
    def is_encoder(self) -> bool:
        return not self.causal

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def rope_dim(self) -> int:
        return self.rotary_dim or self.head_dim

    def is_sliding(self, layer: int) -> bool:
        return self.sliding_window > 0 and (not self.layer_types or self.layer_types[layer] == "sliding")

    def window(self, layer: int) -> int:
        """Keys that a query of this layer sees, itself included; 0: all."""
        return self.sliding_window if self.is_sliding(layer) else 0

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes of keys and values that one token adds over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_element
