"""The plan: memory is counted as it comes and goes, whatever the depth; what fits is found, what would fit named."""

from __future__ import annotations

import gc
import itertools
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmasos.data import Stats
from llmasos.errors import InsufficientMemoryError
from llmasos.models.config import ModelConfig
from llmasos.models.families import config_from_hf
from llmasos.models.load import load_model
from llmasos.train import answers, memory, pace
from llmasos.train import plan as planning
from llmasos.train.config import TrainConfig
from llmasos.train.divergence import Divergence
from llmasos.train.lora import LoraOptions, add_lora, lora_layers
from llmasos.train.losses import PIECE
from llmasos.train.lowbit import FrozenLinear
from llmasos.train.memory import Count, Load, Peak, Setup, Taught, footprint
from llmasos.train.model import Placed, Trainee
from llmasos.train.optim import OptimizerOptions, Optimizers
from llmasos.train.pace import Pace, measured
from llmasos.train.plan import GIB, PROBE_TOKENS, USABLE, Plan, plan
from tiny import write_tiny_model

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
LLAMA = config_from_hf({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES})
GEMMA = config_from_hf(
    {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 16,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 20.0,
        "query_pre_attn_scalar": 16,
        "sliding_window": 64,
        **SIZES,
    }
)
GPT2 = config_from_hf(
    {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 1000,
        "n_embd": 128,
        "n_layer": 5,
        "n_head": 8,
        "n_positions": 512,
    }
)
SHAPES = {"llama": LLAMA, "gemma": GEMMA, "gpt2": GPT2}
SETUPS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": LoraOptions()},
    "qdora": {"lora": LoraOptions(dora=True), "quantization": "nf4"},
    "recompute": {"recompute": True, "optimizer": OptimizerOptions(name="adamw8bit")},
    "muon": {"accumulates": True, "optimizer": OptimizerOptions(name="muon")},
    "gpu": {"on_gpu": True, "dtype": torch.bfloat16, "lora": LoraOptions()},
}
BATCH = Load((200, 150), 300)


def setup(**changes: Any) -> Setup:
    return Setup(**{"dtype": torch.float32, "optimizer": OptimizerOptions(), **changes})


@pytest.mark.parametrize(
    ("shape", "name"),
    [*(("llama", name) for name in SETUPS), ("gemma", "full"), ("gpt2", "qdora")],
)
def test_two_depths_tell_of_all(shape: str, name: str) -> None:
    wanted = setup(**SETUPS[name])
    ours, whole = footprint(SHAPES[shape], wanted, BATCH), memory._run(SHAPES[shape], wanted, BATCH)
    assert ours.peak == pytest.approx(whole.peak, rel=0.01)
    assert ours.resident(wanted) == pytest.approx(whole.resident(wanted), rel=0.05)
    assert ours.weights == whole.weights and ours.optimizer == whole.optimizer


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_blocks_keep_less_and_depth_is_a_line_too(compiled: bool) -> None:
    options = setup(on_gpu=True, dtype=torch.bfloat16, compiled=compiled)
    ours, whole = footprint(LLAMA, options, BATCH), memory._run(LLAMA, options, BATCH)
    assert ours.peak == pytest.approx(whole.peak, rel=0.01)
    eager = footprint(LLAMA, setup(on_gpu=True, dtype=torch.bfloat16), BATCH)
    assert ours.activations == eager.activations if not compiled else ours.activations < 0.8 * eager.activations


def test_what_a_compiled_block_keeps_is_what_its_products_read() -> None:
    """A gated block without norms of heads: the stream between its halves, both normed inputs at most, q, k, v, what
    attention gave, gate and up, and their product."""
    options = setup(on_gpu=True, dtype=torch.bfloat16, compiled=True)
    kept = memory._kept(memory.of_depth(LLAMA, 1), options, BATCH)
    tokens, width, wide = BATCH.num_tokens, 128, 256
    qkv, out, both = 128 + 2 * 64, 128, 2 * wide
    least, most = 2 * tokens * (qkv + out + both), 2 * tokens * (3 * width + 2 * qkv + out + both + wide) + 64 * tokens
    assert least <= kept.saved <= most


