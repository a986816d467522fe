import os
import shutil
from pathlib import Path

from tried import attack, facts, tried


@attack
def app() -> dict:
    home = Path(facts["home"])
    secret = Path(facts["secret"])
    return tried(
        new_file=lambda: (secret.parent / "planted").write_text("x"),
        append=lambda: secret.open("a").write("x"),
        delete=lambda: secret.unlink(),
        move=lambda: os.rename(secret, "mine"),
        its_own_code=lambda: Path(__file__).write_text("x"),
        a_new_version_of_itself=lambda: (home / "apps" / "write-outside" / "current").write_text("9"),
        its_environment=lambda: Path(os.__file__).open("r+"),
        another_app=lambda: (home / "apps" / "victim" / "data" / "planted").write_text("x"),
        the_systems_programs=lambda: Path("/usr/local/bin/planted").write_text("x"),
        times=lambda: os.utime(secret, (0, 0)),
        the_whole_home=lambda: shutil.rmtree(home / "apps" / "victim"),
    )
