"""A rank beside the first: `python -m llmasos.train.worker CONFIG`, begun by `parallel.launch`."""

from __future__ import annotations

import os
import signal
import sys
import threading

from llmasos.errors import LLMasOSError
from llmasos.train.config import TrainConfig, how_to_resume


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the first rank, which tells all
    config = TrainConfig.parsed(sys.argv[1])
    # before what takes long to import: a first rank that is gone by then would leave this one behind
    threading.Thread(target=_end_with_the_first, args=(config,), daemon=True).start()
    from llmasos.train.run import train

    try:
        train(config, export=False)
    except LLMasOSError as e:
        if not getattr(e, "is_shared", False):  # that one the first rank says
            print(f"{e}", file=sys.stderr)
        return e.exit_code
    return 0


def _end_with_the_first(config: TrainConfig) -> None:
    """Standard input ends with the process that holds it."""
    while os.read(0, 4096):
        pass
    words = f"Process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} ends: process 0 is gone. "
    os.write(2, f"{words}{how_to_resume(config.name)}\n".encode())
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