def test_interleaved_positions_are_planned_for_a_gpu_again_and_again() -> None:
    """As GGUF's Llamas have them. Each plan is traced anew: nothing of one trace is kept in the next."""
    shape = replace(LLAMA, rope_interleaved=True)
    options = setup(on_gpu=True, dtype=torch.bfloat16, compiled=True)
    found = []
    for _ in range(2):
        memory.footprint.cache_clear()
        memory._kept.cache_clear()
        found.append(footprint(shape, options, BATCH))
    assert found[0] == found[1]
    halves = footprint(LLAMA, options, BATCH)
    assert found[0].peak == pytest.approx(halves.peak, rel=0.1), "only the order of rotated pairs differs"


@pytest.mark.parametrize("name", ["full", "lora", "qlora", "recompute", "8bit", "taught"])
def test_the_count_is_that_of_real_tensors(name: str, tmp_path: Path) -> None:
    """The same step with real tensors, counted by the same eyes: nothing is assumed of shapes that is not so."""
    folder = write_tiny_model(tmp_path / "model")
    linear = partial(FrozenLinear, kind="nf4") if name == "qlora" else None
    model = load_model(folder, device="cpu", dtype="float32", quantization="none", linear=linear)
    options = OptimizerOptions(name="adamw8bit" if name == "8bit" else "adamw")
    lora = LoraOptions(r=4) if "lora" in name else None
    asked = setup(
        lora=lora, optimizer=options, recompute=name == "recompute", quantization="nf4" if name == "qlora" else None
    )
    if lora is not None:
        add_lora(model, lora)
    else:
        model.module.requires_grad_()
    trainee = Trainee(model.module.train(), dtype=torch.float32, recompute=asked.recompute)
    optimizers = Optimizers(model.module, options)
    tokens = torch.arange(100) % 90
    placed = Placed(tokens, torch.cat([torch.arange(60), torch.arange(40)]), torch.arange(80), tokens[:80], [60, 40])
    taught = Taught(model.config, Divergence("jsd", temperature=2.0, weight=0.5)) if name == "taught" else None
    theirs = None if taught is None else taught.scores(80, model.config.vocab_size, torch.float32)

    def loss() -> torch.Tensor:
        if taught is None or theirs is None:
            return trainee.loss(placed)
        casts = trainee.casts()
        return memory.distance(
            trainee, trainee.hidden(placed, casts)[placed.rows], casts, theirs, placed.labels, taught.how
        )

    loss().backward()
    optimizers.step(1.0)
    gc.collect()
    tables = [t for rope in set(model.module.ropes.values()) for pair in rope._tables.values() for t in pair]
    rows = [part for _, layer in lora_layers(model.module) for part in layer.parts]
    states = [t for each in optimizers.each for state in each.state.values() for t in state.values()]
    codes = [code for each in optimizers.each for pair in getattr(each, "_codes", {}).values() for code in pair]
    states += [t for code in codes for t in vars(code).values()]
    with Count() as count:
        for tensor in (*model.module.parameters(), *model.module.buffers(), *tables, *rows):
            count.see(tensor)
        weights = count.live
        for tensor in states:
            count.see(tensor)
        held = count.live
        for tensor in (theirs.hidden, theirs.weight) if theirs is not None else ():
            count.see(tensor)
        loss().backward()
        optimizers.step(1.0)
    predicted = footprint(model.config, replace(asked, taught=taught), Load((60, 40), 80))
    assert predicted.weights == weights
    assert predicted.optimizer == pytest.approx(held - weights, rel=0.02)
    assert predicted.peak == pytest.approx(count.most, rel=0.02)


