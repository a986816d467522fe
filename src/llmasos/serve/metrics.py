"""Numbers for Prometheus, under vLLM's names with our prefix.

What the engines count is read when somebody asks; durations are observed as requests end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmasos.inference.request import RequestMetrics

if TYPE_CHECKING:
    from llmasos.inference.host.status import ModelStatus
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
    ("prefix_cache_evictions", "Cached pages of keys and values that gave way to new ones.", "num_evictions"),
    ("spec_decode_num_draft_tokens", "Tokens that speculation proposed.", "num_draft_tokens"),
    ("spec_decode_num_accepted_tokens", "Proposed tokens that were accepted.", "num_accepted_tokens"),
)
_SHARES = {"kv_cache_usage"}
"""Of several copies of a model the mean is told, not the sum."""


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

    def __init__(
        self,
        loaded: Callable[[], Mapping[str, Sequence[Counts]]],
        status: Callable[[], Sequence[ModelStatus]] = lambda: (),
    ) -> None:
        """`loaded`: by name, the copies of every model in memory. `status`: what a host tells."""
        self._loaded, self._status = loaded, status
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

    def collect(self) -> Iterable[Metric]:
        stats = {name: [one.stats for one in copies] for name, copies in self._loaded().items() if copies}
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, about, field in table:
                family = kind(f"llmasos:{name}", about, labels=_LABELS)
                for model, counts in stats.items():
                    total = sum(getattr(one, field) for one in counts)
                    family.add_metric([model], total / len(counts) if field in _SHARES else total)
                yield family
        if known := self._status():
            yield from host_metrics(known)

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


_Value = Callable[["ModelStatus"], float | None]
_HOST_GAUGES: tuple[tuple[str, str, _Value], ...] = (
    ("model_replicas", "Copies of the model in memory.", lambda m: sum(r.state == "ready" for r in m.replicas)),
    ("model_busy", "Requests that use the model.", lambda m: m.busy),
    ("model_queue_depth", "Requests that wait until the model is there.", lambda m: m.waiting),
    ("model_load_seconds", "What the last load took.", lambda m: m.load_seconds),
    ("model_plan_error_ratio", "(predicted - measured) / measured memory, last load.", lambda m: m.plan_error),
)
_HOST_COUNTERS: tuple[tuple[str, str, _Value], ...] = (
    ("model_loads", "Loads that ended well.", lambda m: m.loads),
    ("model_restarts", "Starts after a crash.", lambda m: m.restarts),
)
_Split = Callable[["ModelStatus"], Mapping[str, int]]
_BY_DEVICE: tuple[tuple[str, str, _Split], ...] = (
    ("model_memory_predicted_bytes", "Memory set aside for the model.", lambda m: m.predicted_bytes),
    ("model_memory_measured_bytes", "Memory that its processes have.", lambda m: m.measured_bytes),
)


def host_metrics(models: Sequence[ModelStatus]) -> Iterator[Metric]:
    """What a host tells, of every model that was ever asked for here: names that clients make up are none."""
    known = [one for one in models if one.loads or one.waiting or one.state != "absent" or one.last_error]
    num_ready = sum(one.state == "ready" for one in known)
    yield GaugeMetricFamily("llmasos:models_loaded", "Models in memory.", value=num_ready)
    for kind, table in ((GaugeMetricFamily, _HOST_GAUGES), (CounterMetricFamily, _HOST_COUNTERS)):
        for name, about, value in table:
            family = kind(f"llmasos:{name}", about, labels=_LABELS)
            for one in known:
                if (found := value(one)) is not None:
                    family.add_metric([one.name], found)
            yield family
    for name, about, by_device in _BY_DEVICE:
        sizes = GaugeMetricFamily(f"llmasos:{name}", about, labels=(*_LABELS, "device"))
        for one in known:
            for device, num in by_device(one).items():
                sizes.add_metric([one.name, device], num)
        yield sizes
    about = "Models unloaded, by why: room, idle, unloaded."
    evictions = CounterMetricFamily("llmasos:model_evictions", about, labels=(*_LABELS, "reason"))
    for one in known:
        for reason, num in one.evictions.items():
            evictions.add_metric([one.name, reason], num)
    yield evictions
