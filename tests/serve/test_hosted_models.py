"""`Models` on a host: names, facts of models that are not in memory, leases, adapters, numbers. Processes are faked."""

import asyncio
import json
import math
import os
import threading
from contextlib import asynccontextmanager
from types import SimpleNamespace

import httpx
import pytest
from fake_llm import FakeLLM
from prometheus_client.parser import text_string_to_metric_families

from llmasos.errors import BusyError, FormatError, InvalidInputError, NotFoundError
from llmasos.inference.host.forecast import Forecast
from llmasos.inference.host.host import Host
from llmasos.inference.host.memory import Budgets, Prediction, Seen
from llmasos.inference.host.process import ModelSpec
from llmasos.inference.host.residency import Place
from llmasos.inference.request import SamplingParams
from llmasos.serve.access.errors import ForbiddenError
from llmasos.serve.backing import Hosted
from llmasos.serve.caller import Caller
from llmasos.serve.models import ModelNotFoundError, Models
from llmasos.serve.native import InHost
from llmasos.serve.server import assemble
from llmasos.store import Library, import_model
from llmasos.store.adapters import install_adapter, remove_adapter
from llmasos.store.card import Card, read_card
from llmasos.store.headers import read_facts
from llmasos.store.trained import install_model
from llmasos.store.transfer import Progress
from tiny import write_tiny_adapter, write_tiny_model

SHORT = SamplingParams(max_tokens=4)


class Process:
    def __init__(self, spec):
        self.spec, self.pid, self.load_seconds, self.step_seconds = spec, 42, 1.5, 0.0
        self.llm = FakeLLM(spec.name)
        self.llm.adapters = [SimpleNamespace(name=name) for name in spec.adapters]
        self.llm.load_adapter = lambda name, path: self.llm.adapters.append(SimpleNamespace(name=name))
        self.llm.unload_adapter = lambda name: self.llm.adapters.clear()
        self.memory = SimpleNamespace(rss_bytes=90, peak_rss_bytes=95, device_bytes=0, peak_device_bytes=0)
        self.ended = asyncio.get_running_loop().create_future()

    async def wait(self):
        return await asyncio.shield(self.ended)

    async def stop(self, grace):
        if not self.ended.done():
            self.ended.set_result(0)


class Memory:
    budgets = Budgets({"cpu": 250})

    async def predict(self, spec):
        told = Forecast("cpu", 1, 100, 0, 0, 0, 0, 0, 10, {}, {})
        return Prediction(spec.name, told, None, (Place("cpu", {"cpu": 100}),), 1.0)

    def loaded(self, prediction, use, *, pages, load_seconds):
        return Seen(90, 95, 0, 0, load_seconds, 0.0)

    def error(self, prediction, use, *, pages):
        return 0.1

    def lived(self, prediction, seen, use, *, pages, limit):
        pass


@asynccontextmanager
async def world(*specs, installed=None, **options):
    started = []

    async def start(spec, **_):
        if spec.reference == "broken":
            raise FormatError("The file is damaged.")
        started.append(Process(spec))
        return started[-1]

    host = Host(memory=Memory(), start=start)
    for spec in specs:
        host.add(spec)
    models = Models(Hosted(host, installed=installed), {"nick": "a"}, **options)
    models.started = started
    try:
        yield models
    finally:
        await host.close()


async def ask(models, name, caller=Caller(), **options):  # noqa: B008  # frozen
    async with models.lease(name, caller, **options) as served:
        [output] = await served.complete([list(b"hello")], SHORT)
        return output.outputs[0].text


def status(models, name):
    return next(one for one in models.backing.status() if one.name == name)


def spec(name, **options):
    return ModelSpec(name, f"/models/{name}", **options)


async def test_a_lease_loads_the_model_and_aliases_mean_the_same_one() -> None:
    async with world(spec("a"), spec("b")) as models:
        assert models.names == ["a", "b"] and not models.started
        assert await ask(models, "nick") == "hell" and await ask(models, "a") == "hell"
        assert [one.spec.name for one in models.started] == ["a"]
        with pytest.raises(ModelNotFoundError, match=r"'c' is not served here. Served: a, b."):
            await ask(models, "c")


