"""Does what was exported say what was trained? Log-probabilities of fixed prompts, computed by

    the trained weights in memory       the run's checkpoint, in float32, as training computes: the reference
    the exported folder, our loader     in float32
    the exported folder, transformers   in float32; an adapter by peft; left out where they are not installed
    the served engine                   as `llmasos serve` loads it: the machine's dtype, low-bit where that is usual

and the exported tensors one by one. Rounding is told from mistakes by where a mistake shows: tensors must be equal to
the last bit, float32 must agree to rounding, and where the trained model leads clearly, its token must be chosen.

R = compared pairs of position and token, T = positions, V = vocabulary.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmasos.devices import pick_device
from llmasos.errors import NotFoundError
from llmasos.formats import open_checkpoint
from llmasos.inference.adapters import Adapters
from llmasos.inference.config import EngineConfig
from llmasos.inference.llm import LLM
from llmasos.inference.request import SamplingParams
from llmasos.models.load import LoadedModel, hf_state, load_model
from llmasos.models.lora import WEIGHTS, read_lora_config
from llmasos.models.lowbit import Int4Linear, Int8Linear
from llmasos.train.checkpoint import read_weights
from llmasos.train.export import ADAPTER, DTYPES, MODEL, Run, save
from llmasos.train.methods import method_of
from llmasos.train.model import Placed, Trainee

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n",
    "1, 2, 3, 5, 8, 13, 21,",
    "北京是中国的首都，东京是",
)
QUESTION = "What is the sum of 17 and 25? Answer in one word."
MOST_TOKENS = 256
"""Of one prompt."""
TOP = 5
"""Tokens at each position whose log-probabilities the engine is asked for."""
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2, "low-bit": 6e-2, "qlora": 0.2}
"""Mean difference of log-probabilities that rounding explains, in nats of a model whose logits spread by 1; wider
spreads have more. qlora: the served model has its own weights, and the adapter was trained beside rounded ones."""
CLEAR = 8.0
"""The trained model leads clearly where its best token is ahead of the next by this many tolerances."""
LEAST_CLEAR = 0.98
"""The share of those positions at which the same token must be the best."""


@dataclass(frozen=True)
class Comparison:
    """One way of computing against the reference. `top1`: the share of positions with the same best token; `clear`:
    of those where the reference leads clearly. `skipped`: why nothing was compared."""

    name: str
    dtype: str = ""
    max_difference: float = 0.0
    """Of log-probabilities, nats."""
    mean_difference: float = 0.0
    top1: float = 1.0
    clear: float = 1.0
    tolerance: float = 0.0
    """Of the mean difference."""
    skipped: str = ""

    @property
    def ok(self) -> bool:
        return bool(self.skipped) or (self.mean_difference <= self.tolerance and self.clear >= LEAST_CLEAR)


@dataclass(frozen=True)
class Verification:
    """`different`: tensors of the exported folder that are not what was trained, each with how far off it is."""

    folder: Path
    """What was verified."""
    step: int
    num_positions: int
    comparisons: tuple[Comparison, ...]
    different: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.different and all(one.ok for one in self.comparisons)

    @property
    def problems(self) -> list[str]:
        """What differs, in words; empty if nothing does."""
        found = [f"{self.folder.name}: {one}" for one in self.different]
        for one in self.comparisons:
            if one.ok:
                continue
            if one.mean_difference > one.tolerance:
                found.append(
                    f"{one.name} ({one.dtype}): log-probabilities differ by {one.mean_difference:.3g} in the mean "
                    f"(at most {one.max_difference:.3g}); rounding explains {one.tolerance:.3g}."
                )
            else:
                found.append(
                    f"{one.name} ({one.dtype}): chooses another token at {1 - one.clear:.1%} of the positions where "
                    "the trained model is sure."
                )
        return found


def verify_run(
    folder: Path, *, device: str = "auto", step: int | None = None, prompts: Sequence[str] = PROMPTS
) -> Verification:
    """Compare what `export_run` wrote last into the run's folder with what was trained.

    `step`: that was exported; default: the latest checkpoint. Raises NotFoundError where nothing was exported, and what
    reading the run and the export raises: a folder that can't be loaded is no verdict but an error."""
    run = Run.open(folder, step)
    exported = [one for one in (folder / MODEL, folder / ADAPTER) if one.is_dir()]
    if not exported:
        raise NotFoundError(f"Nothing of {folder.name} was exported yet.", hint=f"llmasos train export {folder.name}")
    target = max(exported, key=lambda one: one.stat().st_mtime_ns)
    where = pick_device(device)
    different = tuple(_different_model(run, target) if target.name == MODEL else _different_adapter(run, target))
    ids = _token_ids(run, prompts)
    coarsest = "qlora" if run.config.tuning == "qlora" else "float32"
    reference = _Reference.of(_trained(run, where), ids, coarsest)
    base = run.base()
    ways: list[tuple[str, Callable[[], Comparison]]] = [
        ("our loader", lambda: _ours(reference, target, base, where)),
        ("transformers" if target.name == MODEL else "peft", lambda: _theirs(reference, target, base)),
        ("served engine", lambda: _served(reference, target, base, device)),
    ]
    comparisons = []
    for name, compare in ways:
        try:
            comparisons.append(compare())
        except _SkippedError as e:
            comparisons.append(Comparison(name, skipped=str(e)))
    return Verification(target, run.step, reference.num_positions, tuple(comparisons), different)


