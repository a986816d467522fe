"""A server whose fine-tuning is faked, for tests that kill it: `python fine_tuning_server.py PORT`."""

import sys
from pathlib import Path

from fake_llm import FakeLLM

from llmasos.apps.hosting import listen, run
from llmasos.serve import create_app
from llmasos.serve.finetuning import child

if __name__ == "__main__":
    child.COMMAND = (sys.executable, str(Path(__file__).with_name("fake_run.py")))
    with listen("127.0.0.1", int(sys.argv[1])) as listener:
        run(create_app(FakeLLM("tiny")), listener, grace=1, ready=lambda: print("ready", flush=True), lifespan="on")
