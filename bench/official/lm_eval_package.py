"""lm-eval's `local-completions`, as a process of its own, with tasks that need no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import MODEL, model_file
from official.world import Server, feature

DOCUMENTS = (
    ("The capital of France is", [" Paris", " a dog", " nineteen"]),
    ("The opposite of hot is", [" cold", " table", " seven"]),
    ("Two plus two is", [" four", " green", " window"]),
    ("Monday, Tuesday, Wednesday,", [" Thursday", " because", " under"]),
)
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""
PERPLEXITY = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[0]}}"
metric_list: [{metric: word_perplexity}]
"""
WRITING = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {max_gen_toks: 2, until: ["."], temperature: 0}
metric_list: [{metric: exact_match}]
"""


@feature("lm-eval", "local-completions")
def _(server: Server) -> None:
    from llmasos.text import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        load_tokenizer(model_file()).save_pretrained(work / "tokenizer")
        rows = [json.dumps({"question": question, "choices": choices}) for question, choices in DOCUMENTS]
        (work / "data.jsonl").write_text("\n".join(rows))
        (work / "tasks").mkdir()
        for name, kind in (("choosing", CHOICE), ("rolling", PERPLEXITY), ("writing", WRITING)):
            (work / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=work / "data.jsonl") + kind)
        model = f"model={MODEL},base_url={server.v1}/completions,tokenizer={work}/tokenizer,max_length=2048"
        command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", model]
        command += ["--tasks", "choosing,rolling,writing", "--include_path", str(work / "tasks")]
        command += ["--output_path", str(work / "out")]
        offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf")}
        run = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stderr[-2000:]
        [path] = (work / "out").rglob("results*.json")
        results = json.loads(path.read_text())["results"]
    assert results["choosing"]["acc,none"] == 1.0, results
    assert 1 < results["rolling"]["word_perplexity,none"] < 1000, results
    assert results["writing"]["exact_match,none"] >= 0.5, results
