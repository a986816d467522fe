"""/v1/fine_tuning/jobs through the official `openai` client: what is asked is checked, and jobs outlive everything."""

import asyncio
import contextlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from fake_llm import FakeLLM, live_server
from openai.types.fine_tuning import FineTuningJob

from llmasos.client import AsyncClient, Client
from llmasos.errors import ProviderError
from llmasos.serve.finetuning import child, options
from llmasos.store import import_model
from tiny import write_tiny_model

FAKE_RUN = (sys.executable, str(Path(__file__).with_name("fake_run.py")))
OVER = ("succeeded", "failed", "cancelled", "paused")


async def got(value):
    return await value if inspect.isawaitable(value) else value


async def items(stream):
    return [item async for item in stream] if hasattr(stream, "__aiter__") else list(stream)


def chat(text="hi", answer="ho"):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


def upload(client, *rows, purpose="fine-tune", name="chats.jsonl"):
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return client.files.create(file=(name, data.encode()), purpose=purpose).id


def create(client, text="hi", **fields):
    return client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": upload(client, chat(text))} | fields)


def wait(client, id, status=OVER, seconds=60):
    until = time.monotonic() + seconds
    while (job := client.fine_tuning.jobs.retrieve(id)).status not in status:
        assert time.monotonic() < until, job
        time.sleep(0.02)
    return job


def wait_for_step(client, id, step, seconds=60):
    until = time.monotonic() + seconds
    while (client.fine_tuning.jobs.retrieve(id).llmasos.get("step") or 0) < step:
        assert time.monotonic() < until
        time.sleep(0.02)


def hurry(home, job):
    """A slow run comes to its end."""
    (home / "runs" / job.llmasos["run"] / "hurry").touch()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def own_home(home, monkeypatch):
    monkeypatch.setenv("LLMASOS_HOME", str(home))


@pytest.fixture(scope="module")
def url(home, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMASOS_HOME", str(home))
        patch.setattr(child, "COMMAND", FAKE_RUN)
        import_model(write_tiny_model(tmp_path_factory.mktemp("models") / "m"), name="tiny")
        with live_server(FakeLLM("tiny")) as url:
            yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_a_job_ends_with_a_model_metrics_and_checkpoints(client: openai.OpenAI, home: Path) -> None:
    file = upload(client, chat())
    held_out = upload(client, chat("a", "b"))
    method = {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 2, "n_epochs": 3}}}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file,
        validation_file=held_out,
        suffix="poems",
        seed=7,
        method=method,
        metadata={"who": "me"},
        extra_body={"llmasos": {"tuning": "lora", "lora": {"r": 4}}},
    )
    FineTuningJob.model_validate_json(job.model_dump_json(), strict=True)
    assert (job.model, job.seed, job.training_file, job.validation_file) == ("tiny", 7, file, held_out)
    assert job.status in ("queued", "validating_files") and job.fine_tuned_model is None and job.finished_at is None
    done = wait(client, job.id)
    assert done.status == "succeeded" and done.trained_tokens == 50 and done.finished_at >= done.created_at
    assert done.fine_tuned_model.startswith("ft:tiny:poems:") and done.metadata == {"who": "me"}
    assert (
        done.hyperparameters.n_epochs == 3
        and isinstance(done.hyperparameters.n_epochs, int)
        and done.hyperparameters.batch_size == 2
    )
    assert done.method.type == "supervised" and done.llmasos["lora"] == {"r": 4}
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))  # several pages
    texts = [one.message for one in events][::-1]
    assert texts[0] == f"Created fine-tuning job: {job.id}" and "1 samples" not in texts[1] and "7 samples" in texts[1]
    assert texts[-1] == f"New fine-tuned model created: {done.fine_tuned_model}"
    assert len({one.id for one in events}) == len(events)
    steps = [one for one in events if one.type == "metrics" and "train_loss" in one.data]
    assert [one.data["step"] for one in steps] == list(range(10, 0, -1)) and steps[0].data["train_loss"] == 1.0
    found = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [(one.step_number, one.metrics.train_loss, one.metrics.valid_loss) for one in found] == [
        (10, 1.0, 1.1),
        (5, 2.0, 2.2),
    ]
    assert found[0].fine_tuned_model_checkpoint == done.fine_tuned_model and not found[1].served
    assert found[1].fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-5"
    assert [one.id for one in client.fine_tuning.jobs.checkpoints.list(job.id, after=found[0].id)] == [found[1].id]
    table = client.files.content(done.result_files[0]).text.splitlines()
    assert table[0] == "step,train_loss,valid_loss" and table[5] == "5,2.0,2.2" and len(table) == 11
    assert not (home / "jobs" / job.id).exists() and (home / "runs" / done.llmasos["run"]).is_dir()