def test_a_process_grows_by_what_is_said(tmp_path: Path) -> None:
    """Resident memory, as bench/plan_check.py measures it over real runs; here the gauge is tried."""
    peak = Peak(CPU)
    held = torch.ones(64 * 2**20 // 4)
    assert 63 * 2**20 < peak.num_bytes - peak.before < 80 * 2**20
    del held
    assert peak.num_bytes - peak.before > 63 * 2**20
    again = Peak(CPU)
    assert again.num_bytes - again.before < 40 * 2**20


def test_on_a_cpu_the_process_is_part_of_the_plan_and_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_memory", lambda device: 8 * GIB)
    found = plan(config(), BIG, STATS, device=CPU, dtype=torch.float32)
    assert found.parts["process"] == PROCESS and found.memory == sum(found.parts.values())
    assert found.available == 8 * GIB + PROCESS, "what it has is not taken twice"
    gpu = plan(config(), BIG, STATS, device=torch.device("cuda"), dtype=torch.float32)
    assert "process" not in gpu.parts and gpu.available == 8 * GIB
    monkeypatch.undo()
    real = plan(config(), LLAMA, STATS, device=CPU, dtype=torch.float32, available=64 * GIB)
    assert real.parts["process"] == pytest.approx(Peak(CPU).before, rel=0.2)


# --- the search

STATS = Stats(num_samples=1000, num_tokens=100_000, num_trained=60_000, longest=256)


def config(**changes: Any) -> TrainConfig:
    given = {"model": "m", "data": ("d",), "tuning": "full", "optimizer": "adamw", "epochs": 1.0}
    return TrainConfig(**{**given, "max_length": 128, "batch_tokens": 1024, "compile": False, **changes})


PROCESS = 300 * 2**20
MACHINE = planning._Machine(CPU, torch.float32, 1, 0, 0, None)
BIG = replace(LLAMA, hidden_size=512, intermediate_size=1024, head_dim=64, vocab_size=20_000)


def planned(available: float, shape: ModelConfig = BIG, **changes: Any) -> Plan:
    ours = {name: changes.pop(name) for name in ("world_size", "device", "teacher", "timed") if name in changes}
    where = {"device": CPU, "dtype": torch.float32, **ours}
    return plan(config(**changes), shape, STATS, available=round(available * GIB), **where)


@pytest.fixture(autouse=True)
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measured", lambda *given, **more: Pace(1e-3, 0.01, "two blocks, measured now"))
    monkeypatch.setattr(planning, "resident", lambda: PROCESS)


def test_what_fits_is_the_largest_and_recompute_comes_last() -> None:
    roomy = planned(100)
    assert roomy.config.micro_batch_tokens == 1024 and roomy.accumulation == 1 and not roomy.config.recompute
    assert roomy.memory == sum(roomy.parts.values()) < roomy.available
    less = planned(0.97 * roomy.memory / GIB)
    assert less.config.micro_batch_tokens < 1024 and not less.config.recompute and less.accumulation > 1
    assert less.fits and less.memory < roomy.memory
    smallest = planned(100, micro_batch_tokens=128)
    least = planned(0.99 * smallest.memory / USABLE / GIB)
    assert least.config.recompute and least.fits


def test_what_is_asked_for_is_kept() -> None:
    asked = planned(100, micro_batch_tokens=256, recompute=True)
    assert asked.config.micro_batch_tokens == 256 and asked.config.recompute and asked.accumulation == 4
    with pytest.raises(InsufficientMemoryError):
        planned(0.9 * planned(100, recompute=False, micro_batch_tokens=1024).memory / GIB,
                recompute=False, micro_batch_tokens=1024)  # fmt: skip


def test_a_refusal_names_each_change_that_would_fit_with_its_figure() -> None:
    smallest = planned(100, recompute=True, micro_batch_tokens=128)
    with pytest.raises(InsufficientMemoryError) as refused:
        planned(0.98 * smallest.memory / USABLE / GIB)
    said = f"{refused.value} {refused.value.hint}"
    assert "128 tokens needs" in said and "are free" in said
    for way in ("--tuning lora (", "--tuning qlora (", "--optimizer adamw8bit ("):
        assert way in refused.value.hint
    assert "--max-length" not in refused.value.hint  # 64 tokens would be no samples


def test_shorter_samples_are_proposed_where_they_are_what_is_too_much() -> None:
    long = {"max_length": 512, "batch_tokens": 512, "tuning": "lora", "recompute": True}
    taken = planned(100, **long).memory / GIB
    with pytest.raises(InsufficientMemoryError, match="512 tokens") as refused:
        planned(0.95 * taken, **long)
    assert "--max-length 256 (" in refused.value.hint or "--max-length 128 (" in refused.value.hint
    assert "--recompute (" not in refused.value.hint


SHORT: dict[str, tuple[float, dict[str, Any]]] = {
    "full": (0.95, {}),
    "muon": (0.95, {"optimizer": "muon"}),
    "many tokens": (0.95, {"micro_batch_tokens": 1024, "recompute": True}),
    "no recompute": (0.95, {"recompute": False, "tuning": "lora"}),
    "two things at once": (0.87, {"tuning": "lora", "max_length": 512, "batch_tokens": 512, "micro_batch_tokens": 512}),
}
"""What is asked for, and how much of the memory that it takes at least there is."""


@pytest.mark.parametrize("name", SHORT)
def test_whoever_follows_a_hint_can_train(name: str) -> None:
    share, said = SHORT[name]
    least = {"micro_batch_tokens": said.get("max_length", 128), "recompute": True} | said
    available = share * planned(100, **least).memory / USABLE / GIB
    with pytest.raises(InsufficientMemoryError) as refused:
        planned(available, **said)
    assert refused.value.hint.startswith("These would fit: ")
    for way in refused.value.hint.removeprefix("These would fit: ").split("; "):
        options = [each.partition(" ") for each in way.partition(" (")[0].removeprefix("--").split(" --")]
        changes = {option.replace("-", "_"): int(v) if v.isdigit() else v or True for option, _, v in options}
        assert planned(available, **(said | changes)).fits, way


def test_where_nothing_alone_would_do_things_together_or_a_smaller_model_are_said() -> None:
    with pytest.raises(InsufficientMemoryError) as refused:
        planned(0.05)
    assert "smaller model" in refused.value.hint


def test_max_memory_is_a_limit() -> None:
    needed = planned(100).memory / GIB
    with pytest.raises(InsufficientMemoryError):
        plan(
            config(max_memory=0.01, micro_batch_tokens=1024, recompute=False), BIG, STATS, device=CPU,
            dtype=torch.float32,
        )  # fmt: skip
    allowed = plan(
        config(max_memory=needed * 1.01, micro_batch_tokens=1024, recompute=False), BIG, STATS, device=CPU,
        dtype=torch.float32,
    )  # fmt: skip
    assert allowed.fits


def test_more_gpus_share_and_are_proposed() -> None:
    gpu = {"device": torch.device("cuda"), "compile": False, "micro_batch_tokens": 512, "batch_tokens": 4096}
    one = planned(100, **gpu)
    two = planned(100, world_size=2, **gpu)
    assert two.config.parallel == "ddp" and not two.sharded and two.memory > one.memory
    shared = planned(0.9 * one.memory / GIB, world_size=4, recompute=False, **gpu)
    assert shared.config.parallel == "fsdp" and shared.sharded and shared.memory < 0.9 * one.memory
    with pytest.raises(InsufficientMemoryError) as refused:
        planned(0.9 * one.memory / GIB, recompute=False, **gpu)
    assert "--gpus 2 --parallel fsdp (" in refused.value.hint
    cut = planned(100, tensor_parallel_size=2, gpus=2, **gpu)
    assert 0.5 < cut.parts["optimizer"] / one.parts["optimizer"] < 0.9  # embeddings and head are whole


def test_a_model_is_divided_while_it_is_loaded() -> None:
    large = replace(BIG, num_layers=64, hidden_size=2048, intermediate_size=4096)
    gpu = {"device": torch.device("cuda"), "micro_batch_tokens": 128, "tensor_parallel_size": 1}
    one = planned(1000, large, **gpu)
    many = planned(30, large, world_size=64, parallel="fsdp", gpus=64, **gpu)
    assert many.fits and many.memory < 0.5 * one.parts["weights"]
    kept = planned(1000, large, world_size=64, parallel="fsdp", gpus=64, **gpu)  # a fifth of the GPU holds it whole
    assert kept.parts["workspace"] - many.parts["workspace"] > 0.4 * one.parts["weights"]
    few = planned(30, large, world_size=64, parallel="fsdp", gpus=64, tuning="qlora", quantization="nf4", **gpu)
    alone = planned(1000, large, tuning="qlora", quantization="nf4", **gpu)
    assert few.parts["weights"] < alone.parts["weights"] / 60
    taught = planned(30, large, world_size=64, parallel="fsdp", gpus=64, teacher=large, **gpu)
    assert taught.parts["teacher"] < planned(1000, large, teacher=large, **gpu).parts["teacher"] / 4
    # a student of the teacher's layers is read block by block, too
    own = {"method": "distill", "distillation": {"teacher": "t"}, "model": None, "teacher": large}
    cut = planned(30, large, world_size=64, parallel="fsdp", gpus=64, **own, **gpu)
    assert cut.memory == pytest.approx(taught.memory, rel=0.01)


def test_a_teacher_takes_its_place() -> None:
    gpu = {"device": torch.device("cuda")}
    taught, alone = planned(100, teacher=LLAMA, **gpu), planned(100, **gpu)
    assert taught.memory - alone.memory == taught.parts["teacher"] > 0
    taught, alone = planned(100, teacher=LLAMA), planned(100)
    words = 4 * 615 * BIG.vocab_size
    assert taught.parts["loss"] > alone.parts["loss"] + words, "on a CPU its scores and what is compared have room"


def test_the_copy_that_writes_answers_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "Writer", lambda model, config: config)
    model = load_model(write_tiny_model(tmp_path / "model"), device="cpu", dtype="float32", quantization="none")
    shadow = answers.Shadow(model, torch.float32, max_length=80, room=80)
    keys_and_values: Any = shadow.writer
    held = sum(p.nbytes for p in shadow.copy.parameters()) + keys_and_values.kv_cache_memory
    assert answers.shadow_bytes(model.config, CPU, torch.float32, 80) == held
    given = {"method": "distill", "teacher": LLAMA, "micro_batch_tokens": 128}
    reads, writes = (planned(100, distillation={"teacher": "t", "on_policy": share}, **given) for share in (0.0, 0.5))
    assert writes.parts["writer"] == answers.shadow_bytes(BIG, CPU, torch.float32, 128 + 256)
    assert writes.memory == reads.memory + writes.parts["writer"]


