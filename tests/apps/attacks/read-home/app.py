from pathlib import Path

from tried import attack, every, facts, tried


@attack
def app() -> dict:
    home = Path(facts["home"])
    Path("link").unlink(missing_ok=True)
    Path("link").symlink_to(facts["secret"])
    return tried(
        secret=lambda: Path(facts["secret"]).read_text(),
        through_a_link=lambda: Path("link").read_text(),
        up_from_here=lambda: Path("..", "..", "..", Path(facts["secret"]).name).read_text(),
        database=lambda: every(home.glob("*.db"), Path.read_bytes),
        list_of_the_home=lambda: sum(1 for _ in home.iterdir() if _.name not in ("apps", "cache")) or every([], None),
        another_app=lambda: every([home / "apps" / "victim" / "data" / "diary"], Path.read_text),
        another_apps_code=lambda: every((home / "apps" / "victim").glob("*/app.py"), Path.read_text),
        ssh_keys=lambda: every(
            [Path("/", "root", ".ssh"), Path("/home")], lambda path: list(path.iterdir()) or every([], None)
        ),
        passwords=lambda: Path("/etc/shadow").read_text(),
    )
