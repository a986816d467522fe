"""The table of families: architecture name -> config mapping and weight names, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmasos.errors import FormatError, UnknownArchitectureError, UnsupportedError
from llmasos.models.config import ModelConfig
from llmasos.models.families import bert, falcon, gemma, gpt, llama
from llmasos.models.families.mapping import Family

FAMILIES: tuple[Family, ...] = (*gpt.FAMILIES, *falcon.FAMILIES, *llama.FAMILIES, *gemma.FAMILIES, *bert.FAMILIES)

_BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}
_BY_NAME = {family.name: family for family in FAMILIES}


def known_architectures() -> tuple[str, ...]:
    """Hugging Face class names that load here."""
    return tuple(sorted(_BY_ARCHITECTURE))


def family_of(config: ModelConfig) -> Family:
    return _BY_NAME[config.family]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """A config.json -> ModelConfig. Raises UnknownArchitectureError that names the architecture and the known ones,
    FormatError for a config that lacks or contradicts what its family needs, UnsupportedError for weights quantised by
    a scheme with scales of its own: read as numbers, they would be wrong without a word."""
    for name in hf.get("architectures") or []:
        if name in _BY_ARCHITECTURE:
            return _read(_BY_ARCHITECTURE[name], hf)
    if not hf.get("architectures") and hf.get("model_type") in _BY_NAME:
        return _read(_BY_NAME[hf["model_type"]], hf)
    name = (hf.get("architectures") or [hf.get("model_type") or "none given"])[0]
    raise UnknownArchitectureError(
        f"The architecture {name!r} is not known.", hint=f"Known: {', '.join(known_architectures())}."
    )


def _read(family: Family, hf: Mapping[str, Any]) -> ModelConfig:
    if scheme := hf.get("quantization_config"):
        kind = scheme.get("quant_method") if isinstance(scheme, Mapping) else scheme
        raise UnsupportedError(
            f"The weights are quantised with {kind or 'an unnamed method'}, which this build does not read.",
            hint="Take the original weights or a GGUF file.",
        )
    try:
        return family.read(hf)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as e:  # a word where a number belongs, and the like
        raise FormatError(
            f"config.json of a {family.name} model can't be understood: {e}.",
            hint="The file is damaged or not a model's config; fetch it again.",
        ) from e


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> the content of a config.json that transformers loads. None is written as null: left out, a key
    would get its class's default, which may mean something else (Mistral's sliding_window)."""
    family = family_of(config)
    return {
        **config.extra,
        "architectures": [config.architecture],
        "model_type": family.name,
        **family.write(config),
    }
