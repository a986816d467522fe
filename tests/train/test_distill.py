"""Students: made of their teacher's layers, learning more from it than from the same data alone; answers that models
write; what cannot be learnt is said."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmasos.data import Batches, Totals
from llmasos.errors import FormatError, InvalidInputError, UnsupportedError
from llmasos.models import load as loading
from llmasos.models.attention import Varlen, layer_specs
from llmasos.models.config import ModelConfig
from llmasos.models.decoder import Decoder
from llmasos.models.families import config_from_hf
from llmasos.models.load import LoadedModel, load_model
from llmasos.text import load_tokenizer
from llmasos.train import answers as answers_module
from llmasos.train.answers import Answer, Answered, Prompts, Shadow, _finish, plain_weights, teacher_answers
from llmasos.train.config import Distillation, TrainConfig
from llmasos.train.events import Listener, StepReport
from llmasos.train.lora import LoraOptions, add_lora
from llmasos.train.methods import method_of
from llmasos.train.methods.distill import Distill, Distiller, prompts_of
from llmasos.train.model import Placed, Trainee
from llmasos.train.parallel import Ranks, Spreader
from llmasos.train.run import prepare, resume, train
from llmasos.train.students import check_vocabulary, kept_layers, student_config
from tiny import TINY_LLAMA, write_tiny_model

CPU = torch.device("cpu")
V, T, NUM = 64, 32, 32
"""Words, tokens of a sequence, sequences of the synthetic data."""


# --- learning


def random_model(seed: int, *, std: float, **sizes: int) -> LoadedModel:
    config = config_from_hf({**TINY_LLAMA, "vocab_size": V, "tie_word_embeddings": False, **sizes})
    module = Decoder(config)
    draw = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, std, generator=draw)
    return LoadedModel(module.requires_grad_(False), config, None, Path("random"))


def forward(module: Decoder, tokens: Tensor) -> Tensor:
    """Logits [N, T, V] of sequences [N, T]."""
    num, length = tokens.shape
    attend = Varlen(layer_specs(module.config), [length] * num)
    hidden = module(tokens.flatten(), torch.arange(length).repeat(num), attend)
    return module.logits(hidden).view(num, length, -1)


def sampled(teacher: LoadedModel, num: int, seed: int) -> Tensor:
    """What the teacher says, [num, T]."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (num, 1), generator=draw)
    with torch.no_grad():
        while tokens.shape[1] < T:
            chances = forward(teacher.module, tokens)[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=draw)], 1)
    return tokens


def placed(tokens: Tensor) -> Placed:
    num, length = tokens.shape
    rows = torch.arange(num * length).view(num, length)[:, :-1].flatten()
    positions = torch.arange(length).repeat(num)
    return Placed(tokens.flatten(), positions, rows, tokens[:, 1:].flatten(), [length] * num)


def distiller(teacher: LoadedModel, student: LoadedModel, **options: Any) -> Distiller:
    student.module.requires_grad_()
    trainee = Trainee(student.module, dtype=torch.float32)
    asked = Trainee(teacher.module, dtype=torch.float32)
    return Distiller(student, trainee, asked, Distillation(**options), room=256)


