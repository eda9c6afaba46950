"""What the server does, in Prometheus' format; no names of tenants, and no texts.

What the engine counts is read when the page is asked for: numbers that only grow are counters, the others gauges.
"""

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qlora_jax.serve.engine import Engine

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class _EngineMetrics(Collector):
    """The metrics of the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield them as they are now."""
        counts, scheduler = self._engine.counts, self._engine.scheduler
        for name, words, value in (
            ("qlora_rows_running", "Answers that run", len(scheduler.running())),
            ("qlora_rows", "Rows of the engine", self._engine.limits.rows),
            ("qlora_answers_waiting", "Answers that wait for a row", scheduler.count_waiting),
        ):
            yield GaugeMetricFamily(name, words, value)
        for name, words, value in (
            ("qlora_prompt_tokens", "Tokens of prompts that were processed", counts.prompt_tokens),
            ("qlora_shared_tokens", "Tokens of prompts whose keys were there already", counts.shared_tokens),
            ("qlora_answer_tokens", "Tokens of answers", counts.answer_tokens),
            ("qlora_steps", "Steps of the engine", counts.steps),
        ):
            yield CounterMetricFamily(name, words, value)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        """Create the metrics."""
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineMetrics(engine))
        self._requests = Counter("qlora_requests", "Requests that the engine took", ["kind"], registry=registry)
        self._errors = Counter("qlora_errors", "Requests that were answered by an error", ["status"], registry=registry)
        self._first, self._seconds = (
            Histogram(name, words, ["kind"], buckets=_SECONDS, registry=registry)
            for name, words in (
                ("qlora_first_token_seconds", "Seconds from a request to its first token"),
                ("qlora_request_seconds", "Seconds from a request to its end"),
            )
        )

    def asked(self, kind: str) -> None:
        """Count a request."""
        self._requests.labels(kind).inc()

    def refused(self, status: int) -> None:
        """Count an error."""
        self._errors.labels(str(status)).inc()

    def first(self, kind: str, seconds: float) -> None:
        """Count the time to the first token of a request."""
        self._first.labels(kind).observe(seconds)

    def ended(self, kind: str, seconds: float) -> None:
        """Count the time of a request."""
        self._seconds.labels(kind).observe(seconds)

    def page(self) -> tuple[str, str]:
        """Return (the page, its media type)."""
        return generate_latest(self._registry).decode(), CONTENT_TYPE_LATEST
