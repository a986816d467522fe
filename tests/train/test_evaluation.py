"""Evaluations in a run: what they measure, what the model says, and that training does not notice."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmasos.data import IGNORED, Batches
from llmasos.errors import InvalidInputError
from llmasos.inference.llm import LLM
from llmasos.models.attention import Varlen, layer_specs
from llmasos.models.load import LoadedModel, load_model
from llmasos.train.evaluate import ByteCounts, Evaluator, evaluation_tokens, prompts_of, undisturbed
from llmasos.train.events import Evaluation, Listener, StepReport
from llmasos.train.loop import Loop, LoopOptions
from llmasos.train.lora import LoraOptions, add_lora
from llmasos.train.methods.base import NextToken
from llmasos.train.model import Trainee
from llmasos.train.optim import OptimizerOptions
from llmasos.train.schedule import Schedule
from tiny import write_tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "model")
    rows = [{"text": f"Row {i}: the quick 棕色 fox number {i * 7 % 13} jumps over dog {i % 5}."} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return tmp_path


def model_of(world: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(world / "model", device="cpu", dtype=dtype)


def batches(
    world: Path, model: LoadedModel, *, file: str = "data.jsonl", split: str = "validation", **more: int
) -> Batches:
    assert model.tokenizer is not None
    options = {"max_length": 64, "batch_tokens": 128, "validation": 0.3, "shuffle": split == "train"} | more
    return Batches(world / file, model.tokenizer, split=split, **options)  # type: ignore[arg-type]


def evaluator(world: Path, model: LoadedModel, held_out: Batches | None, **options: object) -> Evaluator:
    assert model.tokenizer is not None
    trainee = Trainee(model.module, dtype=torch.float32)
    return Evaluator(trainee, held_out, model.tokenizer, **options)  # type: ignore[arg-type]


class Kept(Listener):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.evaluations: list[Evaluation] = []

    def stepped(self, report: StepReport) -> None:
        self.losses.append(report.loss)

    def evaluated(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at weights that are casts
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_run_that_is_evaluated_at_every_step_is_the_one_that_never_is(world: Path, is_compiled: bool) -> None:
    """Bit for bit; the adapter's dropout draws random numbers and depends on the mode. Nothing is compiled for it."""
    compiled: list[str] = []

    def run(name: str, every: int) -> tuple[Kept, dict[str, torch.Tensor]]:
        def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
            compiled.append(name)
            return graph.forward

        torch.manual_seed(0)
        model = model_of(world)
        add_lora(model, LoraOptions(r=4, dropout=0.2))
        trainee = Trainee(model.module, dtype=torch.float32)
        if is_compiled:
            torch.compiler.reset()
            model.module.layers[1].mlp.compile(backend=backend, dynamic=True)  # a part: tracing takes time
        assert model.tokenizer is not None
        held_out = batches(world, model)
        kept = Kept()
        loop = Loop(
            NextToken(model, trainee),
            batches(world, model, split="train", epochs=50),
            OptimizerOptions(lr=1e-2),
            Schedule(),
            LoopOptions(steps=3, evaluate_every=every),
            world / name,
            CPU,
            [kept],
            Evaluator(trainee, held_out, model.tokenizer, prompts=["Row"], new_tokens=4) if every else None,
        )
        assert loop.train() == "finished"
        weights = {n: p.detach().clone() for n, p in model.module.named_parameters() if p.requires_grad}
        return kept, weights

    (seen, with_), (unseen, without) = run("a", 1), run("b", 0)
    assert [one.step for one in seen.evaluations] == [0, 1, 2, 3] and not unseen.evaluations
    assert seen.losses == unseen.losses
    assert compiled.count("a") == compiled.count("b") and bool(compiled) == is_compiled
    assert with_ and all(torch.equal(tensor, without[name]) for name, tensor in with_.items())
    assert seen.evaluations[-1].loss < seen.evaluations[0].loss