async def test_how_long_a_model_stays_is_said_with_the_lease() -> None:
    async with world(spec("a")) as models:
        await ask(models, "a", keep_alive=math.inf)
        assert status(models, "a").expires_at is None
        await ask(models, "a", keep_alive=60)
        assert status(models, "a").expires_at is not None
        await ask(models, "a", keep_alive=0)
        while status(models, "a").state != "absent":
            await asyncio.sleep(0)


async def test_how_long_models_stay_can_be_changed_while_they_are_there() -> None:
    async with world(spec("a")) as models:
        transport = httpx.ASGITransport(assemble(models, residents=InHost(models.backing, models.backing.look)))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            url = "/llmasos/v1/load"
            first = (await client.post(url, json={"model": "a", "keep_alive": 60})).json()
            assert first["keep_alive"] == 60 and first["expires_at"] is not None
            await ask(models, "a")
            assert status(models, "a").keep_alive == 60, "later requests leave it as it is"
            ever = (await client.post(url, json={"model": "a", "keep_alive": -1})).json()
            assert ever["keep_alive"] is None and ever["expires_at"] is None
            assert (await client.post(url, json={"model": "a"})).json()["keep_alive"] is None
            assert (await client.post(url, json={"model": "a", "keep_alive": -2})).status_code == 400
            await client.post(url, json={"model": "a", "keep_alive": 0})
            assert len(models.started) == 1
        while status(models, "a").state != "absent":
            await asyncio.sleep(0)


async def test_a_key_reaches_its_models_only_by_whatever_name() -> None:
    async with world(spec("a"), spec("b")) as models:
        caller = Caller(key_id="k", models=("b", "nick"))
        assert await ask(models, "b", caller) == "hell" and await ask(models, "nick", Caller(models=("a",))) == "hell"
        for name in ("a", "c"):
            with pytest.raises(ForbiddenError):
                await ask(models, name, caller)


async def test_a_failed_load_is_an_error_with_its_own_status_and_retry_after() -> None:
    async with world(ModelSpec("x", "broken")) as models:
        with pytest.raises(Exception, match="x could not be loaded: The file is damaged") as caught:
            await ask(models, "x")
        assert caught.value.http_status == 422 and caught.value.retry_after == 10


async def test_what_a_model_in_the_library_is_can_be_told_before_it_is_loaded(tmp_path) -> None:
    import_model(write_tiny_model(tmp_path / "m"), name="tiny")
    damaged = tmp_path / "home" / "models" / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text(json.dumps({"architectures": ["Nothing"]}))

    def installed(name, path):
        return ModelSpec(name, str(path), engine={"max_model_len": 64}), {"keep_alive": 7.0}

    async with world(installed=installed) as models:
        await models.look(facts=True)
        assert models.names == ["tiny"] and models.backing.host.names == []
        await models.look("TINY")
        await models.look()  # another request's, before the first one has found what it looked for
        facts = models["TINY"].model
        assert (facts.name, facts.context_length, facts.is_encoder) == ("tiny", 64, False)
        assert "<|end|>" in facts.chat_template and facts.adapters == [] and facts.stats.num_running == 0
        assert facts.engine_config.max_model_len == 64 and not models.started
        assert await ask(models, "TINY") == "hell" and models["tiny"].model is models.started[0].llm
        for name in ("damaged", "none", "../tiny", "", "/etc"):
            with pytest.raises((ModelNotFoundError, FormatError)):
                await ask(models, name)


