"""Traces by OpenTelemetry, where it is asked for: one span per request that a model answers, under GenAI's names.

https://opentelemetry.io/docs/specs/semconv/gen-ai/ (status: development). A request's `traceparent` header (W3C Trace
Context) makes its span a child of the client's. Needs the extra `telemetry`; nothing of it is imported before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers

from llmasos import __version__
from llmasos.apps.agent.shown import spans
from llmasos.client.http import host_of, is_loopback
from llmasos.client.types.agents import AgentRun
from llmasos.errors import InvalidInputError, OfflineError, UnsupportedError
from llmasos.serve.inflight import InFlight, Requests
from llmasos.settings import settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/api/chat": "chat",
    "/v1/completions": "text_completion",
    "/api/generate": "text_completion",
    "/v1/embeddings": "embeddings",
    "/api/embed": "embeddings",
}
"""`gen_ai.operation.name` by route; other requests have no span."""


class Telemetry:
    """Sends spans while it is open."""

    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        # not the process's global provider: a program around us may have its own
        resource = Resource.create({"service.name": "llmasos", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("llmasos.serve", __version__)

    @classmethod
    def to(cls, endpoint: str) -> Telemetry:
        """Spans go to the collector at `endpoint` (OTLP over HTTP; `/v1/traces` is appended to a bare address).

        Raises UnsupportedError without the extra, InvalidInputError for what is no URL, OfflineError in offline mode.
        """
        host = host_of(endpoint)
        if not endpoint.startswith(("http://", "https://")) or not host:
            raise InvalidInputError(
                f"telemetry={endpoint!r} is not the URL of a collector.",
                hint="http://127.0.0.1:4318",
                param="telemetry",
            )
        if settings().offline and not is_loopback(host):
            raise OfflineError(
                f"Offline mode is on, so no traces are sent to {host}.", hint="Leave --telemetry out, or unset it."
            )
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as e:
            raise UnsupportedError(
                "Telemetry needs the package opentelemetry-sdk, which is not installed.",
                hint="pip install llmasos[telemetry]",
                param="telemetry",
            ) from e
        url = endpoint.rstrip("/")
        return cls(BatchSpanProcessor(OTLPSpanExporter(url if url.endswith("/v1/traces") else f"{url}/v1/traces")))

    def watch(self, requests: Requests) -> None:
        """A span for each of `requests` that a model answers."""
        requests.on_end.append(self._record)

    def record_run(self, run: AgentRun) -> None:
        """Spans of an agent's run that has ended: itself, its answers and its calls."""
        if run.state in ("running", "requires_action"):
            return
        from opentelemetry import trace

        began = int(run.created.timestamp() * 1e9)
        made: list[Span] = []
        for one in spans(run):
            parent = one["parent"]
            span = self._tracer.start_span(
                one["name"][:200],
                context=None if parent is None else trace.set_span_in_context(made[parent]),
                start_time=began + int(one["start"] * 1e9),
                attributes=one["attributes"],
            )
            if one["is_error"]:
                span.set_status(trace.Status(trace.StatusCode.ERROR))
            span.end(began + int(one["end"] * 1e9))
            made.append(span)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()

    def _record(self, request: InFlight) -> None:
        operation = _OPERATIONS.get(request.scope["path"])
        if operation is None:
            return
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = Headers(scope=request.scope)
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        parent = TraceContextTextMapPropagator().extract(carrier)
        start = int(request.began * 1e9)
        span = self._tracer.start_span(
            f"{operation} {request.model or 'unknown'}"[:200],
            context=parent,
            kind=trace.SpanKind.SERVER,
            start_time=start,
            attributes=dict(_attributes(request, operation)),
        )
        if request.first_token is not None:
            span.add_event("first token", timestamp=start + int((request.first_token - request.started) * 1e9))
        _set_status(span, request.status, trace.Status, trace.StatusCode)
        span.end(start + int(request.age * 1e9))


def _set_status(span: Span, status: int, make: Callable[..., Any], codes: Any) -> None:
    """A server's span has failed where the server did, not where its client was wrong."""
    if status >= 500 or status == 0:
        span.set_status(make(codes.ERROR))
        span.set_attribute("error.type", str(status or "aborted"))


def _attributes(request: InFlight, operation: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [
        ("gen_ai.operation.name", operation),
        ("gen_ai.provider.name", "llmasos"),
        ("http.request.method", request.scope["method"]),
        ("http.route", request.scope["path"]),
        ("http.response.status_code", request.status),
        ("llmasos.request.id", request.id),
    ]
    if request.model:
        found.append(("gen_ai.request.model", request.model[:200]))
    if request.is_begun:
        found.append(("gen_ai.usage.input_tokens", request.num_prompt_tokens))
        found.append(("gen_ai.usage.output_tokens", request.num_output_tokens))
        found.append(("gen_ai.usage.cache_read.input_tokens", request.num_cached_tokens))
    if request.finish_reasons:
        found.append(("gen_ai.response.finish_reasons", tuple(request.finish_reasons[:16])))
    if request.first_token is not None:
        found.append(("gen_ai.server.time_to_first_token", request.first_token - request.started))
    if request.caller.key_id:
        found.append(("llmasos.key.id", request.caller.key_id))
    return found