def test_more_words_than_a_piece_do_not_take_more() -> None:
    few, many = (Load((n,), n) for n in (PIECE // 150_000, 2 * PIECE // 150_000))
    wide = replace(LLAMA, vocab_size=150_000, num_layers=2)
    options = setup(on_gpu=True, dtype=torch.bfloat16, lora=LoraOptions())
    first, second = (footprint(wide, options, load) for load in (few, many))
    logits = 2 * PIECE
    for found in (first, second):
        assert found.loss - found.forward < 1.2 * logits
    assert second.loss < first.loss + 2 * (second.activations - first.activations) + 0.3 * logits


def test_time_has_a_basis_and_a_plan_can_be_shown() -> None:
    found = planned(100, steps=50)
    assert found.num_tokens == 50 * 1024 and found.seconds == pytest.approx(51.2 + 50 * 0.01)
    names = [name for name, _ in found.rows()]
    assert {"weights", "memory", "micro_batch", "time", "rate", "basis"} <= set(names)
    told = found.as_dict()
    assert told["memory"] == found.memory and told["fits"] is True and told["basis"]
    smallest = planned(100, micro_batch_tokens=128)
    again = planned(0.99 * smallest.memory / USABLE / GIB, steps=50)
    assert again.config.recompute, "which was not known when it was timed"
    assert again.seconds == pytest.approx(4 / 3 * 51.2 + 50 * 0.01)


def test_blocks_are_measured_as_they_would_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Setup, Load]] = []

    def noted(shape: ModelConfig, setup: Setup, load: Load, device: torch.device, **more: Any) -> Pace:
        asked.append((setup, load))
        return Pace(1e-3, 0.01, "noted")

    monkeypatch.setattr(planning, "measured", noted)
    planned(100, recompute=True)
    planned(100, device=torch.device("cuda"), compile=None)
    (on_cpu, few), (on_gpu, whole) = asked
    assert (on_cpu.recompute, on_cpu.compiled, few.num_tokens) == (True, False, PROBE_TOKENS)
    assert (on_gpu.compiled, whole.num_tokens) == (True, 1024)
    assert whole.num_trained == 615, "of 100,000 tokens 60,000 are trained"
    assert whole.lengths[0] < whole.lengths[-1] and max(whole.lengths) <= STATS.longest, "sequences of all lengths"
    assert planned(100, device=torch.device("cuda"), timed=False).seconds is None


