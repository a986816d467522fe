"""Fine-tuning with nothing faked: a server as `llmasos serve` runs it, killed in the middle of a job."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from llmasos.store import import_model
from tiny import write_tiny_model


@contextmanager
def server(port: int, log: Path):
    command = [sys.executable, "-m", "llmasos", "serve", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("ab") as words, subprocess.Popen(command, stdout=words, stderr=words, env=os.environ) as process:
        try:
            until = time.monotonic() + 120
            while True:
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(120)


def until_it(client, id, holds, seconds=240):
    end = time.monotonic() + seconds
    while not holds(job := client.fine_tuning.jobs.retrieve(id)):
        assert time.monotonic() < end and job.status != "failed", job
        time.sleep(0.05)
    return job


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_of_a_server_that_was_killed_ends_as_a_model_that_answers(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_model(write_tiny_model(tmp_path / "m"), name="tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pairs = [(f"What is {i}?", "It is Paris.") for i in range(20)]
    rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    options = {"device": "cpu", "dtype": "float32", "steps": 40, "save_every": 5, "lr": 0.02, "schedule": "constant"}
    options |= {"max_length": 64, "batch_tokens": 64}
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        jobs = client.fine_tuning.jobs
        with server(port, tmp_path / "log") as process:
            file = client.files.create(file=("chats.jsonl", data), purpose="fine-tune")
            job = jobs.create(model="tiny", training_file=file.id, suffix="cities", extra_body={"llmasos": options})
            until_it(client, job.id, lambda now: (now.llmasos.get("step") or 0) >= 6)
            process.send_signal(signal.SIGKILL)
            process.wait()
        with server(port, tmp_path / "log"):
            job = until_it(client, job.id, lambda now: now.status == "succeeded")
            question = [{"role": "user", "content": "What is 7?"}]
            words = {
                name: client.chat.completions.create(model=name, messages=question, max_tokens=8, temperature=0)
                for name in (job.fine_tuned_model, "tiny")
            }
            listed = {one.id: one for one in client.models.list()}
            messages = [one.message for one in jobs.list_events(job.id, limit=100).data]
            checkpoints = jobs.checkpoints.list(job.id).data
            before = checkpoints[1].fine_tuned_model_checkpoint
            assert client.chat.completions.create(model=before, messages=question, max_tokens=1).choices
            second = jobs.create(
                model="tiny", training_file=file.id, extra_body={"llmasos": options | {"steps": 10**6}}
            )
            until_it(client, second.id, lambda now: (now.llmasos.get("step") or 0) >= 1)
            assert jobs.cancel(second.id).status == "cancelled"
    assert job.fine_tuned_model.startswith("ft:tiny:cities:")
    assert words[job.fine_tuned_model].choices[0].message.content == "It is Paris."
    assert words["tiny"].choices[0].message.content != "It is Paris."
    assert listed[job.fine_tuned_model].parent == "tiny"
    assert any(one.startswith("Going on from step") for one in messages)
    assert any(one.startswith("Step 40/40: training loss=") for one in messages)
    assert checkpoints[0].step_number == 40 and checkpoints[0].metrics.train_loss < 4
    assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model
