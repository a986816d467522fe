"""Stop strings, however the text is cut."""

from hypothesis import given
from hypothesis import strategies as st

from llmasos.inference.stopping import StopStrings

words = st.text(alphabet="ab", max_size=12)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    found = [(text.find(s), -len(s), s) for s in stops if s in text]
    if not found:
        return text, None
    at, _, stop = min(found)
    return (text[: at + len(stop)] if include else text[:at]), stop


@given(st.lists(words, max_size=6), stops, st.booleans())
def test_any_cut_of_a_text_gives_the_same_result(pieces: list[str], stops: list[str], include: bool) -> None:
    stream = StopStrings(stops, include=include)
    shown, seen = "", ""
    for piece in pieces:
        shown += stream.push(piece)
        seen += piece
        if stream.stopped:
            break
    if not stream.stopped:
        shown += stream.flush()
    text, stop = expected(seen, stops, include)
    # a longer stop that completes later never wins over one that already has
    assert (stream.stopped is None) == (stop is None)
    if stop is None:
        assert shown == text
    else:
        at = seen.find(stream.stopped)
        assert shown == (seen[: at + len(stream.stopped)] if include else seen[:at])
        assert at <= len(seen) - len(stream.stopped)


def test_text_is_released_as_soon_as_no_stop_can_begin() -> None:
    stream = StopStrings(["\n\nUser:"])
    assert stream.push("Hello") == "Hello"
    assert stream.push("!\n") == "!"
    assert stream.push("\nUs") == ""
    assert stream.push("e it") == "\n\nUse it"
    assert stream.stopped is None
