import ctypes

from tried import attack


@attack
def app() -> dict:
    ctypes.string_at(0)