def test_the_process_is_told_what_was_asked(client: openai.OpenAI, home: Path) -> None:
    import yaml

    job = create(client, "slow", hyperparameters={"learning_rate_multiplier": 2, "n_epochs": "auto"},
                 extra_body={"llmasos": {"lora.r": 8, "max_length": 64}})  # fmt: skip
    told = yaml.safe_load((home / "jobs" / job.id / "job.yaml").read_text())
    run = job.llmasos["run"]
    assert told["model"] == "tiny" and told["output"] == str(home / "runs" / run) and told["name"] == run
    assert told["lora.r"] == 8 and told["max_length"] == 64 and told["validation"] == 0.0 and "epochs" not in told
    assert told["job"]["learning_rate_multiplier"] == 2 and told["job"]["serves_as"].startswith("ft:tiny::")
    assert Path(told["data"][0]).read_text() == json.dumps(chat("slow")) + "\n"
    client.files.delete(job.training_file)  # the job has the bytes
    hurry(home, job)
    assert wait(client, job.id).status == "succeeded"


def test_jobs_wait_for_their_turn_are_paused_go_on_and_are_cancelled(client: openai.OpenAI, home: Path) -> None:
    first, second = create(client, "slow"), create(client, "slow", metadata={"turn": "2"})
    wait_for_step(client, first.id, 1)
    assert client.fine_tuning.jobs.retrieve(second.id).status == "queued"
    assert client.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    paused = client.fine_tuning.jobs.pause(first.id)
    assert paused.status == "paused" and paused.estimated_finish is None
    before = client.fine_tuning.jobs.list_events(first.id, limit=1).data[0]
    assert before.message == "Fine-tuning job paused"
    assert client.fine_tuning.jobs.resume(first.id).status in ("queued", "validating_files", "running")
    hurry(home, first)
    assert wait(client, first.id).status == "succeeded"
    words = [one.message for one in client.fine_tuning.jobs.list_events(first.id, limit=100).data]
    assert any(one.startswith("Stopped after step") for one in words)
    assert any(one.startswith("Going on from step") for one in words)
    with pytest.raises(openai.ConflictError, match="can't be cancelled"):
        client.fine_tuning.jobs.cancel(first.id)
    with pytest.raises(openai.ConflictError, match="can't be resumed"):
        client.fine_tuning.jobs.resume(second.id)
    listed = [one.id for one in client.fine_tuning.jobs.list(limit=1)]
    assert listed[:2] == [second.id, first.id]
    assert [one.id for one in client.fine_tuning.jobs.list(metadata={"turn": "2"})] == [second.id]