@pytest.mark.parametrize("mean", [10, 100, 170, 200, 256])
def test_no_sequence_that_is_timed_is_longer_than_the_longest(mean: int) -> None:
    """Learned positions end there."""
    stats = Stats(num_samples=1000, num_tokens=1000 * mean, num_trained=1000 * mean, longest=400)
    for micro in (256, 300, 500, 512, 1024):
        case = planning._Case(config(max_length=256, batch_tokens=micro), LLAMA, stats, MACHINE)
        lengths = case.usual(micro).lengths
        assert sum(lengths) == micro and min(lengths) > 0 and max(lengths) <= 256


def test_what_needs_more_room_than_there_is_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(planning, "measured", lambda *given, **more: asked.append(given) or Pace(1e-3, 0.01, "noted"))
    with pytest.raises(InsufficientMemoryError):
        planned(0.01)
    assert not asked
    on_policy = {"distillation": {"teacher": "t", "on_policy": 0.5}, "method": "distill"}
    assert planned(100, teacher=LLAMA, **on_policy).seconds is None, "nobody knows how long answers are"
    assert not asked


def test_a_teacher_is_timed_as_it_is_stored() -> None:
    """Without the student's adapters, whose targets it need not have."""
    adapters = planning._Case(
        config(tuning="qlora", lora={"targets": ("q_proj",)}, quantization="nf4"), LLAMA, STATS, MACHINE
    ).setup(64)
    neox = config_from_hf({"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", **SIZES})
    found = measured(LLAMA, replace(adapters, taught=Taught(neox, Divergence())), Load((32, 32), 40), CPU)
    assert 0 < found.token < 1


