import os
from pathlib import Path

from tried import app


@app.route("/read")
def read() -> str:
    """Read."""
    diary = Path("diary")
    if not diary.exists():
        diary.write_text("nobody may read this")
    return diary.read_text()


@app.route("/pid")
def pid() -> int:
    """Its number."""
    return os.getpid()
