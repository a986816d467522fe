"""What Ollama's clients ask about models: /api/tags, /api/ps, /api/show. Facts come from the files' headers."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.client.types.ollama import (
    OllamaDetails,
    OllamaModel,
    OllamaRunning,
    OllamaShowResponse,
)
from llmasos.errors import FormatError, InvalidInputError, LLMasOSError, NotFoundError
from llmasos.inference.calling import takes_tools
from llmasos.serve.ollama.names import shown, spellings
from llmasos.serve.served import ServedModel
from llmasos.serve.thinking import thinks
from llmasos.store.card import CARD_NAME, Card
from llmasos.store.headers import opener, read_facts, read_tensors
from llmasos.store.library import Library

if TYPE_CHECKING:
    from llmasos.client.types.native import ModelStatus
    from llmasos.models.config import ModelConfig

FOR_EVER = timedelta(days=365 * 100)
"""What `expires_at` says of models that stay: the field has no word for that."""
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Facts:
    """Empty where it is not known."""

    details: OllamaDetails = field(default_factory=lambda: details(format="", family=""))
    info: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    digest: str = ""
    modified: str = ""
    licence: str = ""


def details(**known: Any) -> OllamaDetails:
    """With every field that clients look for."""
    family = known.get("family", "")
    empty = {"parent_model": "", "families": [family] if family else [], "parameter_size": "", "quantization_level": ""}
    return OllamaDetails(**{**empty, **known})


def facts_of(name: str) -> Facts:
    """Of an installed model; what is not in the library has none. Blocking."""
    library = Library()
    try:
        folder, card = library.folder(name), library.get(name)
    except LLMasOSError:
        return Facts()
    try:
        changed = (folder / CARD_NAME).stat().st_mtime
    except OSError:
        changed = 0.0
    return _read(folder, changed, card.model_dump_json())


@lru_cache(maxsize=256)
def _read(folder: Path, changed: float, card_text: str) -> Facts:
    """`changed` makes a replaced model a new one."""
    card = Card.model_validate_json(card_text)
    known: dict[str, Any] = {"format": card.format or "", "family": card.family or ""}
    info: dict[str, Any] = {}
    try:
        found = read_facts([file.path for file in card.files], opener(folder))
        tensors = read_tensors(found, opener(folder))
    except (FormatError, OSError):  # of a kind that only its own loader understands
        pass
    else:
        sizes = Counter[str]()
        for tensor in tensors:
            sizes[tensor.dtype] += math.prod(tensor.shape)
        known |= _measures(found.config, sizes, found.format)
        info = _info(found.config, known["family"], sum(sizes.values()))
    return Facts(
        details=details(**known),
        info=info,
        size=card.size,
        digest=_digest(card),
        modified=_time(card.created),
        licence=card.licence or "",
    )


def _measures(config: ModelConfig, sizes: Counter[str], format: str) -> dict[str, Any]:
    kind = sizes.most_common(1)[0][0] if sizes else ""
    counted = format == "gguf" or kind in _FLOATS  # packed integers hold several weights each
    return {
        "parameter_size": _count(sum(sizes.values())) if counted and sizes else "",
        "quantization_level": kind,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
    }


def _count(number: float) -> str:
    for unit in ("", "K", "M", "B"):
        if number < 1000:
            return f"{number:.1f}{unit}" if unit else str(number)
        number /= 1000
    return f"{number:.1f}T"


def _info(config: ModelConfig, family: str, num_parameters: int) -> dict[str, Any]:
    """Under the keys that GGUF has for them."""
    own = {
        "block_count": config.num_layers,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "vocab_size": config.vocab_size,
    }
    head = {"general.architecture": family, "general.parameter_count": num_parameters}
    return head | {f"{family}.{name}": value for name, value in own.items()}


def _digest(card: Card) -> str:
    hashes = sorted(f"{file.path}:{file.sha256}" for file in card.files)
    if len(card.files) == 1:
        return card.files[0].sha256
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest() if hashes else ""


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def list_models(names: Iterable[str], created: int) -> list[OllamaModel]:
    """Blocking."""
    return [_listed(name, facts_of(name), created) for name in names]


def _listed(name: str, facts: Facts, created: int) -> OllamaModel:
    return OllamaModel(
        name=shown(name),
        model=shown(name),
        modified_at=facts.modified or _time(datetime.fromtimestamp(created, UTC)),
        size=facts.size,
        digest=facts.digest,
        details=facts.details,
    )


def list_running(statuses: Iterable[ModelStatus]) -> list[OllamaRunning]:
    """What is loaded. Blocking."""
    return [_running(status, facts_of(status.name)) for status in statuses if status.state in ("ready", "loading")]


def _running(status: ModelStatus, facts: Facts) -> OllamaRunning:
    bytes_ = status.measured_bytes or status.predicted_bytes
    return OllamaRunning(
        name=shown(status.name),
        model=shown(status.name),
        size=sum(bytes_.values()) or facts.size,
        digest=facts.digest,
        details=facts.details,
        expires_at=_time(status.expires_at or datetime.now(UTC) + FOR_EVER),
        size_vram=sum(size for device, size in bytes_.items() if device != "cpu"),
        context_length=status.context_length or facts.details.context_length or 0,
    )


def show(name: str, model: ServedModel, facts: Facts, created: int) -> OllamaShowResponse:
    parameters = _parameters(model)
    lines = [f"FROM {name}", *(f"PARAMETER {key} {value}" for key, value in parameters.items())]
    return OllamaShowResponse(
        license=facts.licence,
        modelfile="\n".join(lines) + "\n",
        parameters="\n".join(f"{key:<30} {value}" for key, value in parameters.items()),
        template=model.chat_template or "",
        details=facts.details,
        model_info=facts.info,
        capabilities=_capabilities(model),
        modified_at=facts.modified or _time(datetime.fromtimestamp(created, UTC)),
    )


def _parameters(model: ServedModel) -> dict[str, Any]:
    """What holds where a request says nothing."""
    found: dict[str, Any] = {"num_ctx": model.context_length}
    if model.is_encoder or not hasattr(model, "params"):  # one that is not loaded does not tell
        return found
    params = model.params()
    if params.temperature:
        found["temperature"] = params.temperature
    usual = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    found |= {key: value for key in usual if (value := getattr(params, key)) != usual[key]}
    if params.repetition_penalty != 1:
        found["repeat_penalty"] = params.repetition_penalty
    return found


def _capabilities(model: ServedModel) -> list[str]:
    if model.is_encoder:
        return ["embedding"]
    found = ["completion"]
    if model.chat_template and takes_tools(model.chat_template):
        found.append("tools")
    if thinks(model):
        found.append("thinking")
    return found


def installed_name(name: str) -> str:
    """The name that an installed model has in the library. Raises NotFoundError. Blocking."""
    library, first = Library(), None
    for spelling in spellings(name):
        try:
            return library.folder(spelling).name
        except (NotFoundError, InvalidInputError) as e:
            first = first or e
    assert first is not None
    raise first