def test_a_pass_that_compiles_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Load] = []

    class Counted:
        def __init__(self, *given: Any) -> None:
            pass

        def passed(self, load: Load) -> Any:
            loads.append(load)
            return pace._Parts(100.0 if len(loads) == 1 else 1.0, 2.0, 0.0, 0.0)

    monkeypatch.setattr(pace, "_Probe", Counted)
    setup, load = planning._Case(config(compile=True), LLAMA, STATS, MACHINE).setup(640), Load((640,), 640)
    assert setup.compiled
    assert measured(LLAMA, setup, load, CPU).token == pytest.approx((LLAMA.num_layers / 2 + 1) / 640)
    assert set(loads) == {load}


def test_each_kind_of_block_is_timed() -> None:
    six = replace(GEMMA, num_layers=12, layer_types=(("sliding",) * 5 + ("full",)) * 2)
    assert pace.few_blocks(six, CPU).num_layers == memory.period(six) == 6
    assert pace.few_blocks(LLAMA, CPU).num_layers == 2
    assert pace.few_blocks(replace(LLAMA, num_layers=1), CPU).num_layers == 1


def test_a_teacher_and_each_layer_take_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts what is asked of the machine."""
    clock = itertools.count()
    monkeypatch.setattr(pace, "_clock", lambda device: lambda: float(next(clock)))
    setup, load = planning._Case(config(), LLAMA, STATS, MACHINE).setup(64), Load((32, 32), 40)
    deep = measured(LLAMA, setup, load, CPU)
    # a pass counts one for its blocks, and the loss one more for all
    assert deep.token == pytest.approx(LLAMA.num_layers * 0.5 / 64)
    assert measured(LLAMA, setup, load, CPU, parts=2).token == pytest.approx(deep.token / 2)
    taught = measured(LLAMA, replace(setup, taught=Taught(LLAMA, Divergence())), load, CPU)
    assert taught.token == pytest.approx(2 * deep.token)
    long = Load((640,), 400)
    assert measured(LLAMA, setup, long, CPU).token == pytest.approx(deep.token * 64 / 640)
    monkeypatch.setattr(pace, "LONG", 19)  # a little pass says that a whole one would take 20
    assert measured(LLAMA, setup, long, CPU).token == pytest.approx(deep.token)


def test_a_gpu_that_somebody_fills_meanwhile_leaves_the_time_unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **more: Any) -> Pace:
        raise torch.OutOfMemoryError("taken")

    monkeypatch.setattr(planning, "measured", full)
    found = planned(100, device=torch.device("cuda"))
    assert found.fits and found.seconds is None and "time" not in dict(found.rows())


def test_a_measured_time_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    drawn = torch.get_rng_state()
    found = planned(100, LLAMA, tuning="lora")
    assert found.seconds is not None and 0 < found.seconds < 3600
    assert "measured" in found.basis
    assert torch.equal(torch.get_rng_state(), drawn)


def test_casts_that_are_no_blocks_are_not_timed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    cast = Trainee.casts

    def casts(self: Trainee, within: str = "") -> dict[str, Tensor]:
        found = cast(self, within)
        events.append(set(found))
        return found

    monkeypatch.setattr(Trainee, "casts", casts)
    monkeypatch.setattr(pace, "_clock", lambda device: lambda: events.append("clock") or 0.0)
    probe = pace._Probe(pace.few_blocks(LLAMA, CPU), setup(dtype=torch.bfloat16), Load((8, 8), 12), CPU)
    probe.passed(Load((8, 8), 12))
    start, end = [i for i, event in enumerate(events) if event == "clock"][:2]
    [blocks] = events[start + 1 : end]
    assert blocks and all(name.startswith("layers.") for name in blocks)
    assert any(not name.startswith("layers.") for name in events[0]) and events[0] > blocks


def test_every_field_of_a_footprint_is_on_the_line() -> None:
    num = len(fields(memory.Footprint))
    low, high, there = (memory.Footprint(*range(first, first + num)) for first in (1, 2, 4))
    assert low.at(1, high, 2, 4) == there


def test_a_block_alone_has_the_layers_kind() -> None:
    assert memory.period(GEMMA) == 2 and memory.period(LLAMA) == 1
    one = memory.of_layer(GEMMA, 1)
    assert one.num_layers == 1 and one.is_sliding(0) == GEMMA.is_sliding(1) != GEMMA.is_sliding(0)
    assert isinstance(memory.build(one, setup()).module.layers[0].attn.qkv, nn.Linear)
