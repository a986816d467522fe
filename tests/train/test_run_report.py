"""report.html: whole, safe and readable, whatever the model said and whoever reads it."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmasos.train.events import Evaluation, Generated, StepReport
from llmasos.train.logs import report
from llmasos.train.logs.charts import MOST_POINTS, Curve, chart, smoothed, thinned
from llmasos.train.logs.files import Files
from llmasos.train.logs.meter import Meter
from llmasos.train.logs.report import Report, report_of, spread, write_comparison, write_report
from llmasos.train.logs.runs import open_run
from llmasos.train.logs.watch import Watch
from llmasos.train.logs.words import EN, ZH, Words, amount, duration, number

HOSTILE = '</pre><script>alert(1)</script><img src="http://evil.example/x.png">\x00\x1b[2J\u2028&amp;'


class Page(HTMLParser):
    """What a page is made of; fails at tags that do not close in their order."""

    _VOID = frozenset({"meta", "path", "circle", "img"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make(folder: Path, *, steps: int = 8, text: str = HOSTILE, **facts: Any) -> Path:
    meter = Meter(6e9, 1e15)
    known = {"name": folder.name, "method": "sft", "config": {"lr": 1e-3, "data": ["a.jsonl"]}, **facts}
    watch = Watch(meter, [Files(folder, known, meter)], [Report(folder)])
    watch.began(0, steps)
    for step in range(1, steps + 1):
        is_bad = step == 3
        watch.stepped(
            StepReport(
                step, math.nan if is_bad else 4 / step, 1.0, 1e-3, 100, 60, 0.5, "nan" if is_bad else "", {"kl": 1}
            )
        )
        if step % 4 == 0:
            samples = (Generated("Is it?", text),)
            watch.evaluated(Evaluation(step, 5 / step, 2.5 / step, 40, 0.1, samples))
    watch.ended(steps, "finished")
    return folder


def test_the_report_is_one_file_that_asks_for_nothing_and_runs_nothing(tmp_path: Path) -> None:
    text = (
        make(tmp_path / "run", data={"files": [{"file": HOSTILE, "digest": "ab" * 32}]}) / "report.html"
    ).read_text()
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "a", "base", "form"}
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "href", "style")}
    assert "url(" not in text and "@import" not in text
    policy = [meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy and "default-src 'none'" in str(policy[0]["content"])
    said = "".join(page.texts)
    assert said.count("<script>alert(1)</script>") == 3, "the answers and the file's name are there, as text"
    assert "\x1b" not in text and "\x00" not in text


def test_curves_samples_and_facts_are_there(tmp_path: Path) -> None:
    plan = {"memory": 3 * 2**30, "parts": {"weights": 2**30, "loss": 0}, "seconds": 61.0, "recompute": True}
    folder = make(tmp_path / "run", steps=8, text="It is.", plan=plan, device={"type": "cuda"})
    page = Page((folder / "report.html").read_text())
    captions = {text for text in page.texts if text in EN.values() or text == "loss.kl"}
    assert {EN["report.loss"], EN["report.bits"], EN["report.rate"], EN["report.memory"], "loss.kl"} <= captions
    assert "MFU" in page.texts and "finished" in page.texts and "lr" in page.texts
    assert {"planned", "measured", "3.0 GiB", "weights", "1.0 GiB", "1:01", "4.0 s", "recompute"} <= set(page.texts)
    assert EN["report.off"] in page.texts and "+1425.0%" in page.texts
    assert [a for a in page.all("details") if "open" in a] == [{"open": None}] and len(page.all("details")) == 2
    assert page.texts.index("after step 8") < page.texts.index("after step 4")
    assert "It is." in page.texts and EN["report.skipped"] in page.texts


def test_it_is_told_to_those_who_do_not_see_it(tmp_path: Path) -> None:
    page = Page((make(tmp_path / "run", text="It is.") / "report.html").read_text())
    ids = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert svg["aria-labelledby"] in ids and svg["aria-describedby"] in ids
    assert any("from 4 at step 1 to 0.5 at step 8; lowest 0.5, highest 4" in text for text in page.texts)
    assert all(th.get("scope") in ("col", "row") for th in page.all("th"))
    [html] = page.all("html")
    assert html["lang"] == "en" and page.all("main") and len(page.all("h1")) == 1


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_and_curves_stand_out_from_what_they_are_on(theme: str, tmp_path: Path) -> None:
    """WCAG 2.2: 4.5 for texts, 3 for graphics."""
    text = (make(tmp_path / "run") / "report.html").read_text()
    themes = re.findall(r":root\{([^}]*)\}", text)
    colours = dict(re.findall(r"--(\w+):(#\w+)", themes[theme == "dark"]))

    def light(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((light(colours[a]), light(colours[b])))
        return (high + 0.05) / (low + 0.05)

    for ground in ("page", "card"):
        assert min(contrast(name, ground) for name in ("text", "soft")) >= 4.5
        assert min(contrast(name, ground) for name in ("line", "dots", "r2", "r3", "r4", "r5")) >= 3


def test_it_speaks_the_language_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "run", text="是。")
    monkeypatch.setenv("LLMASOS_LANG", "zh")
    page = Page(write_report(folder).read_text())
    assert page.all("html")[0]["lang"] == "zh-CN" and ZH["report.curves"] in page.texts and "是。" in page.texts
    assert EN["report.curves"] in Page(write_report(folder, tmp_path / "x.html", language="en").read_text()).texts
    assert EN.keys() == ZH.keys()
    assert all(set(re.findall(r"\{(\w+)\}", EN[k])) == set(re.findall(r"\{(\w+)\}", ZH[k])) for k in EN)


def test_a_run_that_has_nothing_yet_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: x")
    assert EN["report.none"] in Page(report_of(open_run(tmp_path), Words("en"))).texts


def test_runs_are_drawn_in_one_picture(tmp_path: Path) -> None:
    runs = [open_run(make(tmp_path / name, steps=steps)) for name, steps in (("a<b", 8), ("c", 4))]
    page = Page(write_comparison(runs, tmp_path / "both.html").read_text())
    kinds = {str(path.get("class")) for path in page.all("path")}
    assert {"run0", "run1"} <= kinds and page.texts.count("a<b") >= 3 and "a<b – c" in page.texts


def test_long_curves_keep_their_peaks_and_become_short() -> None:
    points = [(float(i), math.sin(i)) for i in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    few = thinned(points)
    assert len(few) <= MOST_POINTS and (54_321.0, 99.0) in few and few == sorted(few)
    assert len(chart("x", "t", "a", [Curve("c", points)])) < 40_000
    assert thinned(points[:10]) == points[:10]


def test_a_long_run_has_a_report_of_bounded_size(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: x")
    line = json.dumps({"step": 0, "loss": 1.0, "bits_per_byte": 1.0, "samples": [{"prompt": "p" * 500, "text": "t"}]})
    lines = [line.replace(": 0,", f": {step},", 1) for step in range(5000)]
    (tmp_path / "evaluations.jsonl").write_text("\n".join(lines))
    text = report_of(open_run(tmp_path), Words("en"))
    assert len(text) < 400_000 and "after step 4,999" in text and "after step 0" in text
    assert spread(range(10), 4) == [0, 3, 6, 9] and spread([1, 2], 4) == [1, 2]


def test_evaluations_rewrite_the_report_no_more_often_than_its_share_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[float] = []
    now = 0.0

    def write(folder: Path) -> None:
        nonlocal now
        written.append(now)
        now += 1.0

    monkeypatch.setattr(report, "write_report", write)
    one = Report(tmp_path, clock=lambda: now)
    for _ in range(10):
        one.evaluated(Evaluation(1, 1.0, None, 1, 0.1))
        now += 10.0
    one.ended(1, "finished")
    assert written == [0.0, 1.0 + 1.0 / report.SHARE, 102.0], "one second of writing, fifty of training, and at the end"


def test_charts_of_odd_numbers_are_drawn_or_left_out() -> None:
    assert chart("x", "t", "a", [Curve("c", [(1.0, math.nan), (2.0, math.inf)])]) == ""
    flat = chart("x", "t", "a", [Curve("c", [(1.0, 5.0)])])
    assert "circle" in flat and "nan" not in flat
    huge = chart("x", "t", "a", [Curve("c", [(0.0, -1e30), (1e9, 1e30)])])
    assert not re.search(r"nan|inf", huge)
    heights = [
        float(y)
        for y in re.findall(r" (\d+\.\d)(?:L|\")", chart("x", "t", "a", [Curve("c", [(0, 0), (1, 1), (2, 4)])]))
    ]
    assert heights[-3:] == sorted(heights[-3:], reverse=True), "greater is higher"


def test_the_smooth_curve_begins_without_bias_and_skips_gaps() -> None:
    assert smoothed([(1.0, 7.0), (2.0, math.nan), (3.0, 7.0)]) == [(1.0, 7.0), (3.0, 7.0)]
    noisy = smoothed([(float(i), 10.0 + (-1) ** i) for i in range(1000)])
    assert max(abs(y - 10) for _, y in noisy[100:]) < 0.1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *((None, "–"), (math.nan, "–"), (math.inf, "∞"), (-math.inf, "-∞"), (0, "0"), (12345.6, "12,346")),
        *((6946, "6,946"), (2.28399, "2.284"), (0.0002, "2.00e-04")),
    ],
)
def test_numbers_for_people(value: float | None, said: str) -> None:
    assert number(value) == said


def test_times_and_sizes_for_people() -> None:
    assert [duration(s) for s in (0.04, 59.94, 59.96, 61, 3600 + 62)] == ["0.0 s", "59.9 s", "1:00", "1:01", "1:01:02"]
    assert [amount(b) for b in (5 * 2**20, 3 * 2**29)] == ["5 MiB", "1.5 GiB"]