def held_out_losses(teacher: LoadedModel, data: Placed, unseen: Placed, **options: Any) -> list[float]:
    """Of a small student while it learns from a little data of the teacher."""
    torch.manual_seed(0)
    student = random_model(1, std=0.1, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    learner = distiller(teacher, student, **options)
    optimizer = torch.optim.AdamW(student.module.parameters(), lr=5e-3)
    found = []
    for _ in range(3):
        for _ in range(10):
            optimizer.zero_grad()
            (learner.loss(data) / len(data)).backward()
            optimizer.step()
        with torch.no_grad():
            found.append(float(learner.trainee.loss(unseen)) / len(unseen))
    return found


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return random_model(0, std=0.25)


def test_a_student_learns_more_from_its_teacher_than_from_the_same_data_and_steps(teacher: LoadedModel) -> None:
    """Held-out cross-entropy, by every divergence: at the end, and than plain training has at its best."""
    data, unseen = placed(sampled(teacher, NUM, seed=1)), placed(sampled(teacher, NUM, seed=2))
    with torch.no_grad():
        best = float(Trainee(teacher.module, dtype=torch.float32).loss(unseen)) / len(unseen)
    plain = held_out_losses(teacher, data, unseen, weight=0.0)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        found = held_out_losses(teacher, data, unseen, weight=1.0, divergence=kind)
        assert best < found[-1] < plain[-1] - 0.2, (kind, best, found, plain)
        assert found[-1] < min(math.log(V), *plain) - 0.03, (kind, found, plain)


def test_the_loss_is_the_plain_formula_of_both_models_and_its_parts_are_told(teacher: LoadedModel) -> None:
    student = random_model(3, std=0.2)
    options = {"weight": 0.7, "temperature": 2.0, "hidden_weight": 0.5}
    learner = distiller(teacher, student, **options)
    tokens = sampled(teacher, 3, seed=5)
    batch = placed(tokens)
    loss = learner.loss(batch)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in student.module.named_parameters() if p.grad is not None}
    student.module.zero_grad()
    q, p = (forward(m.module, tokens)[:, :-1].flatten(0, 1) for m in (student, teacher))
    ce = F.cross_entropy(q, batch.labels, reduction="sum")
    kl = F.kl_div((q / 2).log_softmax(-1), (p / 2).log_softmax(-1), reduction="sum", log_target=True) * 4
    states = []
    for model in (student, teacher):
        attend = Varlen(layer_specs(model.config), batch.lengths)
        states.append(model.module(batch.tokens, batch.positions, attend)[batch.rows])
    distance = (1 - F.cosine_similarity(*states, dim=-1)).sum()
    expected = 0.3 * ce + 0.7 * kl + 0.5 * distance
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    expected.backward()
    for name, parameter in student.module.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)
    parts = learner.parts()
    for name, value in {"cross_entropy": ce, "divergence": kl, "hidden": distance}.items():
        torch.testing.assert_close(parts[name], value.detach(), rtol=1e-5, atol=1e-5)
    assert not any(learner.parts().values()) and all(p.grad is None for p in teacher.module.parameters())


# --- the student's own answers


def chatty(tokens: list[list[int]], trained: list[list[bool]]) -> Placed:
    """Sequences; `trained` says which of their tokens are."""
    flat = [t for one in tokens for t in one]
    rows, labels, begin = [], [], 0
    for ids, learnt in zip(tokens, trained, strict=True):
        for at in range(1, len(ids)):
            if learnt[at]:
                rows.append(begin + at - 1)
                labels.append(ids[at])
        begin += len(ids)
    positions = [at for one in tokens for at in range(len(one))]
    return Placed(*(torch.tensor(x) for x in (flat, positions, rows, labels)), [len(one) for one in tokens])


def test_prompts_are_what_stands_before_the_last_answer() -> None:
    yes, no = True, False
    batch = chatty(
        [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14], [15, 16]],
        [[no, no, yes, yes, no, yes, yes], [no, no, no], [yes, yes, yes, yes], [no, yes]],
    )
    assert prompts_of(batch, room=100, max_new_tokens=4, context=64) == [[1, 2, 3, 4, 5], [11], [15]]
    assert prompts_of(batch, room=14, max_new_tokens=4, context=64) == [[1, 2, 3, 4, 5], [11]]
    assert prompts_of(batch, room=1, max_new_tokens=4, context=64) == [[1, 2, 3, 4, 5]]
    assert prompts_of(batch, room=100, max_new_tokens=4, context=4) == [[11], [15]]


