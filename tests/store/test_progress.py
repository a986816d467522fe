"""What a program without a progress callback of its own sees."""

import pytest

from llmasos.store import progress
from llmasos.store.progress import PrintProgress
from llmasos.store.transfer import Progress


def test_messages_come_at_once_and_a_long_step_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    report = PrintProgress()
    report(Progress("note", message="GPT-3's weights are not public."))
    for second in range(12):
        now = 100.0 + second
        report(Progress("download", "model.gguf", done=second * 1_000_000, total=12_000_000))
    report(Progress("done", message="gpt is installed"))
    assert capsys.readouterr().err.splitlines() == [
        "GPT-3's weights are not public.",
        "download: 5.0 of 12.0 MB",
        "download: 10.0 of 12.0 MB",
        "gpt is installed",
    ]
