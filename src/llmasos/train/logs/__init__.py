"""What a run shows and leaves: progress in the terminal, run.json, metrics.csv, evaluations.jsonl, report.html, and
TensorBoard, W&B and MLflow where they are asked for. Reading them (`runs`) loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from llmasos.data import Batches, Stats
    from llmasos.models.config import ModelConfig
    from llmasos.train.config import TrainConfig
    from llmasos.train.events import Listener

__all__ = ["listeners_for"]


def listeners_for(
    config: TrainConfig,
    run_folder: Path,
    *,
    shape: ModelConfig,
    batches: Batches,
    stats: Stats,
    device: torch.device,
    dtype: torch.dtype,
    path: Path | None = None,
    world_size: int = 1,
    num_trained: int | None = None,
    plan: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> list[Listener]:
    """Who watches a run, for rank 0. config: settled. stats: of `batches`. path: of the model to begin with.
    num_trained: weights that are. plan: what was predicted, for run.json. progress: show it in the terminal.

    Raises UnsupportedError for a tracker that is not installed."""
    from llmasos.train.flops import flops_per_token, peak_flops
    from llmasos.train.logs.facts import run_facts
    from llmasos.train.logs.files import Files
    from llmasos.train.logs.meter import Meter
    from llmasos.train.logs.progress import Progress
    from llmasos.train.logs.report import Report
    from llmasos.train.logs.runs import REPORT
    from llmasos.train.logs.trackers import tracker
    from llmasos.train.logs.watch import Watch, Watcher

    length = min(stats.num_tokens / max(1, stats.num_samples), batches.max_length)
    peak = peak_flops(device, dtype)
    frozen = config.tuning in ("lora", "qlora")
    meter = Meter(flops_per_token(shape, length=length, frozen=frozen), peak and peak * world_size)
    facts = run_facts(
        config,
        shape,
        batches,
        stats,
        device,
        dtype,
        path=path,
        world_size=world_size,
        num_trained=num_trained,
        plan=plan,
    )
    shows: list[Watcher] = [tracker(name, run_folder, facts) for name in dict.fromkeys(config.trackers)]
    shows.append(Report(run_folder))
    if progress:
        shows.append(Progress(meter, reported=run_folder / REPORT, plan=plan))
    return [Watch(meter, [Files(run_folder, facts, meter)], shows)]
