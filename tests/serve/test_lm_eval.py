"""lm-eval's `local-completions` against our server, end to end and offline: what it measures is what the model says."""

import json
import sys

import pytest
from fake_llm import live_server

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval")

DOCUMENTS = [
    {"question": "The quick brown fox jumps over the lazy", "choices": [" dog", " cat", " capital"], "answer": 0},
    {"question": "What is the capital of France? It is", "choices": [" Paris", " fox"], "answer": 0},
    {"question": "Models are found, run,", "choices": [" trained", " lazy"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""
PERPLEXITY = """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""
WRITING = """
output_type: generate_until
doc_to_target: answer
generation_kwargs: {max_gen_toks: 8, until: ["."], temperature: 0}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def tasks(tmp_path):
    from lm_eval.tasks import TaskManager

    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, kind in (("choosing", CHOICE), ("rolling", PERPLEXITY), ("writing", WRITING)):
        text = TASK.format(name=name, data=data) + kind
        if name == "rolling":
            text = text.replace('doc_to_text: "{{question}}"', 'doc_to_text: ""')
        (tmp_path / f"{name}.yaml").write_text(text)
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("as_ids", [True, False])
def test_a_task_runs_end_to_end_and_gives_the_models_own_likelihoods(
    tiny_llm, tiny_model, tasks, as_ids, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with live_server({"tiny": tiny_llm}) as url:
        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": "tiny",
                "base_url": f"{url}/completions",
                "tokenizer": str(tiny_model),
                "tokenized_requests": as_ids,
                "num_concurrent": 1,
                "max_length": 256,
            },
            tasks=["choosing", "rolling", "writing"],
            task_manager=tasks,
            log_samples=True,
            bootstrap_iters=0,
        )
    assert "torch" in sys.modules and set(results["results"]) == {"choosing", "rolling", "writing"}
    for document, sample in zip(DOCUMENTS, results["samples"]["choosing"], strict=True):
        assert sample["doc"]["question"] == document["question"]
        for choice, [answer] in zip(document["choices"], sample["filtered_resps"] and sample["resps"], strict=True):
            own = tiny_llm.score(choice, prompt=document["question"])
            assert float(answer[0]) == pytest.approx(own.logprob, abs=1e-3)
            assert (str(answer[1]) == "True") == own.is_greedy
    for document, sample in zip(DOCUMENTS, results["samples"]["writing"], strict=True):
        own = tiny_llm.generate(document["question"], max_tokens=8, temperature=0, stop=["."])
        assert sample["resps"][0][0] == own
