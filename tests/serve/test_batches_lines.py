"""Input lines of batches and their ledger: parsers of outside bytes, and what survives a crash."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmasos.client.types.files import BatchError
from llmasos.serve.batches import lines
from llmasos.serve.batches.ledger import Ledger
from llmasos.serve.batches.lines import Line, LineError, check, parse, read

URL = "/v1/chat/completions"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": st.text(max_size=5) | JSON,
        "method": st.just("POST") | JSON,
        "url": st.just(URL) | JSON,
        "body": st.fixed_dictionaries({"model": st.text()}) | JSON,
        "extra": JSON,
    },
)


def line(**fields):
    return {"custom_id": "a", "method": "POST", "url": URL, "body": {"model": "m"}} | fields


def encoded(value) -> bytes:
    return json.dumps(value).encode()


@settings(max_examples=300)
@given(st.binary(max_size=80) | FIELDS.map(encoded) | JSON.map(encoded))
def test_any_line_is_a_request_or_an_error_with_its_number(raw: bytes) -> None:
    try:
        found = parse(7, raw, URL)
    except LineError as e:
        assert e.error.line == 7 and e.error.code and e.error.message
        assert e.custom_id is None or isinstance(e.custom_id, str)
    else:
        value = json.loads(raw)
        assert found == Line(7, value["custom_id"], value["body"])
        assert found.custom_id and value["url"] == URL and isinstance(value["body"]["model"], str)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["a", "b", "c", "", None]), max_size=8), st.sampled_from([b"\n", b"\r\n"]), st.booleans()
)
def test_lines_are_numbered_as_an_editor_numbers_them(tmp_path: Path, ids, end: bytes, last_end: bool) -> None:
    """None stands for a blank line."""
    path = tmp_path / "in.jsonl"
    text = end.join(b"" if id is None else encoded(line(custom_id=id)) for id in ids)
    path.write_bytes(b"\xef\xbb\xbf" + text + end * last_end)
    expected, seen = [], {}
    for number, id in enumerate(ids, start=1):
        if id is None:
            continue
        code = "invalid_value" if id == "" else "duplicate_custom_id" if id in seen else None
        seen.setdefault(id, number)
        expected.append((number, code))
    found = [(x.number, None) if isinstance(x, Line) else (x.error.line, x.error.code) for x in read(path, URL)]
    assert found == expected


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[]", "invalid_json_line", None),
        (b'"\xff"', "invalid_json_line", None),
        (b'{"a": NaN}', "invalid_json_line", None),
        (b"[" * 100_000, "invalid_json_line", None),
        (b'{"a": 1%s}' % (b"0" * 5000), "invalid_json_line", None),
        (encoded(line(custom_id=None)), "invalid_type", "custom_id"),
        (encoded(line(custom_id="x" * 513)), "invalid_value", "custom_id"),
        (encoded(line(method="GET")), "invalid_value", "method"),
        (encoded(line(url="/v1/embeddings")), "mismatched_url", "url"),
        (encoded(line(body=[])), "invalid_type", "body"),
        (encoded(line(body={})), "missing_required_parameter", "body.model"),
        (encoded({"custom_id": "a"}), "missing_required_parameter", "method"),
        (encoded(line(colour="red")), "unknown_parameter", "colour"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(raw: bytes, code: str, param) -> None:
    with pytest.raises(LineError) as wrong:
        parse(3, raw, URL)
    error = wrong.value.error
    assert (error.code, error.param, error.line) == (code, param, 3)


def test_a_file_is_checked_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(encoded(line(custom_id=str(i), body={"model": f"m{i % 2}"})) for i in range(6)))
    report = check(path, URL)
    assert (report.total, report.models, report.errors) == (6, {"m0": 1, "m1": 2}, [])
    monkeypatch.setattr(lines, "MAX_LINES", 5)
    [(error, _)] = check(path, URL).errors
    assert error.code == "too_many_requests"
    path.write_bytes(b"\n \n")
    [(error, _)] = check(path, URL).errors
    assert error.code == "empty_file"


def test_a_line_that_is_too_long_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 200)
    path = tmp_path / "in.jsonl"
    path.write_bytes(encoded(line(body={"model": "m" * 700})) + b"\n" + encoded(line(custom_id="b")))
    long, good = read(path, URL)
    assert (long.error.code, long.error.line) == ("line_too_long", 1)
    assert (good.custom_id, good.number) == ("b", 2)


ENTRIES = st.lists(st.tuples(st.text(min_size=1, max_size=6), st.sampled_from([200, 400, None])), max_size=6)


@settings(max_examples=60)
@given(ENTRIES, st.integers(0, 300), st.binary(max_size=20))
def test_what_a_crash_cut_short_is_cut_off_and_the_rest_is_done(tmp_path: Path, entries, cut: int, junk: bytes) -> None:
    """`cut` bytes are missing at the end of the output file, and there may be junk, as after a power cut."""
    output, errors = tmp_path / "out", tmp_path / "err"
    output.unlink(missing_ok=True)
    errors.unlink(missing_ok=True)
    ledger = Ledger(output, errors)
    for id, status in entries:
        if status is None:
            ledger.failed(id, BatchError(code="x", message="y"))
        else:
            ledger.answered(id, status, "req_1", b'{"usage": {"prompt_tokens": 3, "completion_tokens": 2}}')
    before = output.read_bytes()
    ledger.close()
    kept = before[: max(0, len(before) - cut)]
    output.write_bytes(kept + junk.replace(b"\n", b""))
    again = Ledger(output, errors)
    whole = [json.loads(raw) for raw in kept.split(b"\n")[:-1]]
    failed = [id for id, status in entries if status != 200]
    assert again.done == {entry["custom_id"] for entry in whole} | set(failed)
    assert (again.num_completed, again.num_failed) == (len(whole), len(failed))
    assert again.usage.total_tokens == 5 * len(whole)
    again.answered("after", 200, "req_2", b"{}")
    again.close()
    assert [json.loads(raw)["custom_id"] for raw in output.read_bytes().splitlines()][-1] == "after"


def test_empty_ledgers_leave_no_files(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "out", tmp_path / "err")
    ledger.failed("a", BatchError(code="x", message="y"))
    ledger.clear()
    assert ledger.done == set() and not ledger.has_errors
    ledger.close()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_half_a_line_keeps_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    from llmasos.errors import DiskFullError

    ledger = Ledger(tmp_path / "out", tmp_path / "err")
    ledger.answered("a", 200, "r", b"{}")
    real, calls = os.write, []

    def half(fd, data):
        calls.append(fd)
        if len(calls) == 1:
            return real(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(DiskFullError):
            ledger.answered("b", 200, "r", b"{}")
    ledger.answered("c", 200, "r", b"{}")
    ledger.close()
    found = [json.loads(raw)["custom_id"] for raw in (tmp_path / "out").read_bytes().splitlines()]
    assert found == ["a", "c"] and ledger.done == {"a", "c"}