def test_the_engine_writes_with_the_weights_of_now_and_the_loss_is_of_what_it_wrote(teacher: LoadedModel) -> None:
    student = random_model(3, std=0.2)
    learner = distiller(teacher, student, on_policy=1.0, max_new_tokens=5, weight=0.2)
    batch = chatty([[1, 2, 3, 4], [5, 6, 7]], [[False, False, True, True], [False, True, True]])
    for _ in range(2):
        own = learner.own_answers(batch, seed=7)
        assert own.lengths == [2 + 4, 1 + 4] and len(own) == 10 and own.positions.tolist() == [*range(6), *range(5)]
        assert own.tokens[:2].tolist() == [1, 2] and own.tokens[6].tolist() == 5
        # each label is the next token, and one that the student of now finds likely: sampled, not by chance
        assert own.tokens[own.rows[:4] + 1].tolist() == own.labels[:4].tolist()
        assert torch.equal(learner.own_answers(batch, seed=7).labels, own.labels)
        with torch.no_grad():
            student.module.head.weight.mul_(40)  # as good as greedy now
    with torch.no_grad():
        first = forward(student.module, own.tokens[:6][None])[0].argmax(-1)
    assert own.labels[:5].tolist() == first[1:].tolist()
    learner.step = 4
    loss = learner.loss(batch)
    draw = random.Random("0 4 0")
    draw.random()
    again = learner.own_answers(batch, seed=draw.randrange(2**31))
    q, p = (forward(m.module, again.tokens[:6][None])[0][1:] for m in (student, teacher))
    q2, p2 = (forward(m.module, again.tokens[6:][None])[0] for m in (student, teacher))
    kl = F.kl_div(
        torch.cat([q, q2]).log_softmax(-1), torch.cat([p, p2]).log_softmax(-1), reduction="sum", log_target=True
    )
    torch.testing.assert_close(loss, kl * len(batch) / 10, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(learner.parts()["on_policy"], loss.detach())


def test_steps_draw_their_own_answers_by_seed_and_number_and_tell_the_same_parts(teacher: LoadedModel) -> None:
    """So do processes that read other batches, and a run that goes on."""
    chats = [chatty([[1, 2, 3, 4]], [[False, False, True, True]]), chatty([[5, 6, 7]], [[False, True, True]])]

    def drawn(batch: Placed, steps: Sequence[int], **more: Any) -> list[tuple[bool, ...]]:
        learner = distiller(teacher, random_model(3, std=0.2), on_policy=0.5, max_new_tokens=3, **more)
        found = []
        for step in steps:
            learner.step = step
            for _ in range(2):
                learner.loss(batch)
                torch.rand(3)  # dropout
            parts = learner.parts()
            assert list(parts) == ["cross_entropy", "divergence", "on_policy"]
            found.append(tuple(bool(part) for part in parts.values()))
        return found

    first, second = (drawn(chat, range(6)) for chat in chats)
    assert first == second and drawn(chats[0], range(3, 6)) == first[3:]
    assert len(set(first)) > 1  # some steps have some


def test_a_shadow_of_an_adapter_has_it_folded_in(tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path / "tiny"), device="cpu", dtype="float32")
    add_lora(model, LoraOptions(r=4))
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if name.endswith(".b"):
                parameter.normal_(0.0, 0.3)
    shadow = Shadow(model, torch.float32, max_length=32, room=64)
    shadow.refresh()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(forward(shadow.copy, ids), forward(model.module, ids), rtol=1e-4, atol=1e-4)
    assert dict(plain_weights(model.module)).keys() == shadow.copy.state_dict().keys()


def test_a_student_that_is_spread_over_processes_cannot_write() -> None:
    student = random_model(3, std=0.2)
    student.module.layers[0].attn.num_heads //= 2  # as tensor parallelism leaves it
    with pytest.raises(UnsupportedError, match="spread over processes") as caught:
        Shadow(student, torch.float32, max_length=32, room=64)
    assert "--parallel ddp" in caught.value.hint


# --- students of a teacher's layers


def test_layers_are_spread_evenly_or_named() -> None:
    assert (
        kept_layers(30, 15)[:3] == (0, 2, 4) and kept_layers(30, 15)[-1] == 29 and len(set(kept_layers(30, 15))) == 15
    )
    assert kept_layers(6, 3) == (0, 2, 5) and kept_layers(4, 1) == (0,) and kept_layers(4, 4) == (0, 1, 2, 3)
    assert kept_layers(8, (0, 3, 7)) == (0, 3, 7)
    for keep, what in (
        (0, "0 layers"),
        (9, "9 layers"),
        ((0, 8), "has 8"),
        ((3, 1), "order"),
        ((1, 1), "order"),
        ((), "are not all"),
    ):
        with pytest.raises(InvalidInputError, match=what):
            kept_layers(8, keep)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "no_rope_layers": [1, 0, 1, 0]},
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
        {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 256,
        },
    ],
)
def test_a_student_computes_with_the_teachers_layers_and_survives_its_config_json(
    changes: dict[str, object], tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "teacher", **{"num_hidden_layers": 4, **changes})
    teacher = load_model(folder, device="cpu", dtype="float32")
    student = load_model(folder, device="cpu", dtype="float32", layers=(0, 1, 3))
    assert student.config == student_config(teacher.config, (0, 1, 3))
    ids = torch.arange(24)[None]
    attend = Varlen(layer_specs(teacher.config), [24])
    with torch.no_grad():
        # the teacher without its layer 2: a pass that leaves it out
        blocks = teacher.module.layers
        x, positions = teacher.module.embed_tokens(ids[0], torch.arange(24)), torch.arange(24)
        for at in (0, 1, 3):
            is_sliding = teacher.config.is_sliding(at)
            rope = teacher.module.ropes[is_sliding]
            has_rope = teacher.config.position == "rope"
            tables = rope.tables(positions, torch.float32, None) if has_rope else None
            x = blocks[at](x, rope, tables, attend)
        expected = teacher.module.logits(teacher.module.final_norm(x))
        torch.testing.assert_close(forward(student.module, ids)[0], expected, rtol=1e-5, atol=1e-5)
    student.save_pretrained(tmp_path / "student")
    again = load_model(tmp_path / "student", device="cpu", dtype="float32")
    assert again.config.num_layers == 3
    with torch.no_grad():
        torch.testing.assert_close(forward(again.module, ids)[0], expected, rtol=1e-5, atol=1e-5)
        student.module.layers[0].attn.qkv.weight += 1  # of its own: the teacher stays
        assert not torch.equal(student.module.layers[0].attn.qkv.weight, blocks[0].attn.qkv.weight)