async def test_no_list_and_no_lease_reads_the_disk_in_the_event_loop(tmp_path, monkeypatch) -> None:
    for name in ("one", "two"):
        import_model(write_tiny_model(tmp_path / "m"), name=name)
    reading = set()

    def watched(work):
        def watch(*given):
            reading.add(threading.current_thread())
            return work(*given)

        return watch

    monkeypatch.setattr(Library, "folder", watched(Library.folder))
    monkeypatch.setattr("llmasos.store.library.read_card", watched(read_card))
    monkeypatch.setattr("llmasos.serve.installed.read_facts", watched(read_facts))
    async with world(installed=lambda name, path: (ModelSpec(name, str(path)), {})) as models:
        transport = httpx.ASGITransport(assemble(models))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            for header in ({}, {"anthropic-version": "2023-06-01"}):
                listed = (await client.get("/v1/models", headers=header)).json()["data"]
                assert [one["id"] for one in listed] == ["one", "two"]
                assert (await client.get("/v1/models/one", headers=header)).json()["id"] == "one"
            assert (await client.get("/healthz")).json()["models"] == ["one", "two"]
            assert (await client.get("/v1/models/none")).status_code == 404
            shown = (await client.post("/api/show", json={"model": "two:latest"})).json()
            assert shown["details"]["family"] == "llama" and len((await client.get("/api/tags")).json()["models"]) == 2
            body = {"model": "ONE", "prompt": "hello", "max_tokens": 4}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert reading and threading.main_thread() not in reading


async def test_a_model_whose_files_are_gone_is_no_longer_served(tmp_path) -> None:
    for name in ("one", "two", "three"):
        import_model(write_tiny_model(tmp_path / "m"), name=name)
    async with world(installed=lambda name, path: (ModelSpec(name, str(path)), {})) as models:
        host = models.backing.host
        await ask(models, "one")
        await ask(models, "three")
        await host.unload("one")
        Library().remove("one")
        await models.look()
        assert models.names == ["three", "two"] and host.names == ["three"]
        async with models.lease("three"):
            Library().remove("three")
            await models.backing.removed("three")  # it is used still
            await models.look()
            assert host.names == ["three"] and models.names == ["two"]
        with pytest.raises(ModelNotFoundError):
            await ask(models, "one")


def shelve(tmp_path, name, base="one", **fields):
    """An adapter in the library."""
    source = write_tiny_adapter(tmp_path / f"adapter-{name}")
    return install_adapter(source, Card(name=name, base=base, **fields))


def busy(name):
    raise BusyError(f"The adapter {name!r} is in use.")


def adapters_of(models, name):
    return [one.name for one in models.backing.host.loaded()[name][0].adapters]


@pytest.mark.parametrize("given", [True, False])
async def test_an_adapter_in_the_library_is_served_beside_its_model_from_the_moment_that_it_is_there(
    tmp_path, given
) -> None:
    import_model(write_tiny_model(tmp_path / "m"), name="one")
    only = [ModelSpec("one", "one")] if given else []
    installed = None if given else lambda name, path: (ModelSpec(name, str(path)), {})
    async with world(*only, installed=installed) as models:
        assert await ask(models, "one") == "hell" and adapters_of(models, "one") == []
        with pytest.raises(ModelNotFoundError):
            await ask(models, "ft:one:x:1")
        folder = shelve(tmp_path, "ft-one-x-1", serves_as="ft:one:x:1")
        shelve(tmp_path, "of-another", base="nowhere")
        assert await ask(models, "ft:one:x:1") == "hell" and adapters_of(models, "one") == ["ft:one:x:1"]
        await models.look(facts=True)
        assert models.names == ["one", "ft:one:x:1"] and models["ft:one:x:1"].base == "one"
        assert len(models.started) == 1
        os.utime(folder / "adapter_model.safetensors", ns=(5, 5))  # it was trained further
        loads = []
        llm = models.backing.host.loaded()["one"][0]
        forget, llm.unload_adapter = llm.unload_adapter, busy
        assert await ask(models, "ft:one:x:1") == "hell" and adapters_of(models, "one") == ["ft:one:x:1"]
        llm.unload_adapter = forget
        llm.load_adapter = lambda name, path: loads.append((name, path))
        await ask(models, "ft:one:x:1")
        await ask(models, "ft:one:x:1")
        assert loads == [("ft:one:x:1", str(folder))]


