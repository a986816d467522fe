"""HostedLLM: a model whose engine runs in a process of its own, with the methods of `LLM`. No torch here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.inference.host import messages as wire
from llmasos.inference.prompts import Prompt, as_prompts
from llmasos.inference.textmodel import TextModel

if TYPE_CHECKING:
    from llmasos.inference.config import EngineConfig
    from llmasos.inference.host.link import Link
    from llmasos.inference.state import AdapterInfo, EngineStats
    from llmasos.models.config import ModelConfig
    from llmasos.text import Tokenizer


@dataclass(frozen=True)
class Description:
    """What is known here of a model elsewhere."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    generation: Mapping[str, Any]
    pooling: Mapping[str, Any]


class HostedLLM(TextModel):
    """Text, templates and stop strings are this process's work, tokens the other's. Any thread and any event loop may
    call. When the other process ends, every request on its way and every later one raises ModelCrashedError."""

    takes_functions = False

    def __init__(self, name: str, model: Description, config: EngineConfig, link: Link) -> None:
        super().__init__(name, model, config, link)
        self._link = link

    @property
    def stats(self) -> EngineStats:
        """The engine's counters as of its last step."""
        return self._link.stats

    # adapters

    def load_adapter(self, name: str, path: Path | str | None = None) -> None:
        """Load a LoRA adapter; see `LLM.load_adapter`. The model's process reads the files."""
        self.prompts.decoder_only("take adapters")
        where = None if path is None else str(Path(path).absolute() if Path(path).exists() else path)
        self._link.call(lambda id: wire.LoadAdapter(id, name, where)).result()

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises NotFoundError, and BusyError while requests use it."""
        self._link.call(lambda id: wire.UnloadAdapter(id, name)).result()

    @property
    def adapters(self) -> list[AdapterInfo]:
        """The loaded adapters, by name."""
        return list(self._link.adapters)

    # memory

    def sleep(self) -> int:
        """Give back the memory of weights, keys and values; see `LLM.sleep`."""
        freed: int = self._link.call(wire.Sleep).result()
        return freed

    def wake_up(self) -> None:
        """Bring a sleeping model's weights back to its device."""
        self._link.call(wire.WakeUp).result()

    # passes that are no steps of the engine

    def _embed(self, ids: list[list[int]], pooling: str | None, normalize: bool) -> list[list[float]]:
        vectors: list[list[float]] = self._link.call(lambda id: wire.Embed(id, ids, pooling, normalize)).result()
        return vectors

    async def aembed(self, texts: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """See `embed`. No thread waits for the other process: there are few of them, for all models."""
        return await self._aembed(texts, **options)

    async def _aembed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        pooling: str | None = None,
        normalize: bool = True,
        truncate: bool = False,
    ) -> Any:
        many = as_prompts(texts)
        ids = await asyncio.to_thread(lambda: [self.prompts.whole(text, truncate=truncate) for text in many])
        vectors = await asyncio.wrap_future(self._link.call(lambda id: wire.Embed(id, ids, pooling, normalize)))
        return vectors[0] if len(many) == 1 and many[0] is texts else vectors

    async def ascore_pairs(self, query: str, texts: Sequence[str]) -> list[float]:
        """See `score_pairs`."""
        ids, types = await asyncio.to_thread(self._pairs, query, texts)
        rows = await asyncio.wrap_future(self._link.call(lambda id: wire.Classify(id, ids, types)))
        return [row[0] for row in rows]

    def _fill_mask(self, ids: list[int], top_k: int) -> list[tuple[list[int], list[float]]]:
        found: list[list[Any]] = self._link.call(lambda id: wire.FillMask(id, ids, top_k)).result()
        return [(words, shares) for words, shares in found]

    def _classify(self, ids: list[list[int]], types: list[list[int]] | None) -> list[list[float]]:
        shares: list[list[float]] = self._link.call(lambda id: wire.Classify(id, ids, types)).result()
        return shares
