import os
from pathlib import Path

from tried import attack, facts, tried


@attack
def app() -> dict:
    data = Path(os.environ["LLMASOS_APP_DATA"])
    target = Path(facts["secret"]).parent
    for name in ("all", "config.json", ".llmasos", "documents.json", "current"):
        (data / name).unlink(missing_ok=True)
        (data / name).symlink_to(target)
    (data / "deep").mkdir(exist_ok=True)
    return tried(
        in_place_of_its_folder=lambda: (data.rename(data.with_name("moved")), data.symlink_to(target)),
        through_all=lambda: (data / "all" / "planted").write_text("x"),
    )