def test_loss_and_bits_per_byte_are_what_their_definitions_say(world: Path) -> None:
    model = model_of(world)
    assert model.tokenizer is not None
    held_out = batches(world, model)
    found = evaluator(world, model, held_out)(7)
    nats, num_tokens, num_bytes = 0.0, 0, 0
    held_out.reset()
    for batch in held_out:
        attend = Varlen(layer_specs(model.config), batch.lengths)
        with torch.no_grad():
            logits = model.module.logits(model.module(batch.tokens, batch.positions, attend))
        nats += float(F.cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction="sum"))
        for tokens in batch.tokens.split(batch.lengths):
            num_tokens += len(tokens) - 1
            first = model.tokenizer.decode(tokens[:1].tolist())
            num_bytes += len(model.tokenizer.decode(tokens.tolist()).encode()) - len(first.encode())
    assert found.step == 7 and found.num_tokens == num_tokens > 100
    assert found.loss == pytest.approx(nats / num_tokens, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_bytes_are_those_of_the_text_and_special_tokens_have_none(world: Path) -> None:
    tokenizer = model_of(world).tokenizer
    assert tokenizer is not None and tokenizer.eos_token_id is not None
    count, text = ByteCounts(tokenizer), "敏捷的 fox é"
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert count(torch.tensor(ids)) == len(text.encode())
    assert count(torch.tensor([*ids, tokenizer.vocab_size + 3])) == len(text.encode())


@pytest.mark.parametrize("chat", [False, True])
def test_the_model_says_what_the_engine_would(world: Path, chat: bool) -> None:
    prompts = ["What is the capital?", "Row", "敏捷"]
    found = evaluator(world, model_of(world), None, prompts=prompts, chat=chat, new_tokens=12)(0)
    assert math.isnan(found.loss) and found.bits_per_byte is None and found.num_tokens == 0
    with LLM(model_of(world), name="tiny") as llm:
        ask = llm.chat if chat else llm.generate
        said = [ask(prompt, max_tokens=12, temperature=0.0) for prompt in prompts]
    assert [sample.prompt for sample in found.samples] == prompts
    assert [sample.text for sample in found.samples] == said


def test_an_answer_ends_with_the_context(world: Path) -> None:
    found = evaluator(world, model_of(world), None, prompts=["a"], chat=False, new_tokens=1000)(0)
    with LLM(model_of(world), name="tiny") as llm:
        assert found.samples[0].text == llm.generate("a", max_tokens=255, temperature=0.0)


def test_prompts_come_from_the_held_out_part_where_nobody_asks(world: Path) -> None:
    model = model_of(world)
    assert model.tokenizer is not None
    chats = prompts_of(batches(world, model, file="chats.jsonl"), model.tokenizer, 2, 100)
    assert [text[:8] for text, _ in chats] == ["What is "] * 2
    assert all(model.tokenizer.decode(ids, skip_special_tokens=False).endswith("<|assistant|>") for _, ids in chats)
    texts = prompts_of(batches(world, model), model.tokenizer, 2, 100)
    assert all(text.startswith("Row") and len(ids) == 16 for text, ids in texts)
    second = batches(world, model, rank=1, world_size=2)
    assert prompts_of(second, model.tokenizer, 2, 100) == texts and second.rank == 1
    assert not prompts_of(batches(world, model), model.tokenizer, 2, 3)


@pytest.mark.parametrize(
    ("prompt", "said"), [("", "empty"), ("the fox " * 400, "context holds 255")], ids=["empty", "long"]
)
def test_a_prompt_that_cannot_be_asked_is_refused_before_the_run(world: Path, prompt: str, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        evaluator(world, model_of(world), None, prompts=[prompt], chat=False)


def test_ranks_measure_together_what_one_measures_alone(world: Path) -> None:
    alone = evaluator(world, model_of(world), batches(world, model_of(world)))(0)
    sums: list[torch.Tensor] = []

    def keep(one: torch.Tensor) -> torch.Tensor:
        sums.append(one)
        return one

    for rank in range(2):
        model = model_of(world)
        evaluator(world, model, batches(world, model, rank=rank, world_size=2), total=keep)(0)
    nats, tokens, num_bytes = (sums[0] + sums[1]).tolist()
    assert tokens == alone.num_tokens
    assert nats / tokens == pytest.approx(alone.loss, rel=1e-6)
    assert nats / math.log(2) / num_bytes == pytest.approx(alone.bits_per_byte, rel=1e-6)


def test_a_limit_reads_some_of_the_batches_from_the_first_to_the_last(world: Path) -> None:
    model = model_of(world)
    held_out = batches(world, model)
    whole, some = evaluator(world, model, held_out)(0), evaluator(world, model, held_out, max_tokens=256)(0)
    assert 0 < some.num_tokens < 0.6 * whole.num_tokens
    assert evaluator(world, model, held_out, max_tokens=1)(0).num_tokens > 0
    assert evaluator(world, model, held_out, max_tokens=256)(0).loss == some.loss
    # ten evaluations at a third of the cost of a trained token
    assert 10 * evaluation_tokens(100, 1000, 10) / 3 == pytest.approx(0.1 * 100 * 1000)
    assert evaluation_tokens(300, 1000, 10) == evaluation_tokens(100, 1000, 10), "a longer run measures the same"
    assert evaluation_tokens(100, 1000, 0) == 15_000 and evaluation_tokens(1, 1, 1) == 1


def test_random_numbers_and_modes_are_as_they_were(world: Path) -> None:
    module = model_of(world).module.train()
    module.layers[0].eval()
    modes = [one.training for one in module.modules()]

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with pytest.raises(ZeroDivisionError), undisturbed(module):
        draw()
        assert not any(one.training for one in module.modules()) and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert draw() == expected and torch.is_grad_enabled()
    assert [one.training for one in module.modules()] == modes
