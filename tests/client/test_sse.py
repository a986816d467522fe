import itertools

from hypothesis import given
from hypothesis import strategies as st

from llmasos.client.sse import Event, EventParser


def parse(*pieces: bytes) -> list[Event]:
    parser = EventParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def test_an_event_ends_at_a_blank_line() -> None:
    assert parse(b"data: a\n\ndata: b\n") == [Event("a")]


def test_fields_comments_and_several_data_lines() -> None:
    stream = b": ping\nevent: note\nid: 7\ndata: one\ndata:two\ndata\nretry: 5\nunknown: x\n\n"
    assert parse(stream) == [Event("one\ntwo\n", "note", "7")]


def test_the_id_stays_and_the_event_name_does_not() -> None:
    assert parse(b"event: a\nid: 1\ndata: x\n\ndata: y\n\n") == [Event("x", "a", "1"), Event("y", "message", "1")]


def test_a_byte_order_mark_at_the_start_is_skipped() -> None:
    assert parse(b"\xef\xbb\xbfdata: x\n\n") == [Event("x")]


def test_a_name_without_data_makes_no_event() -> None:
    assert parse(b"event: a\n\n\n\ndata: x\n\n") == [Event("x")]


def test_all_three_line_ends_work_even_mixed() -> None:
    assert parse(b"data: a\r\rdata: b\r\n\r\ndata: c\n\r\n") == [Event("a"), Event("b"), Event("c")]


def test_a_line_end_split_between_pieces_is_one_line_end() -> None:
    assert parse(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n") == [Event("a\nb")]


LINES = st.sampled_from(
    [
        "data: héllo",
        "data:  two ",
        "data",
        "data:😀",
        "event: x",
        "id: 1",
        ": c",
        "",
        "",
        "x: y",
        "id: \0",
        "data: \ufeff",
    ]
)
STREAMS = st.lists(st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\r"]))).map(
    lambda lines: "".join(line + end for line, end in lines).encode()
)


def split(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(c % (len(stream) + 1) for c in cuts), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


@given(STREAMS, st.lists(st.integers(0, 10_000)))
def test_any_split_of_the_bytes_gives_the_same_events(stream: bytes, cuts: list[int]) -> None:
    assert parse(*split(stream, cuts)) == parse(stream) == parse(*(bytes([b]) for b in stream))


@given(st.binary(), st.lists(st.integers(0, 10_000)))
def test_no_bytes_can_make_it_fail_or_depend_on_the_split(stream: bytes, cuts: list[int]) -> None:
    assert parse(*split(stream, cuts)) == parse(stream)
