"""A rank beside the first: `python -m llmasos.train.parallel.worker CONFIG`, begun by `launch`."""

from __future__ import annotations

import signal
import sys

from llmasos.errors import LLMasOSError
from llmasos.train.config import TrainConfig


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the first rank, which tells all
    from llmasos.train.run import train

    try:
        train(TrainConfig.parsed(sys.argv[1]), export=False)
    except LLMasOSError as e:
        if not getattr(e, "is_shared", False):  # that one the first rank says
            print(f"{e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
