"""What crosses between a model's process and its parent: the same after the way, and never more than a message."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmasos import errors
from llmasos.errors import ContextOverflowError, InvalidInputError, LLMasOSError, ProviderError, ServerError
from llmasos.inference.host import messages as wire
from llmasos.inference.request import SamplingParams, StructuredOutput
from llmasos.inference.state import AdapterInfo, Beam, EngineStats, Output, RawLogprob, Request, RequestState
from llmasos.models.config import ModelConfig, RopeScaling
from llmasos.store.transfer import Progress

CONFIG = ModelConfig("LlamaForCausalLM", "llama", 100, 32, 64, 2, 4, 2, 8, 256, rope_scaling=RopeScaling("yarn", 4.0))
ORDERS: list[wire.Order] = [
    wire.Submit(1, [1, 2, 3], {"temperature": 0.5, "logit_bias": {3: float("-inf")}}, 5, cache_salt="s"),
    wire.Abort(1),
    wire.Finish(2, 3),
    wire.Pause(4, True),
    wire.Embed(5, [[1], [2, 3]], None, True),
    wire.FillMask(6, [1, 2], 5),
    wire.Classify(7, [[1, 2]], [[0, 1]]),
    wire.LoadAdapter(8, "a", None),
    wire.UnloadAdapter(9, "a"),
    wire.Sleep(10),
    wire.WakeUp(11),
    wire.Stop(),
]
PART = wire.Part(
    3, 1, [4], [(4, -0.5, [(4, -0.5), (5, -1.0)])], "stop", 4, True, True, None, [([1, 2], -1.0, True)], 0.25, 7
)
NEWS: list[wire.News] = [
    wire.Working(Progress("load", total=7)),
    wire.Located("/m"),
    wire.Loaded(CONFIG, {"top_k": 3}, {}, "cpu", "float32", [AdapterInfo("a", Path("/a"), None, 4, 0)]),
    wire.Failed(wire.Problem(["ServerError"], "no")),
    wire.Step([1, 2], [7, 8], [PART], EngineStats(num_steps=4, kv_cache_usage=0.5)),
    wire.Result(3, [[0.5, 1.5]]),
    wire.Status(EngineStats(), [AdapterInfo("a", Path("/a"), 1, 4, 2)], 5, 6),
    wire.Beat(1.5),
    wire.Log(20, "hello"),
]
DECODERS: list[Callable[[bytes], Any]] = [wire.decode_order, wire.decode_news, wire.decode_setup]


@pytest.mark.parametrize("message", [*ORDERS, *NEWS], ids=lambda m: type(m).__name__)
def test_a_message_is_the_same_after_the_way(message: Any) -> None:
    decode = wire.decode_order if message in ORDERS else wire.decode_news
    assert decode(wire.encode(message)) == message


def test_every_kind_of_message_is_tried() -> None:
    named = {type(message) for message in (*ORDERS, *NEWS)}
    assert named == set(wire.Order.__args__) | set(wire.News.__args__)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_malformed(frame: bytes) -> None:
    check(frame)


@given(st.sampled_from([wire.encode(m) for m in (*ORDERS, *NEWS)]), st.data())
def test_a_damaged_message_is_a_message_or_malformed(frame: bytes, data: st.DataObject) -> None:
    damaged = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    check(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.sampled_from([type(m) for m in (*ORDERS, *NEWS)]), st.lists(VALUES, max_size=8))
def test_any_values_under_a_known_name_are_a_message_or_malformed(kind: type, values: list[Any]) -> None:
    check(msgspec.msgpack.encode([kind.__struct_config__.tag, *values]))  # type: ignore[attr-defined]


def check(frame: bytes) -> None:
    for decode in DECODERS:
        try:
            message = decode(frame)
        except wire.MalformedError as error:
            assert str(len(frame)) in error.message or "tokens" in error.message
        else:
            assert wire.encode(message)


@pytest.mark.parametrize("deep", [b"\x91" * 50_000 + b"\xc0", b"\x81\xa0" * 50_000 + b"\xc0"], ids=["lists", "maps"])
def test_no_depth_of_nesting_overflows_the_stack(deep: bytes) -> None:
    for decode in DECODERS:
        with pytest.raises(wire.MalformedError):
            decode(deep)
    with pytest.raises(wire.MalformedError):
        wire.decode_news(b"\x92\xa6result\x01" + deep)


def test_a_step_with_unequal_halves_is_malformed() -> None:
    with pytest.raises(wire.MalformedError, match="2 requests and 1 tokens"):
        wire.decode_news(wire.encode(wire.Step([1, 2], [3], [], EngineStats())))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(n=2, seed=1 << 80, stop=("a", "b"), include_stop=True, logit_bias={5: float("-inf"), 6: 1.5}),
        SamplingParams(max_tokens=1 << 70, stop_token_ids=(1, 2), logprobs=0, prompt_logprobs=3, ignore_eos=True),
        SamplingParams(temperature=0, num_beams=3, n=2, length_penalty=0.5, early_stopping=True),
        SamplingParams(structured=StructuredOutput(json={"type": "object"})),
        SamplingParams(structured=StructuredOutput(choice=("a", "b"))),
    ],
)
def test_parameters_are_the_same_after_the_way(params: SamplingParams) -> None:
    request = Request((1, 2), params, 7, priority=-3, adapter="a", cache_salt=5, score_from=1)
    found = wire.request_of(wire.decode_order(wire.encode(wire.submit_of(9, request))))
    for name in ("prompt", "params", "max_tokens", "priority", "adapter", "cache_salt", "score_from"):
        assert getattr(found, name) == getattr(request, name)


@given(st.dictionaries(st.sampled_from([*vars(SamplingParams()), "other"]), VALUES, max_size=3))
@example({"top_k": ""})
@example({"seed": "9" * 5000})
def test_parameters_that_are_none_are_refused(params: dict[str, Any]) -> None:
    try:
        wire.request_of(wire.Submit(1, [1], params, 1))
    except LLMasOSError as error:
        assert error.message


def test_what_has_no_place_in_a_message_is_refused() -> None:
    for salt in (("a",), 1 << 64, object()):
        with pytest.raises(InvalidInputError, match="cache_salt"):
            wire.submit_of(1, Request((1,), SamplingParams(), 1, cache_salt=salt))
    with pytest.raises(InvalidInputError, match="can't be sent"):
        wire.encode(wire.submit_of(1, Request((1,), SamplingParams(), 1, priority=1 << 70)))


ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, LLMasOSError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_the_same_after_the_way(kind: type[LLMasOSError]) -> None:
    error = ContextOverflowError(5, 6, 7) if kind is ContextOverflowError else kind("what", hint="then")
    found = after_the_way(error)
    simple = {name: value for name, value in vars(error).items() if not isinstance(value, list)}
    assert type(found) is kind and vars(found) == simple and str(found) == str(error)
    assert found.http_status == error.http_status and found.args == error.args


def after_the_way(error: BaseException) -> LLMasOSError:
    news = wire.decode_news(wire.encode(wire.Failed(wire.problem_of(error))))
    assert isinstance(news, wire.Failed)
    return wire.error_of(news.problem)


class StrangeError(ProviderError):
    def __init__(self) -> None:
        super().__init__("strange", status=418)
        self.detail = object()


def test_an_error_that_is_not_known_there_becomes_the_nearest_that_is() -> None:
    found = after_the_way(StrangeError())
    assert type(found) is ProviderError and found.status == 418 and not hasattr(found, "detail")
    found = after_the_way(ZeroDivisionError("by zero"))
    assert type(found) is ServerError and "ZeroDivisionError: by zero" in found.message
    assert type(wire.error_of(wire.Problem(["os", "annotations"], "no"))) is ServerError


def test_an_output_says_once_what_is_known_of_its_prompt() -> None:
    state = RequestState(Request((1, 2), SamplingParams(), 4, arrival=1.0), first_scheduled=1.5, num_cached=1)
    state.prompt_logprobs[1] = RawLogprob(2, -0.5, ((2, -0.5),)), True
    output = Output(state, 0, [3], [RawLogprob(3, -1.0)], "stop", 3, True, True, None, [Beam((3,), -1.0, True)])
    first, later = wire.part_of(7, output, first=True), wire.part_of(7, output, first=False)
    assert first.queue_seconds == 0.5 and first.num_cached == 1 and len(first.prompt_logprobs) == 1
    assert later.queue_seconds is None and later.prompt_logprobs == []
    assert wire.logprob_of(first.prompt_logprobs[0][1]) == RawLogprob(2, -0.5, ((2, -0.5),))
    assert first.beams is not None and wire.beams_of(first.beams) == output.beams