def test_layers_that_a_config_json_cannot_tell_apart_are_refused_before_training() -> None:
    hf = {
        **TINY_LLAMA,
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        "vocab_size": 100,
        "num_hidden_layers": 4,
    }
    plain: ModelConfig = config_from_hf(hf)
    assert student_config(plain, (0, 3)).num_layers == 2
    mixed = config_from_hf({**hf, "sliding_window": 8})
    mixed = replace(mixed, layer_types=("full", "sliding", "full", "sliding"))
    with pytest.raises(UnsupportedError, match="layer_types would change") as caught:
        student_config(mixed, (0, 1))
    assert "take turns" in caught.value.hint
    sizes = {"n_embd": 8, "n_layer": 4, "n_head": 2, "n_positions": 16, "vocab_size": 100}
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **sizes}
    numbered: ModelConfig = config_from_hf({**gpt2, "scale_attn_by_inverse_layer_idx": True})
    assert student_config(numbered, (0, 1)).num_layers == 2
    with pytest.raises(UnsupportedError, match="divides the scores") as caught:
        student_config(numbered, (0, 3))
    assert (caught.value.param, caught.value.hint) == ("distillation.keep_layers", "Take the first ones: 0,1.")


def test_vocabularies_must_be_the_same_tokens(tmp_path: Path) -> None:
    one, two = (write_tiny_model(tmp_path / name) for name in ("one", "two"))
    tokenizer, config = load_tokenizer(one), load_model(one, device="cpu").config
    check_vocabulary(tokenizer, load_tokenizer(two), config)
    text = (two / "tokenizer.json").read_text().replace('"<|user|>"', '"<|person|>"')
    (two / "tokenizer.json").write_text(text)
    with pytest.raises(UnsupportedError, match=r"token 3 is '<\|user\|>' to the student and '<\|person\|>'"):
        check_vocabulary(tokenizer, load_tokenizer(two), config)
    with pytest.raises(UnsupportedError, match="the teacher knows 100 tokens"):
        check_vocabulary(tokenizer, tokenizer, replace(config, vocab_size=100))


# --- runs


