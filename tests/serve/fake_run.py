"""Stands for `python -m llmasos.train.process`: ten steps, told as that tells them, without torch.

It saves after each fifth step and when it is stopped, and goes on from there. The first line of its data chooses how it
behaves: "slow" waits between steps, "die" ends without a word after three steps, "wrong" refuses the data.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import yaml

from llmasos.errors import FormatError, error_facts

STEPS = 10


def main() -> int:
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    assert sys.argv[2] == "--with-parent"
    run, job = Path(config["output"]), config["job"]
    first = Path(config["data"][0]).read_text().splitlines()[0]
    place = run / "place"
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    threading.Thread(target=lambda: stopping.append(os.read(0, 1)), daemon=True).start()

    def tell(type: str, **fields: object) -> None:
        line = json.dumps({"type": type, "at": time.time(), **fields})
        with (run / "events.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    if "wrong" in first:
        tell("error", **error_facts(FormatError(f"{config['data'][0]}:1: no assistant speaks.", hint="Add a turn.")))
        return 4
    step = int(place.read_text()) if place.exists() else 0
    if not place.exists():
        tell("settled", num_samples=7, num_epochs=3.0, batch_size=job.get("batch_size", 4),
             learning_rate_multiplier=job.get("learning_rate_multiplier", 1.0), lr=2e-4)  # fmt: skip
    tell("began", step=step, steps=STEPS)
    while step < STEPS:
        if stopping:
            place.write_text(str(step))
            tell("stopped", step=step)
            return 75
        step += 1
        tell("step", step=step, steps=STEPS, loss=10.0 / step, lr=1e-4, gradient_norm=1.0, num_trained=5,
             trained_tokens=5 * step, seconds=0.01, skipped="")  # fmt: skip
        if "die" in first and step == 3 and not (run / "died").exists():
            (run / "died").touch()
            print("out of luck", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if step % 5 == 0:
            (run / "checkpoints" / f"{step:06d}").mkdir(parents=True)
            place.write_text(str(step))
            tell("evaluation", step=step, loss=11.0 / step, bits_per_byte=1.0)
            tell("checkpoint", step=step, train_loss=10.0 / step, valid_loss=11.0 / step, model=None)
        if "slow" in first and not (run / "hurry").exists():
            time.sleep(0.05)
            if step == STEPS - 1:
                step -= 1  # only a stop ends it
    tell("result", reason="finished", step=step, trained_tokens=5 * step, model=job["serves_as"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
