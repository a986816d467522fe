"""How many completions a model and a key may have in flight, and what those refused are told."""

import pytest

from llmasos.errors import InvalidInputError
from llmasos.inference.host.lending import QueueFullError
from llmasos.serve.admission import MOST_SECONDS, PACE_SECONDS, Admission, CallerQueueFullError
from llmasos.serve.caller import Caller

ANYONE, ANN, BOB = Caller(), Caller(key_id="ann"), Caller(key_id="bob")


class Line:
    """An admission with a clock."""

    def __init__(self, at_once=2, max_waiting=4):
        self.now = 0.0
        self.at_once = at_once
        self.admission = Admission("m", lambda: self.at_once, max_waiting, lambda: self.now)
        self.inside = []

    def enter(self, num=1, caller=ANYONE):
        entered = self.admission.admit(num, caller)
        entered.__enter__()
        self.inside.append(entered)

    def leave(self):
        self.inside.pop(0).__exit__(None, None, None)


def test_as_many_as_run_and_may_wait_are_let_in_and_more_when_there_are_more_copies() -> None:
    line = Line()
    for _ in range(6):
        line.enter()
    with pytest.raises(QueueFullError, match="6 completions of m are running or waiting") as caught:
        line.enter()
    assert caught.value.http_status == 503
    line.at_once = 4
    line.enter()
    line.enter()
    for _ in range(8):
        line.leave()
    assert line.admission.num_in_flight == 0


def test_a_request_that_never_fits_is_wrong_and_not_early() -> None:
    line = Line()
    with pytest.raises(InvalidInputError, match="asks for 7 completions; m takes 6") as caught:
        line.enter(7)
    assert caught.value.param == "n" and line.admission.num_in_flight == 0
    line.enter(6)


def test_a_request_that_was_let_in_counts_until_its_end_even_when_it_fails() -> None:
    line = Line()
    with pytest.raises(ValueError), line.admission.admit(3, ANN):
        assert line.admission.num_in_flight == 3
        raise ValueError
    assert line.admission.num_in_flight == 0


def test_one_key_cannot_take_the_whole_line() -> None:
    line = Line()
    for _ in range(4):
        line.enter(caller=ANN)
    with pytest.raises(CallerQueueFullError, match=r"4 completions of m .* for this key") as caught:
        line.enter(caller=ANN)
    assert caught.value.http_status == 429 and caught.value.retry_after == 1
    line.enter(caller=BOB)
    line.leave()
    line.enter(caller=ANN)
    line.enter(caller=BOB)
    with pytest.raises(QueueFullError) as caught:
        line.enter(caller=BOB)
    assert caught.value.http_status == 503


def test_callers_without_a_key_have_the_line_for_themselves() -> None:
    line = Line()
    for _ in range(6):
        line.enter()
    assert line.admission.num_in_flight == 6


def test_who_is_refused_comes_back_when_those_that_wait_will_have_been_answered() -> None:
    line = Line()
    for _ in range(6):
        line.enter()
    assert line.admission.retry_after() == 1  # nothing is known yet
    line.now = 10.0
    line.leave()
    line.now = 20.0
    line.leave()
    line.enter()
    line.enter()
    assert line.admission.retry_after() == 20  # 4 wait; 2 ended in 10 seconds
    line.now = 20.0 + PACE_SECONDS
    assert line.admission.retry_after() == MOST_SECONDS  # 4 wait; 1 ended in a minute
    line.now += 1
    assert line.admission.retry_after() == 1
