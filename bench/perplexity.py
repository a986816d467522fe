"""Perplexity of the default GGUF model as it runs here, against transformers on the dequantised weights.

    python bench/perplexity.py --text FILE [--windows 64]

Windows of 512 tokens that do not overlap, a BOS token before each; every token but BOS is scored.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from common import MODEL, model_file, report
from llmasos.inference.llm import LLM
from llmasos.inference.request import SamplingParams
from llmasos.models.load import load_model

WINDOW = 512


def windows(llm: LLM, text: str, limit: int) -> list[list[int]]:
    """Token windows with BOS in front; the rest that fills no window is left out."""
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    bos = llm.tokenizer.bos_token_id
    assert bos is not None
    starts = range(0, len(ids) - WINDOW + 1, WINDOW)
    return [[bos, *ids[at : at + WINDOW]] for at in starts][: limit or None]


def our_perplexity(llm: LLM, texts: list[list[int]]) -> float:
    outputs = llm.complete(texts, SamplingParams(max_tokens=0, prompt_logprobs=0))
    scores = [found.logprob for out in outputs for found in out.prompt_logprobs or () if found is not None]
    return math.exp(-sum(scores) / len(scores))


def reference_perplexity(folder: Path, texts: list[list[int]]) -> float:
    """transformers in float32 on the folder that we saved from the dequantised weights."""
    from transformers import AutoModelForCausalLM

    warnings.simplefilter("ignore")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids in texts:
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            total -= float(logits.gather(1, torch.tensor(ids[1:])[:, None]).sum())
            count += len(ids) - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", default=os.environ.get("LLMASOS_BENCH_TEXT"), help="a UTF-8 file, e.g. WikiText-2")
    parser.add_argument("--windows", type=int, default=0, help="how many windows; 0: all")
    args = parser.parse_args()
    if not args.text:
        sys.exit("perplexity: give a text with --text FILE or LLMASOS_BENCH_TEXT")
    file = model_file()
    llm = LLM(load_model(file), name=MODEL)
    texts = windows(llm, Path(args.text).read_text(encoding="utf-8"), args.windows)
    ours = our_perplexity(llm, texts)
    with tempfile.TemporaryDirectory() as scratch:
        load_model(file, dtype="float32", quantization="none").save_pretrained(scratch)
        reference = reference_perplexity(Path(scratch), texts)
    report(
        bench="perplexity",
        model=MODEL,
        windows=len(texts),
        ours=round(ours, 4),
        transformers=round(reference, 4),
        difference_percent=round(100 * (ours / reference - 1), 3),
    )


if __name__ == "__main__":
    main()