async def test_an_adapter_that_is_gone_keeps_no_model_from_loading(tmp_path) -> None:
    import_model(write_tiny_model(tmp_path / "m"), name="one")
    async with world(installed=lambda name, path: (ModelSpec(name, str(path)), {})) as models:
        shelve(tmp_path, "a")
        shelve(tmp_path, "b")
        await ask(models, "a")
        await ask(models, "b")
        assert models.backing.host.spec("one").adapters.keys() == {"a", "b"}
        await models.backing.host.unload("one")
        remove_adapter("a")
        assert await ask(models, "one") == "hell" and models.started[-1].spec.adapters == {}
        with pytest.raises(NotFoundError, match="a is not installed any more"):
            await ask(models, "a")
        with pytest.raises(ModelNotFoundError):
            await ask(models, "a")
        assert await ask(models, "b") == "hell" and adapters_of(models, "one") == ["b"]
        await models.look()
        assert models.names == ["one", "b"]


async def test_a_fine_tuned_model_is_served_under_its_own_name_with_colons(tmp_path) -> None:
    card = Card(name="ft-one-1", serves_as="ft:one::1")
    install_model(write_tiny_model(tmp_path / "m"), card)
    async with world(installed=lambda name, path: (ModelSpec(name, str(path)), {})) as models:
        await models.look()
        assert models.names == ["ft:one::1"]
        assert await ask(models, "ft:one::1") == await ask(models, "ft-one-1") == "hell" and len(models.started) == 1
        assert Library().path("ft:one::1").name == "ft-one-1"


async def test_over_http_a_load_tells_how_far_it_is_and_a_deleted_model_is_forgotten(tmp_path) -> None:
    import_model(write_tiny_model(tmp_path / "m"), name="tiny")
    reports, gate = [], asyncio.Event()
    async with world(installed=lambda name, path: (ModelSpec(name, str(path)), {})) as models:
        host = models.backing.host
        start = host._start

        async def held(one, *, on_progress, **options):
            reports.append(on_progress)
            await gate.wait()
            return await start(one)

        async def install(name):
            return None  # nothing beside what the backing has

        host._start = held
        transport = httpx.ASGITransport(assemble(models, residents=InHost(models.backing, install)))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1/llmasos/v1") as client:
            load = asyncio.create_task(client.post("/load", json={"model": "Tiny"}))
            while not reports:
                await asyncio.sleep(0.001)
            reports[0](Progress("download", done=1, total=4))
            [status] = (await client.get("/status")).json()["data"]
            assert status["state"] == "loading" and status["name"] == "tiny"
            told = {name: status["loading"][name] for name in ("phase", "done", "total", "expected_seconds")}
            assert told == {"phase": "download", "done": 1, "total": 4, "expected_seconds": 1.0}
            [listed] = (await client.get("/models")).json()["data"]
            assert listed["state"] == "loading" and listed["loading"]["phase"] == "download"
            gate.set()
            assert (await load).json()["state"] == "ready" and (await load).json().get("loading") is None
            assert (await client.delete("/models/tiny")).status_code == 200
            assert (await client.get("/status")).json()["data"] == [] and host.names == []
            assert (await client.post("/load", json={"model": "tiny"})).status_code == 404


async def test_files_that_cannot_be_read_say_nothing_until_they_are_loaded(tmp_path) -> None:
    async with world(ModelSpec("x", str(tmp_path / "none"))) as models:
        facts = models["x"].model
        assert (facts.context_length, facts.is_encoder, facts.chat_template) == (0, False, None)


async def test_adapters_outlive_the_process_that_they_were_loaded_into() -> None:
    async with world(spec("a", adapters={"first": "/adapters/first"})) as models:
        assert models.names == ["a", "first"] and models["first"].adapter == "first"
        await models.load_adapter("second", "/adapters/second", None)
        with pytest.raises(InvalidInputError, match="'second' is served already"):
            await models.load_adapter("second", "/x", None)
        async with models.lease("second") as served:
            await served.complete([list(b"hello")], SHORT)
            assert (served.base, served.adapter) == ("a", "second")
        assert models.started[0].llm.requests[-1]["adapter"] == "second"
        await models.backing.host.unload("a")
        assert models.names == ["a", "first", "second"]
        await ask(models, "second")
        assert models.started[1].spec.adapters == {"first": "/adapters/first", "second": "/adapters/second"}
        await models.unload_adapter("second")
        assert models.names == ["a", "first"]
        with pytest.raises(ModelNotFoundError, match="'a' is a model, not an adapter"):
            await models.unload_adapter("a")