def chats(path: Path, num: int = 40) -> Path:
    rows = (
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(num)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Of a run with a random teacher of three layers."""
    write_tiny_model(tmp_path / "teacher", num_hidden_layers=3)
    return {
        "method": "distill",
        "data": [str(chats(tmp_path / "chats.jsonl"))],
        "distillation": {"teacher": str(tmp_path / "teacher"), "keep_layers": 2},
        "max_length": 64,
        "batch_tokens": 128,
        "micro_batch_tokens": 64,
        "lr": 1e-2,
        "device": "cpu",
        "dtype": "float32",
        "install": False,
        "validation": 0.0,
    }


class Killed(BaseException):
    pass


class Kill(Listener):
    def stepped(self, report: StepReport) -> None:
        if report.step == 3:
            raise Killed


def test_a_run_makes_a_student_that_loads_and_goes_on_bit_for_bit_while_it_writes_its_own_answers(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options["distillation"] |= {"on_policy": 0.5, "max_new_tokens": 6, "divergence": "jsd", "hidden_weight": 0.1}
    more = {"steps": 6, "save_every": 2}
    whole = train(TrainConfig.of(name="whole", **options, **more))
    steps = [json.loads(line) for line in (whole.folder / "log.jsonl").read_text().splitlines()]
    assert any("on_policy" in step["parts"] for step in steps) and any("hidden" in step["parts"] for step in steps)
    assert all(math.isfinite(step["loss"]) for step in steps)
    with pytest.raises(Killed):
        train(TrainConfig.of(name="cut", **options, **more), listeners=[Kill()])
    torch.manual_seed(99)
    cut = resume("cut")
    assert whole.exported is not None and cut.exported is not None and cut.step == 6
    assert whole.exported.model is not None and cut.exported.model is not None
    one, two = (load_model(r.exported.model, device="cpu", dtype="float32") for r in (whole, cut))  # type: ignore
    assert one.config.num_layers == 2 and one.tokenizer is not None
    assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True))


@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_an_adapter_of_a_made_student_is_exported_as_a_whole_model(options: dict[str, Any], tuning: str) -> None:
    result = train(TrainConfig.of(name="adapted", tuning=tuning, steps=2, lora={"r": 4}, **options))
    assert result.exported is not None and result.exported.model is not None
    assert load_model(result.exported.model, device="cpu", dtype="float32").config.num_layers == 2


def test_wrong_options_are_said_before_anything_is_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    teacher = options["distillation"]["teacher"]
    wide = str(write_tiny_model(tmp_path / "wide", hidden_size=64))
    for changes, what in (
        ({"distillation": {}}, "needs a teacher"),
        ({"distillation": {"teacher": teacher}}, "There is no student"),
        ({"model": teacher}, "the student is a model of its own"),
        ({"distillation": {"teacher": teacher, "keep_layers": 4}}, "4 layers cannot be kept of 3"),
        ({"distillation": {"teacher": teacher, "hidden_weight": 1.0}, "model": wide}, "64 numbers in the student, 32"),
        ({"distillation": {"teacher": teacher, "keep_layers": 2, "beta": 1.0}}, "beta"),
        ({"distillation": {"teacher": teacher, "keep_layers": 2, "temperature": 0}}, "temperature"),
    ):
        with pytest.raises(InvalidInputError, match=what):
            train(TrainConfig.of(name="wrong", steps=1, **{**options, **changes}))


# --- a teacher's answers


def counting_teacher(path: Path, data: Path) -> Path:
    """A tiny model that was taught the chats, so that its answers end."""
    made = train(
        TrainConfig.of(
            name=path.name,
            model=str(write_tiny_model(path / "before")),
            data=[str(data)],
            tuning="full",
            steps=40,
            lr=1e-2,
            max_length=64,
            batch_tokens=256,
            device="cpu",
            dtype="float32",
            install=False,
            validation=0.0,
        )
    )
    assert made.exported is not None and made.exported.model is not None
    return made.exported.model


def test_a_teachers_answers_are_written_once_go_on_after_a_kill_and_are_learnt(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    data = Path(options["data"][0])
    teacher = counting_teacher(tmp_path / "taught", data)
    monkeypatch.setattr(answers_module, "BATCH", 8)
    write: Callable[..., Any] = answers_module.Writer.write
    calls: list[int] = []

    def counted(self: Any, prompts: Any, **how: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise Killed
        return write(self, prompts, **how)

    monkeypatch.setattr(answers_module.Writer, "write", counted)
    prompts = Prompts([str(data)])

    def ask() -> Path:
        return teacher_answers(teacher, prompts, max_new_tokens=24, device="cpu", dtype="float32")

    with pytest.raises(Killed):
        ask()
    [part] = (home / "cache" / "answers").glob("*.part")
    part.write_bytes(part.read_bytes() + b'{"messages": [{"ro')  # a line that was cut
    file = ask()
    assert calls == [8, 8, 8, 8, 8, 8] and not part.exists()
    assert ask() == file and len(calls) == 6
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    asked = [row["messages"][0]["content"] for row in rows]
    assert 20 < len(rows) <= 40 and asked == sorted(asked, key=lambda q: int(q.split()[2].rstrip("?")))
    assert all(row["messages"][1]["content"].startswith("It is") for row in rows)
    options["distillation"] |= {"teacher": str(teacher), "sequence": True, "max_new_tokens": 24, "weight": 0.0}
    result = train(TrainConfig.of(name="sequence", steps=2, **options))
    assert result.step == 2 and len(calls) == 6  # the cached answers
    facts = json.loads((result.folder / "log.jsonl").read_text().splitlines()[-1])
    assert facts["parts"] is None  # nobody asked the teacher during training
    read = Distill(TrainConfig.of(name="sequence", output=result.folder, **options)).reading(TrainConfig.of(**options))
    assert read.data == (str(file),)
    batches = Batches(list(read.data), load_tokenizer(teacher), max_length=64)
    assert batches.prepare().num_samples == len(rows)


def test_a_teacher_that_never_ends_or_has_no_prompts_is_said(tmp_path: Path) -> None:
    teacher, data = write_tiny_model(tmp_path / "teacher"), chats(tmp_path / "chats.jsonl", 3)

    def ask(file: Path) -> Path:
        return teacher_answers(teacher, Prompts([str(file)]), max_new_tokens=2, device="cpu", dtype="float32")

    with pytest.raises(FormatError, match="no whole answer to any of 3 prompts in 2 tokens"):
        ask(data)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "Once upon a time."}\n')
    with pytest.raises(UnsupportedError, match="answers prompts, and this is text data"):
        ask(texts)
    with pytest.raises(InvalidInputError, match=r"answers every prompt once, and .* has a weight"):
        ask(Path(f"{data}=0.5"))


def test_a_run_is_told_how_far_its_teacher_is(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "BATCH", 16)
    monkeypatch.setattr(
        answers_module.Writer, "write", lambda self, prompts, **how: [Answer([40, 41], True) for _ in prompts]
    )
    options["distillation"] |= {"sequence": True, "weight": 0.0}
    told: list[tuple[str, int]] = []

    def hear(name: str, totals: Totals) -> None:
        if isinstance(totals, Answered):
            told.append((name, totals.num_rows))

    prepare(TrainConfig.of(name="x", output=tmp_path / "x", steps=2, **options), on_progress=hear)
    teacher = Path(options["distillation"]["teacher"]).name
    num = len(Path(options["data"][0]).read_text().splitlines())
    assert told == [(teacher, n) for n in (*range(16, num, 16), num)]


def test_answers_to_other_columns_are_other_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, data = write_tiny_model(tmp_path / "teacher"), tmp_path / "rows.jsonl"
    data.write_text('{"a": "What is 1?", "b": "What is 2?", "c": "It is so."}\n')
    monkeypatch.setattr(answers_module.Writer, "write", lambda self, prompts, **how: [Answer([40, 41], True)])
    files = [
        teacher_answers(
            teacher,
            Prompts([str(data)], columns={"prompt": name, "completion": "c"}),
            max_new_tokens=4,
            device="cpu",
            dtype="float32",
        )
        for name in ("a", "b")
    ]
    asked = [json.loads(file.read_text())["messages"][0]["content"] for file in files]
    assert asked == ["What is 1?", "What is 2?"]


def test_line_separators_in_answers_are_part_of_them(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": text} for text in ("one\u2028two", "three\x85four", "five\u2029")]
    part, final = tmp_path / "answers.jsonl.part", tmp_path / "answers.jsonl"
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    _finish(part, final, 8)
    with final.open(encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == rows


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_a_student_is_made_without_a_look_at_the_layers_that_it_does_not_have(
    options: dict[str, Any], weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is read as a whole where it is asked in training."""
    read: list[str] = []
    plain = loading._Filler._read

    def noted(self: Any, name: str) -> Tensor:
        read.append(name)
        return plain(self, name)

    teacher = dict(load_model(tmp_path / "teacher", device="cpu", dtype="float32").module.named_parameters())
    monkeypatch.setattr(loading._Filler, "_read", noted)
    options["distillation"] |= {"weight": weight, "sequence": not weight}
    built = method_of(TrainConfig.of(**options, tuning="full")).build(CPU, Spreader(Ranks(), torch.float32))
    times = [sum(f"layers.{layer}.mlp.down_proj" in name for name in read) for layer in range(3)]
    assert times == ([2, 1, 2] if weight else [1, 0, 1])
    for name, parameter in built.module.named_parameters():
        assert parameter.requires_grad and torch.equal(parameter, teacher[name.replace("layers.1.", "layers.2.")])