def test_events_come_as_they_happen(client: openai.OpenAI, url: str, home: Path) -> None:
    job = create(client, "slow")
    words = []
    with httpx.stream("GET", f"{url}/fine_tuning/jobs/{job.id}/events?stream=true", timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                words.append(json.loads(line.removeprefix("data: "))["message"])
            if any(word.startswith("Step 3/") for word in words):
                hurry(home, job)
    assert words[0].startswith("Created") and words[-1].startswith("New fine-tuned model")
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"


def test_a_run_that_fails_says_why_and_one_that_died_can_go_on(client: openai.OpenAI) -> None:
    wrong = wait(client, create(client, "wrong").id)
    assert wrong.status == "failed" and wrong.error.message == "training_file.jsonl:1: no assistant speaks. Add a turn."
    last = client.fine_tuning.jobs.list_events(wrong.id).data[0]
    assert last.level == "error" and last.message == wrong.error.message
    died = wait(client, create(client, "die").id)
    assert died.status == "failed" and "code -9: out of luck" in died.error.message
    client.fine_tuning.jobs.resume(died.id)
    assert wait(client, died.id).status == "succeeded"


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_our_own_clients_do_all_of_it(url: str, home: Path, kind) -> None:
    async with contextlib.AsyncExitStack() as stack:
        client = Client(url) if kind == "sync" else await stack.enter_async_context(AsyncClient(url))
        if kind == "sync":
            stack.callback(client.close)
        data = json.dumps(chat("slow")).encode()
        file = await got(client.files.upload(data, purpose="fine-tune", filename="chats.jsonl"))
        room = client.fine_tuning
        job = await got(
            room.create(
                "tiny",
                file.id,
                validation_file=file.id,
                suffix="mine",
                seed=3,
                hyperparameters={"batch_size": 2},
                metadata={"a": "b"},
                options={"lora": {"r": 4}},
            )
        )
        assert job.fine_tuned_model is None and job.hyperparameters.batch_size == 2 and job.llmasos["lora"] == {"r": 4}
        while not (await got(room.retrieve(job.id))).llmasos.get("step"):
            await asyncio.sleep(0.02)
        assert (await got(room.pause(job.id))).status == "paused"
        assert (await got(room.wait(job.id))).status == "paused"
        await got(room.resume(job.id))
        hurry(home, job)
        words = [one.message for one in await items(room.follow(job.id))]
        done = await got(room.wait(job.id, interval=0.01))
        assert done.status == "succeeded" and words[-1].endswith(done.fine_tuned_model)
        assert (await got(room.list(limit=1))).data[0].id == job.id
        assert (await got(room.events(job.id, limit=1))).data[0].message == words[-1]
        assert (await got(room.checkpoints(job.id))).data[0].step_number == 10
        with pytest.raises(ProviderError, match="can't be cancelled"):
            await got(room.cancel(job.id))


def test_the_jobs_stand_in_the_list_of_all_jobs(client: openai.OpenAI, url: str) -> None:
    job = wait(client, create(client).id)
    own = url.removesuffix("/v1") + "/llmasos/v1/jobs"
    [one] = [one for one in httpx.get(own, params={"kind": "fine_tuning"}).json()["data"] if one["id"] == job.id]
    assert (one["state"], one["progress"], one["name"]) == ("done", 1.0, job.fine_tuned_model)
    assert one["result"]["model"] == job.fine_tuned_model


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": "none"}, "model", "not served here"),
        ({"training_file": "file-none"}, "training_file", "There is no file"),
        ({"validation_file": "file-none"}, "validation_file", "There is no file"),
        ({"suffix": "a:b"}, "suffix", "can't be a part of a name"),
        ({"suffix": "../x"}, "suffix", "can't be a part of a name"),
        ({"suffix": ""}, "suffix", "at least 1"),
        ({"method": {"type": "dpo", "dpo": {}}}, "method.type", "'dpo' is not supported yet"),
        ({"method": {"type": "reinforcement"}}, "method.type", "'reinforcement' is not supported yet"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo", "of another method"),
        ({"method": {"type": "magic"}}, "method.type", "supervised"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations", "not supported"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "not above 0"),
        ({"hyperparameters": {"batch_size": -1}}, "hyperparameters.batch_size", "not above 0"),
        ({"hyperparameters": {"learning_rate_multiplier": 1e9}}, "hyperparameters.learning_rate_multiplier", "at most"),
        ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs", ""),
        ({"hyperparameters": {"warmup": 1}}, "hyperparameters.warmup", "Unknown field"),
        ({"seed": -1}, "seed", ""),
        (
            {
                "hyperparameters": {"n_epochs": 1},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
            },
            "hyperparameters",
            "given twice",
        ),
        ({"extra_body": {"llmasos": {"learning_rate": 1}}}, "llmasos.learning_rate", "no option"),
        ({"extra_body": {"llmasos": {"lora": {"rank": 1}}}}, "llmasos.lora.rank", "no option"),
        ({"extra_body": {"llmasos": {"lora": {"r": 0}}}}, "llmasos.lora.r", "greater than or equal to 1"),
        ({"extra_body": {"llmasos": {"data": ["/etc/passwd"]}}}, "llmasos.data", "can't be given"),
        ({"extra_body": {"llmasos": {"output": "/tmp/x"}}}, "llmasos.output", "can't be given"),
        ({"extra_body": {"llmasos": {"template": "/etc/passwd"}}}, "llmasos.template", "no Jinja template"),
        ({"extra_body": {"llmasos": {"tokenizer": "../x"}}}, "llmasos.tokenizer", "is a path"),
        ({"extra_body": {"llmasos": {"distillation": {"teacher": "/x"}}}}, "llmasos.distillation.teacher", "is a path"),
        ({"extra_body": {"llmasos": {"distillation.teacher": "a/b"}}}, "llmasos.distillation.teacher", "is a path"),
        (
            {"extra_body": {"llmasos": {"method": "distill", "distillation": {"teacher": "missing"}}}},
            "llmasos.distillation.teacher",
            "not installed",
        ),
        ({"extra_body": {"llmasos": {"gpus": 100_000}}}, "llmasos.gpus", "CPU cores"),
        ({"hyperparameters": {"n_epochs": 1}, "extra_body": {"llmasos": {"steps": 1}}}, "llmasos", "n_epochs"),
        ({"hyperparameters": {"batch_size": 1}, "extra_body": {"llmasos": {"batch_tokens": 64}}}, "llmasos", "both"),
        ({"extra_body": {"llmasos": {"method": "pretrain", "depth": 4}}}, "llmasos.depth", "has no effect"),
        ({"extra_body": {"llmasos": []}}, "llmasos", ""),
        ({"extra_body": {"colour": "red"}}, "colour", "Unknown field"),
    ],
)
def test_what_is_wrong_in_a_request_is_named(client: openai.OpenAI, home: Path, fields, param, words) -> None:
    before = [*(home / "jobs").glob("*")]
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as e:
        create(client, **fields)
    assert e.value.param == param and words in e.value.message
    assert [*(home / "jobs").glob("*")] == before


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([chat()], {"purpose": "batch"}, "uploaded for 'batch'"),
        (["{"], {}, "chats.jsonl:1: not JSON"),
        ([], {}, "has no rows"),
        ([{"a": 1}], {}, "of no known schema"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {}, "preference data"),
        (["not a table"], {"name": "chats.parquet"}, "chats.parquet"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_at_once(client: openai.OpenAI, home: Path, rows, options, words) -> None:
    file = upload(client, *rows, **options) if rows else None
    if file is None:
        file = client.files.create(file=("chats.jsonl", b"\n"), purpose="fine-tune").id
    with pytest.raises(openai.BadRequestError) as e:
        client.fine_tuning.jobs.create(model="tiny", training_file=file)
    assert words in e.value.message and e.value.param == "training_file" and str(home) not in e.value.message


def test_unknown_jobs_events_and_checkpoints_are_refused(client: openai.OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    for ask in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError, match="There is no fine-tuning job 'ftjob-none'"):
            ask("ftjob-none")
    job = wait(client, create(client).id)
    for ask, after in ((jobs.list_events, "ftevent-x-1"), (jobs.checkpoints.list, "ftckpt-x-1")):
        with pytest.raises(openai.BadRequestError) as e:
            ask(job.id, after=after)
        assert e.value.param == "after"
    with pytest.raises(openai.BadRequestError, match="no fine-tuning job"):
        jobs.list(after="ftjob-none")


def test_names_of_models_and_their_folders() -> None:
    assert options.names_of("tiny", "poems", "a1") == ("ft:tiny:poems:a1", "ft-tiny-poems-a1")
    assert options.names_of("tiny", None, "a1") == ("ft:tiny::a1", "ft-tiny-a1")
    served, folder = options.names_of("x" * 128, "y" * 64, "a1b2c3d4")
    assert len(folder) <= 128 and folder.endswith("-a1b2c3d4") and served.endswith(":a1b2c3d4")
    assert options.names_of("ft:tiny:poems:a1", None, "b2")[0] == "ft:ft-tiny-poems-a1::b2"


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_servers_that_end_lose_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("LLMASOS_HOME", str(home))
    import_model(write_tiny_model(tmp_path / "m"), name="tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("fine_tuning_server.py")), str(port)]

    @contextlib.contextmanager
    def start():
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) as server:
            try:
                assert server.stdout is not None and server.stdout.readline() == b"ready\n"
                yield server
            finally:
                server.kill()

    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        with start() as server:
            job = create(client, "slow")
            wait_for_step(client, job.id, 1)
            server.send_signal(number)
            server.wait(60)
        with start() as server:
            hurry(home, job)
            done = wait(client, job.id)
            words = [one.message for one in client.fine_tuning.jobs.list_events(job.id, limit=500).data]
            server.terminate()
            server.wait(60)
    assert done.status == "succeeded" and done.fine_tuned_model.startswith("ft:tiny:")
    assert sum(one.startswith(("Training has started", "Going on")) for one in words) == 2
