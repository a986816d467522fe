"""What a runner with CUDA graphs does on the CPU's side."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from engines import engine_of, model_of, request_of, run

from llmasos.inference import runner as runners
from llmasos.inference.llm import LLM
from llmasos.inference.request import SamplingParams
from llmasos.inference.runner import Step, fill_input, table_columns
from paged_world import config_of


def test_graphs_are_told_every_page_to_the_end_of_the_context(tiny_llm: LLM) -> None:
    engine = engine_of(tiny_llm.model, max_model_len=200)
    size, forward = 4, engine.runner.forward
    widest = 0

    def watched(step: Step) -> Any:
        nonlocal widest
        if step.decodes:
            table, num = step.tables[0], len(step.seq_lens)
            columns = table_columns(table.shape[1], 16, 200)
            flat = np.zeros(size * (3 + columns), np.int32)
            fill_input(flat, step, size, columns)
            assert flat[2 * size :][:num].tolist() == step.seq_lens.tolist()
            told = flat[3 * size :].reshape(size, columns)
            for row, length in enumerate(step.seq_lens):
                pages = -(-int(length) // 16)
                assert told[row, :pages].tolist() == table[row, :pages].tolist()
            assert not told[num:].any(), "rows that pad"
            widest = max(widest, table.shape[1])
        return forward(step)

    engine.runner.forward = watched  # type: ignore[method-assign]
    params = [SamplingParams(temperature=0, max_tokens=200 - n, ignore_eos=True) for n in (5, 20)]
    run(engine, [request_of(range(1, 1 + n), p) for n, p in zip((5, 20), params, strict=True)])
    assert widest > table_columns(widest, 16, 200), "tables have grown past the longest sequence"


def test_a_runner_that_is_dropped_is_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", object)
    runner = engine_of(model_of(config_of())).runner
    runner._graphs = runners._Graphs(runner)
    held = weakref.ref(runner)
    gc.disable()
    try:
        del runner
        assert held() is None, "its memory would stay until garbage is collected"
    finally:
        gc.enable()