async def test_an_adapter_is_in_every_copy_of_a_model_or_in_none() -> None:
    async with world() as models:
        models.backing.add(spec("a"), replicas=2)
        await ask(models, "a")
        while len(models.backing.loaded()["a"]) < 2:
            await asyncio.sleep(0.001)
        first, second = models.backing.loaded()["a"]

        def names():
            return [[one.name for one in llm.adapters] for llm in (first, second)]

        def fail(*_):
            raise FormatError("The adapter is of another model.")

        await models.load_adapter("x", "/x", None)
        assert names() == [["x"], ["x"]]
        load, second.load_adapter = second.load_adapter, fail
        first.unload_adapter = lambda name: first.adapters.pop()
        with pytest.raises(FormatError, match="of another model"):
            await models.load_adapter("y", "/y", None)
        assert names() == [["x"], ["x"]] and models.names == ["a", "x"]
        second.load_adapter, second.unload_adapter = load, fail
        with pytest.raises(FormatError):
            await models.unload_adapter("x")
        assert names() == [["x"], ["x"]] and models.names == ["a", "x"]


async def test_a_copy_that_is_being_loaded_gets_the_adapters_that_came_meanwhile() -> None:
    async with world() as models:
        gate, start = asyncio.Event(), models.backing.host._start

        async def held(one, **options):
            if models.started:
                await gate.wait()
            return await start(one, **options)

        models.backing.host._start = held
        models.backing.add(spec("a", adapters={"gone": "/gone"}), replicas=2)
        await ask(models, "a")
        await models.load_adapter("x", "/x", None)
        await models.unload_adapter("gone")
        gate.set()
        while len(models.backing.loaded()["a"]) < 2:
            await asyncio.sleep(0.001)
        assert [one.name for one in models.backing.loaded()["a"][1].adapters] == ["x"]


async def test_a_new_adapter_names_its_model_where_there_are_several() -> None:
    async with world(spec("a"), spec("b")) as models:
        with pytest.raises(InvalidInputError, match="Several models are served"):
            await models.load_adapter("x", None, None)
        await models.load_adapter("x", None, "b")
        assert models["x"].base == "b"
        with pytest.raises(InvalidInputError, match="'x' is an adapter itself"):
            await models.load_adapter("y", None, "x")


async def test_numbers_of_the_host_are_told_of_models_that_were_asked_for() -> None:
    async with world(spec("a"), spec("b"), spec("c"), ModelSpec("x", "broken")) as models:
        await ask(models, "a")
        await ask(models, "b")
        held = models.lease("b")
        await held.__aenter__()
        await ask(models, "a")
        await models.backing.host.unload("a")
        with pytest.raises(Exception, match="damaged"):
            await ask(models, "x")
        found = {}
        for family in text_string_to_metric_families(models.metrics.text().decode()):
            for sample in family.samples:
                labels = sorted(sample.labels.items(), key=lambda item: item[0] != "model_name")
                found[(sample.name.removeprefix("llmasos:"), *(value for _, value in labels))] = sample.value
        await held.__aexit__(None, None, None)
    assert found["models_loaded",] == 1
    for name, a, b in (
        ("model_loads_total", 1, 1),
        ("model_restarts_total", 0, 0),
        ("model_busy", 0, 1),
        ("model_replicas", 0, 1),
        ("model_queue_depth", 0, 0),
        ("model_load_seconds", 1.5, 1.5),
        ("model_plan_error_ratio", 0.1, 0.1),
    ):
        assert (found[name, "a"], found[name, "b"]) == (a, b)
    assert found["model_evictions_total", "a", "unloaded"] == 1
    assert found["model_memory_predicted_bytes", "b", "cpu"] == 100
    assert found["model_memory_measured_bytes", "b", "cpu"] == 90
    assert found["num_requests_running", "b"] == 0 and ("num_requests_running", "a") not in found
    assert found["model_loads_total", "x"] == 0 and not any("c" in labels for labels in found)