class _SkippedError(Exception):
    pass


# what was trained


def _trained(run: Run, device: torch.device) -> LoadedModel:
    """The weights of the checkpoint in float32, adapters beside their layers as training has them."""
    if run.config.tuning == "full":
        model = run.merged(torch.float32)
        model.module.to(device)
        return model
    model = method_of(run.config).weights(device, torch.float32)
    weights = read_weights(run.checkpoint)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])
    model.module.requires_grad_(False).eval()
    return model


def _token_ids(run: Run, prompts: Sequence[str]) -> list[list[int]]:
    """Prompts, and a question in the chat template where there is one."""
    tokenizer = run.tokenizer()
    most = min(MOST_TOKENS, run.method.shape.context_length - 1)
    ids = [tokenizer.encode(text)[:most] for text in (*prompts, *run.config.prompts)]
    if tokenizer.chat_template is not None:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}])
        ids.append(tokenizer.encode(chat, add_special_tokens=False)[:most])
    return [one for one in ids if len(one) > 1]


@torch.inference_mode()
def _log_probs(model: LoadedModel, ids: Sequence[int], before: Callable[[], None] = lambda: None) -> Tensor:
    """[T, V] float32 on the CPU, of every token but the last."""
    trainee = Trainee(model.module, dtype=torch.float32)
    device = model.module.device
    tokens = torch.tensor(ids, device=device)
    positions = torch.arange(len(ids), device=device)
    before()
    hidden = trainee.hidden(Placed(tokens, positions, positions, tokens, [len(ids)]))
    return model.module.logits(hidden[:-1].float()).float().log_softmax(-1).cpu()


@dataclass(frozen=True)
class _Reference:
    ids: list[list[int]]
    log_probs: list[Tensor]
    """[T, V] of each prompt."""
    dtype: str
    """That nothing is judged more strictly than."""

    @classmethod
    def of(cls, model: LoadedModel, ids: list[list[int]], dtype: str) -> _Reference:
        return cls(ids, [_log_probs(model, one) for one in ids], dtype)

    @property
    def num_positions(self) -> int:
        return sum(map(len, self.log_probs))

    def compare(self, name: str, dtype: str, found: Sequence[_Found]) -> Comparison:
        spread = float(torch.cat([one.std(-1) for one in self.log_probs]).mean())
        tolerance = max(TOLERANCES[dtype], TOLERANCES[self.dtype]) * max(1.0, spread)
        differences, same, clear = [], [], []
        for mine, theirs in zip(self.log_probs, found, strict=True):
            differences.append((mine[theirs.rows, theirs.tokens] - theirs.values).abs())
            best = mine.topk(2, -1)
            same.append(best.indices[:, 0] == theirs.best)
            clear.append(best.values[:, 0] - best.values[:, 1] > CLEAR * tolerance)
        difference, equal, is_clear = torch.cat(differences), torch.cat(same), torch.cat(clear)
        return Comparison(
            name,
            dtype,
            max_difference=float(difference.max()),
            mean_difference=float(difference.mean()),
            top1=float(equal.float().mean()),
            clear=float(equal[is_clear].float().mean()) if bool(is_clear.any()) else 1.0,
            tolerance=tolerance,
        )


@dataclass(frozen=True)
class _Found:
    rows: Tensor
    """[R]: position."""
    tokens: Tensor
    """[R]."""
    values: Tensor
    """[R]: log-probabilities."""
    best: Tensor
    """[T]."""

    @classmethod
    def whole(cls, log_probs: Tensor) -> _Found:
        rows, tokens = torch.meshgrid(*(torch.arange(n) for n in log_probs.shape), indexing="ij")
        return cls(rows.flatten(), tokens.flatten(), log_probs.flatten(), log_probs.argmax(-1))


# what was exported


def _different_model(run: Run, folder: Path) -> Iterator[str]:
    dtype = _stored_dtype(folder)
    with closing(open_checkpoint(folder)) as checkpoint:
        wanted = hf_state(run.merged(DTYPES[dtype]))
        yield from _different(wanted, checkpoint)


