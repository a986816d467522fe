"""TensorBoard, W&B and MLflow: the numbers arrive, once each, also when a run was killed and goes on. What is not
installed is refused by name; where it is installed, the real thing is asked."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from llmasos.errors import UnsupportedError
from llmasos.train.events import Evaluation, Generated, StepReport
from llmasos.train.logs import trackers
from llmasos.train.logs.meter import Meter
from llmasos.train.logs.trackers import Tracker, tracker

FACTS = {"name": "demo", "config": {"model": "m", "lora": {"r": 4}}}


def tell(folder: Path, name: str, first: int, last: int, *, end: bool) -> Tracker:
    """A run's steps; one that is killed tells of no end."""
    meter, one = Meter(1.0, None), tracker(name, folder, FACTS)
    meter.began(first, 8)
    one.began(first, 8)
    for step in range(first, last + 1):
        if step > first:
            report = StepReport(step, 3.0 / step, 1.0, 1e-3, 100, 90, 0.1, parts={"kl": 0.5})
            one.metered(report, meter.stepped(report))
        if step % 4 == 0:
            one.evaluated(Evaluation(step, 2.0, 1.5, 40, 0.1, (Generated("Is it?", "# It is."),)))
    if end:
        one.ended(last, "finished")
    return one  # type: ignore[return-value]


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_one_that_is_not_installed_is_named_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.MODULES, name, "no_such_module")
    with pytest.raises(UnsupportedError, match=name) as caught:
        tracker(name, tmp_path, FACTS)
    assert caught.value.hint == f"pip install 'llmasos[{name}]'" and caught.value.param == "trackers"


def test_extras_exist_for_all_of_them() -> None:
    import tomllib

    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(trackers.MODULES) <= set(extras)


class Kept(Tracker):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, FACTS)
        self.seen: list[tuple[int, dict[str, float]]] = []

    def put(self, step: int, numbers: Any) -> None:
        self.seen.append((step, dict(numbers)))


def test_what_they_are_told(tmp_path: Path) -> None:
    kept, meter = Kept(tmp_path), Meter(1e9, 1e15)
    report = StepReport(1, 2.5, 1.0, 1e-3, 100, 90, 0.1, "nan", {"kl": 0.5}, 2**30)
    kept.metered(report, meter.stepped(report))
    kept.evaluated(Evaluation(1, 2.0, None, 40, 0.1))
    [(_, step), (_, evaluation)] = kept.seen
    assert step["train/loss"] == 2.5 and step["train/loss_kl"] == 0.5 and step["train/skipped"] == 1
    assert step["speed/memory_gib"] == 1 and step["speed/mfu"] > 0 and step["train/rate"] == 1e-3
    assert evaluation == {"evaluation/loss": 2.0}


@needs("tensorboard")
def test_tensorboard_has_every_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(tmp_path, "tensorboard", 0, 1, end=False).saved(0, tmp_path)
    tell(tmp_path, "tensorboard", 0, 5, end=False).saved(3, tmp_path)
    tell(tmp_path, "tensorboard", 3, 8, end=True)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in found.Scalars("evaluation/loss")] == [0, 4, 8]
    assert "sample/0/text_summary" in found.Tags()["tensors"]


@needs("mlflow")
@pytest.mark.filterwarnings("ignore")  # of what it is built on
def test_mlflow_has_every_step_once_and_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tell(tmp_path, "mlflow", 0, 5, end=False)
    tell(tmp_path, "mlflow", 3, 8, end=True)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    [experiment] = [one for one in client.search_experiments() if one.name == trackers.PROJECT]
    [run] = client.search_runs([experiment.experiment_id])
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == list(range(1, 9))
    assert run.info.status == "FINISHED" and run.data.params == {"model": "m", "lora.r": "4"}
    assert "# It is." in next((tmp_path / "mlflow").rglob("000008.txt")).read_text()


@needs("wandb")
def test_wandb_writes_offline_and_goes_on_as_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tell(tmp_path, "wandb", 0, 3, end=True)
    tell(tmp_path, "wandb", 3, 8, end=True)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1
    written = b"".join(next(folder.glob("*.wandb")).read_bytes() for folder in folders)
    assert written.count(b"train/gradient_norm") >= 8 and b"0.375" in written


def test_a_run_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmasos.train.config import TrainConfig
    from llmasos.train.run import train

    monkeypatch.setitem(trackers.MODULES, "wandb", "no_such_module")
    with pytest.raises(UnsupportedError, match="wandb"):
        train(TrainConfig(model="no-such-model", data=("none.jsonl",), trackers=("wandb",)))
