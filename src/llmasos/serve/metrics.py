"""Numbers for Prometheus, under vLLM's names with our prefix.

What the engines count is read when somebody asks; durations are observed as requests end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmasos.inference.request import RequestMetrics

if TYPE_CHECKING:
    from llmasos.inference.state import EngineStats

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
"""Bounds of the histograms."""
_LABELS = ("model_name",)
_GAUGES = (
    ("num_requests_running", "Completions that are being computed.", "num_running"),
    ("num_requests_waiting", "Completions that wait for their turn.", "num_waiting"),
    ("kv_cache_usage_perc", "Share of the pages of keys and values in use; 1 is all.", "kv_cache_usage"),
)
_COUNTERS = (
    ("prompt_tokens", "Prompt tokens of the requests that began.", "num_asked_tokens"),
    ("generation_tokens", "Tokens generated.", "num_generated_tokens"),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "num_asked_tokens"),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", "num_cached_tokens"),
    ("num_preemptions", "Completions set back for want of pages.", "num_preemptions"),
    ("spec_decode_num_draft_tokens", "Tokens that speculation proposed.", "num_draft_tokens"),
    ("spec_decode_num_accepted_tokens", "Proposed tokens that were accepted.", "num_accepted_tokens"),
)


class Counts(Protocol):
    """What is read of a model."""

    @property
    def stats(self) -> EngineStats: ...


class Watch:
    """The end of one HTTP request's completions."""

    def __init__(self, metrics: Metrics, model: str, num: int) -> None:
        self._metrics, self._model, self.num_left = metrics, model, num

    def end(self, reason: str, num: int = 1) -> None:
        self.num_left -= num
        self._metrics.ends.labels(self._model, reason).inc(num)

    def measure(self, took: RequestMetrics) -> None:
        metrics, model = self._metrics, self._model
        metrics.queue.labels(model).observe(took.queue_seconds)
        metrics.first.labels(model).observe(took.time_to_first_token)
        metrics.whole.labels(model).observe(took.time_to_first_token + took.decode_seconds)
        if took.num_output_tokens > 1:
            metrics.token.labels(model).observe(took.time_per_output_token)


class Metrics(Collector):
    """The numbers of all models of one server."""

    def __init__(self) -> None:
        self._models: dict[str, Counts] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.ends = Counter(
            "llmasos:request_success",
            "Completions by how they ended: stop, length, abort, error.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        self.queue = self._histogram("request_queue_time_seconds", "From arrival to the first pass.")
        self.first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.token = self._histogram("request_time_per_output_token_seconds", "Per token after a request's first.")
        self.whole = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.")

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(f"llmasos:{name}", about, _LABELS, buckets=SECONDS, registry=self._registry)

    def add(self, name: str, model: Counts) -> None:
        self._models[name] = model

    def collect(self) -> Iterable[Metric]:
        stats = {name: model.stats for name, model in self._models.items()}
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, about, field in table:
                family = kind(f"llmasos:{name}", about, labels=_LABELS)
                for model, counts in stats.items():
                    family.add_metric([model], getattr(counts, field))
                yield family

    @contextmanager
    def watch(self, model: str, num: int) -> Iterator[Watch]:
        """Counts how `num` completions end. Those that did not when the block is left failed, or were aborted."""
        watch = Watch(self, model, num)
        reason = "abort"
        try:
            yield watch
        except Exception:
            reason = "error"
            raise
        finally:
            if watch.num_left:
                watch.end(reason, watch.num_left)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
