"""Budgets, predictions and what is remembered of loads."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_processes import Spec

from llmasos.errors import DeviceError, InsufficientMemoryError
from llmasos.inference.config import EngineConfig
from llmasos.inference.host import memory as module
from llmasos.inference.host.forecast import Forecast, forecast
from llmasos.inference.host.memory import GPU_HOST, Budgets, Memory, main_memory
from llmasos.inference.rank import divide, resolve
from llmasos.models.load import read_config

CPU = Forecast("cpu", 1, 300, 0, 1000, 50, 100, 900, 4096, {}, {})
GPUS = {"cuda:0": 10_000, "cuda:1": 20_000}
CUDA = replace(CPU, device="cuda", context=70, devices=GPUS, uuids={"cuda:0": "GPU-a", "cuda:1": "GPU-b"})


def use(rss=0, peak=None, device=0, peak_device=None):
    return SimpleNamespace(
        rss_bytes=rss,
        peak_rss_bytes=rss if peak is None else peak,
        device_bytes=device,
        peak_device_bytes=device if peak_device is None else peak_device,
    )


class Told(Memory):
    """Forecasts what it was told; counts how often it was asked."""

    def __init__(self, told, path, **budgets):
        super().__init__(Budgets({"cpu": 100_000, **budgets}), path, self._ask)
        self.told, self.asked = told, 0

    async def _ask(self, options):
        self.asked += 1
        return self.told


# budgets


def test_a_budget_is_its_limit_and_no_more_than_a_share_of_what_others_leave() -> None:
    free = {"cpu": 100, "cuda:0": None}
    budgets = Budgets({"cpu": 1000, "cuda:0": 500}, free.get)
    assert budgets.now({"cpu": 200, "cuda:0": 100}) == {"cpu": 290, "cuda:0": 500}
    free["cpu"] = 10_000
    assert budgets.now({"cpu": 200})["cpu"] == 1000


def test_budgets_are_shares_of_what_there_is_unless_given() -> None:
    budgets = Budgets.detect(0.5)
    assert budgets.limits == {"cpu": main_memory() // 2}
    assert 0 < budgets.now({})["cpu"] <= budgets.limits["cpu"]
    given = Budgets.detect(0.5, {"cpu": 123, "cuda:1": 7})
    given.add({"cuda:0": 100, "cuda:1": 100}, {})
    assert given.limits == {"cpu": 123, "cuda:1": 7, "cuda:0": 50}
    assert given.now({}).keys() == given.limits.keys()


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_of_both_versions_limit_memory_whichever_of_them_is_tightest(tmp_path: Path, version) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    base = root / "memory" if version == 1 else root
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    if version == 2:
        names = ("memory.max", "memory.current", "inactive_file")
    own.write_text("4:memory:/system/llmasos\n3:cpu:/x\n" if version == 1 else "0::/system/llmasos\n")

    def write(folder: Path, limit: str, used: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} 30\n")

    write(base, "max" if version == 2 else str(1 << 62), 500)
    write(base / "system", "1000", 400)
    write(base / "system/llmasos", "900", 100)
    assert sorted(module._cgroups(root, own)) == [(900, 70), (1000, 370)]
    assert module._cgroups(root, tmp_path / "none") == []


def test_without_nvidias_library_a_gpus_free_memory_is_not_known(monkeypatch) -> None:
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(module.ctypes, "CDLL", missing)
    budgets = Budgets.detect(0.5)
    budgets.add({"cuda:0": 1000}, {"cuda:0": "GPU-a"})
    assert budgets.now({})["cuda:0"] == 500


def test_a_gpus_free_memory_is_asked_by_its_name() -> None:
    class Library:
        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetHandleByUUID(self, uuid, handle):
            return 0 if uuid == b"GPU-a" else 6

        def nvmlDeviceGetMemoryInfo(self, handle, memory):
            memory._obj[:] = [1000, 600, 400]
            return 0

    free = module._Free()
    free._nvml = module._Nvml()
    free._nvml._library = Library()
    free.uuids = {"cuda:0": "GPU-a", "cuda:1": "MIG-b"}
    assert [free(f"cuda:{i}") for i in range(3)] == [600, None, None]


# predictions


async def test_what_a_model_takes_on_a_cpu_is_process_weights_activations_and_pages(tmp_path: Path) -> None:
    memory = Told(CPU, tmp_path / "m.json")
    [place] = (await memory.predict(Spec("a", "nowhere"))).places
    assert place.device == "cpu" and place.fixed == {"cpu": 1350} and place.paged == ("cpu",)
    assert (place.least_pages, place.most_pages, place.context) == (100, 900, 4096)
    [fixed] = (await memory.predict(Spec("a", "nowhere", engine={"kv_cache_memory": 777}))).places
    assert (fixed.least_pages, fixed.most_pages) == (777, 777)


async def test_on_gpus_any_of_them_will_do_unless_one_is_named_and_ranks_take_the_first(tmp_path: Path) -> None:
    memory = Told(CUDA, tmp_path / "m.json")
    places = (await memory.predict(Spec("a", "nowhere"))).places
    assert [place.device for place in places] == ["cuda:0", "cuda:1"]
    assert places[1].fixed == {"cpu": 300 + GPU_HOST, "cuda:1": 1120} and places[1].paged == ("cuda:1",)
    assert memory.budgets.limits["cuda:1"] == 18_000
    memory.told = replace(CUDA, device="cuda:1")
    assert [place.device for place in (await memory.predict(Spec("b", "b"))).places] == ["cuda:1"]
    memory.told = replace(CUDA, num_ranks=2)
    [place] = (await memory.predict(Spec("c", "c"))).places
    assert place.device == "cuda" and place.paged == ("cuda:0", "cuda:1")
    assert place.fixed == {"cpu": 2 * (300 + GPU_HOST), "cuda:0": 1120, "cuda:1": 1120}
    memory.told = replace(CUDA, device="cuda:7")
    with pytest.raises(DeviceError, match="There is no cuda:7"):
        await memory.predict(Spec("d", "d"))


async def test_on_apples_gpus_device_and_main_memory_are_one(tmp_path: Path) -> None:
    memory = Told(replace(CPU, device="mps", devices={"mps": 10_000}), tmp_path / "m.json")
    [place] = (await memory.predict(Spec("a", "nowhere"))).places
    assert place.fixed == {"cpu": 300 + GPU_HOST + 1050, "mps": 1050} and place.paged == ("cpu", "mps")


async def test_after_the_first_load_the_prediction_is_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "m.json"
    memory, spec = Told(CPU, path), Spec("a", "nowhere")
    first = await memory.predict(spec)
    assert memory.error(first, use(rss=1000), pages=500) == pytest.approx(0.3)
    seen = memory.loaded(first, use(rss=1000, peak=1900), pages=500, load_seconds=7.0)
    second = await Told(CPU, path).predict(spec)
    assert second.places[0].fixed == {"cpu": 1050} and second.load_seconds == 7.0
    assert memory.error(second, use(rss=1010), pages=500) == pytest.approx(-0.01, abs=1e-3)
    memory.lived(first, seen, use(rss=1500, peak=1900), pages=500)  # no higher than while it loaded
    assert (await memory.predict(spec)).places[0].fixed == {"cpu": 1050}
    memory.lived(first, seen, use(rss=1500, peak=2000), pages=500)
    assert (await memory.predict(spec)).places[0].fixed == {"cpu": 1500}
    memory.lived(first, seen, use(rss=1500, peak=9000), pages=500, limit=8000)  # it was ended for that
    assert (await memory.predict(spec)).places[0].fixed == {"cpu": 1500}
    memory.lived(first, seen, use(rss=1500, peak=2100), pages=500, limit=2100)
    assert (await memory.predict(spec)).places[0].fixed == {"cpu": 1600}
    assert list(json.loads(path.read_text())) == [first.key] and memory.asked == 1


async def test_on_a_gpu_pages_and_what_torch_does_not_count_are_told_apart(tmp_path: Path) -> None:
    memory, spec = Told(CUDA, tmp_path / "m.json"), Spec("a", "nowhere")
    first = await memory.predict(spec)
    assert first.loaded(400) == 400 + 1120
    seen = memory.loaded(first, use(rss=900, device=1400, peak_device=1500), pages=400, load_seconds=1.0)
    second = await memory.predict(spec)
    assert second.places[0].fixed == {"cpu": 900, "cuda:0": 1170} and second.loaded(1000) == 2170
    assert memory.error(second, use(rss=900, device=2000, peak_device=2100), pages=1000) == 0
    memory.lived(second, seen, use(rss=950, device=2000, peak_device=2200), pages=1000)
    assert (await memory.predict(spec)).places[0].fixed == {"cpu": 950, "cuda:0": 1270}


async def test_measurements_belong_to_files_options_and_devices(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 10)
    memory = Told(CPU, tmp_path / "m.json")

    async def key(**options):
        return (await memory.predict(Spec("a", str(folder), **options))).key

    first = await key()
    assert first == await key(engine={"kv_cache_memory": 5}) == await key(adapters={"x": "y"})
    others = [await key(dtype="float32"), await key(device="cuda:1"), await key(engine={"max_num_seqs": 3})]
    (folder / "model.safetensors").write_bytes(b"x" * 11)
    others.append(await key())
    monkeypatch.setenv("LLMASOS_DTYPE", "bfloat16")
    others.append(await key())
    assert len({first, *others}) == 6


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"KEY": 3}', '{"KEY": {"forecast": {"x": 1}, "seen": []}}', '{"KEY": {}, "b": 1}']
)
async def test_a_damaged_file_of_measurements_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "m.json"
    memory, spec = Told(CPU, path), Spec("a", "nowhere")
    key = (await memory.predict(spec)).key
    path.write_text(content.replace("KEY", key))
    prediction = await memory.predict(spec)
    assert prediction.seen is None
    memory.loaded(prediction, use(rss=1000), pages=0, load_seconds=1.0)
    assert json.loads(path.read_text())[key]["forecast"] == asdict(CPU)


async def test_what_cannot_be_written_costs_no_load(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory = Told(CPU, tmp_path / "file" / "m.json")
    prediction = await memory.predict(Spec("a", "nowhere"))
    assert memory.loaded(prediction, use(rss=1000), pages=0, load_seconds=1.0).loaded == 1000


async def test_only_so_many_models_are_remembered_and_the_latest_are(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_MOST_SEEN", 3)
    memory = Told(CPU, tmp_path / "m.json")
    keys = []
    for number in range(5):
        monkeypatch.setattr(module.time, "time", lambda at=number: float(at))
        prediction = await memory.predict(Spec("a", f"model {number}"))
        memory.loaded(prediction, use(rss=1), pages=0, load_seconds=1.0)
        keys.append(prediction.key)
    assert set(json.loads((tmp_path / "m.json").read_text())) == set(keys[2:])


# forecasts


def test_a_forecast_counts_what_the_engine_will_take(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"reference": str(tiny_model), "device": "cpu", "dtype": "float32"}
    told = forecast(**options, engine={"max_num_seqs": 4})
    config = read_config(tiny_model)
    sizes = resolve(config, EngineConfig(max_num_seqs=4), torch.device("cpu"), torch.float32)
    assert divide(sizes, told.least_pages) == [18] and divide(sizes, told.most_pages) == [18 + 3 * 17]
    with pytest.raises(InsufficientMemoryError):
        divide(sizes, told.least_pages - 1)
    assert told.device == "cpu" and told.num_context == 256 and told.context == 0
    monkeypatch.setattr("llmasos.inference.host.forecast.CPU_TOKENS", 640)  # two and a half contexts
    usual, short = (forecast(**options, engine=engine) for engine in ({}, {"max_model_len": 64}))
    assert divide(sizes, usual.most_pages) == [18 + int(1.5 * 17)]
    assert short.most_pages == pytest.approx(usual.most_pages, rel=0.25)  # as many tokens, whatever a context is
    monkeypatch.setattr("llmasos.inference.host.forecast.CPU_TOKENS", 10)
    long = forecast(**options)
    assert long.most_pages == long.least_pages == told.least_pages
    weights = sum(f.stat().st_size for f in tiny_model.glob("*.safetensors"))
    assert told.weights == pytest.approx(weights, rel=0.05) and told.process > 50e6
    assert forecast(**options, load_format="dummy").weights == told.weights
    short = forecast(**options, engine={"max_num_seqs": 4, "max_model_len": 64})
    assert short.num_context == 64 and short.least_pages < told.least_pages