def _different_adapter(run: Run, folder: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as fresh:
        save(run.with_adapter(), Path(fresh))
        with (
            closing(open_checkpoint(Path(fresh) / WEIGHTS)) as wanted,
            closing(open_checkpoint(folder / WEIGHTS)) as checkpoint,
        ):
            yield from _different({name: wanted.tensor(name) for name in wanted.tensors}, checkpoint)
        if read_lora_config(Path(fresh)).__dict__ | {"path": None} != read_lora_config(folder).__dict__ | {
            "path": None
        }:
            yield "adapter_config.json has another rank or strength."


def _different(wanted: Any, checkpoint: Any) -> Iterator[str]:
    for name, tensor in wanted.items():
        if name not in checkpoint.tensors:
            yield f"{name} is missing."
            continue
        found = checkpoint.tensor(name)
        if found.shape != tensor.shape:
            yield f"{name} has the shape {list(found.shape)}, and {list(tensor.shape)} was trained."
        elif not torch.equal(found.to(tensor.dtype), tensor):
            yield f"{name} differs by up to {float((found.float() - tensor.float()).abs().max()):.3g}."
    for name in checkpoint.tensors:
        if name not in wanted:
            yield f"{name} was not trained."


def _stored_dtype(folder: Path) -> str:
    with closing(open_checkpoint(folder)) as checkpoint:
        kinds = {info.dtype for info in checkpoint.tensors.values()}
    return "float32" if kinds == {"F32"} else "bfloat16"


def _rounded(folder: Path) -> str:
    """The dtype that differences are judged by: computing in float32 does not undo rounding."""
    return _stored_dtype(folder) if folder.name == MODEL else "float32"


def _ours(reference: _Reference, folder: Path, base: Path | None, device: torch.device) -> Comparison:
    if folder.name == MODEL:
        model = load_model(folder, device=device, dtype=torch.float32, quantization="none")
        found = [_Found.whole(_log_probs(model, ids)) for ids in reference.ids]
        return reference.compare("our loader", _rounded(folder), found)
    assert base is not None
    model = load_model(base, device=device, dtype=torch.float32, quantization="none")
    adapters = Adapters(model, max_adapters=1, max_rank=read_lora_config(folder).r)
    slot = adapters.load("verified", folder)
    found = []
    for ids in reference.ids:
        slots = np.full(len(ids), slot, np.int32)
        found.append(_Found.whole(_log_probs(model, ids, lambda slots=slots: adapters.state.plan(slots))))  # type: ignore[misc]
    return reference.compare("our loader", _rounded(folder), found)


def _theirs(reference: _Reference, folder: Path, base: Path | None) -> Comparison:
    name = "transformers" if folder.name == MODEL else "peft"
    source = folder if folder.name == MODEL else base
    assert source is not None
    if not source.is_dir() or not (source / "config.json").is_file():
        raise _SkippedError(f"{source.name} is GGUF, which {name} can't put an adapter on")
    try:
        model = _load_theirs(source, folder if folder.name == ADAPTER else None)
    except ImportError as e:
        raise _SkippedError(f"{e.name} is not installed") from None
    found = []
    with torch.inference_mode():
        for ids in reference.ids:
            logits = model(torch.tensor([ids])).logits[0, :-1]
            found.append(_Found.whole(logits.float().log_softmax(-1)))
    return reference.compare(name, _rounded(folder), found)


def _load_theirs(source: Path, adapter: Path | None) -> Any:
    """On the CPU, float32. Raises ImportError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about their own future
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            if adapter is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, adapter)
        return model.eval()
    finally:
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _served(reference: _Reference, folder: Path, base: Path | None, device: str) -> Comparison:
    source, adapter = (folder, None) if folder.name == MODEL else (base, folder)
    assert source is not None
    rank = {} if adapter is None else {"max_lora_rank": max(64, read_lora_config(adapter).r)}
    with LLM.load(source, name="verified", config=EngineConfig.of(**rank), device=device) as llm:
        request: dict[str, Any] = {}
        if adapter is not None:
            llm.load_adapter("adapter", adapter)
            request = {"adapter": "adapter"}
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=TOP)
        outputs = llm.complete(list(reference.ids), params, **request)
        low_bit = any(isinstance(layer, Int4Linear | Int8Linear) for layer in llm.model.module.modules())
        dtype = "low-bit" if low_bit else str(llm.model.module.dtype).removeprefix("torch.")
    coarser = max(dtype, _rounded(folder), key=lambda one: TOLERANCES[one])
    return reference.compare("served engine", coarser, [_of_engine(output) for output in outputs])


def _of_engine(output: Any) -> _Found:
    rows, tokens, values, best = [], [], [], []
    for row, told in enumerate(output.prompt_logprobs[1:]):
        best.append(told.top[0][0])
        pairs = {told.token_id: told.logprob, **{token: value for token, _, value in told.top}}
        rows += [row] * len(pairs)
        tokens += list(pairs)
        values += list(pairs.values())
    return _Found(torch.tensor(rows), torch.tensor(tokens), torch.tensor(values), torch.tensor(best))
