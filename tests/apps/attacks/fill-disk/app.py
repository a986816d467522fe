import os

from tried import attack


@attack
def app() -> dict:
    for number in range(10_000):
        with open(f"file-{number}", "wb") as file:
            file.write(os.urandom(1 << 20))
        if number % 2:
            os.unlink(f"file-{number}") if number % 3 == 0 else None
    return {"filled": "done"}
