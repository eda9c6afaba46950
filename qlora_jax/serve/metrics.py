"""What the server does, in Prometheus' format; no names of tenants, and no texts."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qlora_jax.serve.engine import Engine

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        """Create the metrics; those of the engine are read when the page is asked for."""
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("qlora_requests", "Requests that the engine took", ["kind"], registry=registry)
        self._seconds = Histogram(
            "qlora_request_seconds", "Seconds from a request to its end", ["kind"], buckets=_SECONDS, registry=registry
        )
        counts, scheduler = engine.counts, engine.scheduler
        for name, words, value in (
            ("qlora_rows_running", "Answers that run", lambda: len(scheduler.running())),
            ("qlora_rows", "Rows of the engine", lambda: engine.limits.rows),
            ("qlora_answers_waiting", "Answers that wait for a row", lambda: scheduler.count_waiting),
            ("qlora_prompt_tokens", "Tokens of prompts that were processed", lambda: counts.prompt_tokens),
            ("qlora_shared_tokens", "Tokens of prompts whose keys were there already", lambda: counts.shared_tokens),
            ("qlora_answer_tokens", "Tokens of answers", lambda: counts.answer_tokens),
            ("qlora_steps", "Steps of the engine", lambda: counts.steps),
        ):
            Gauge(name, words, registry=registry).set_function(value)

    def asked(self, kind: str) -> None:
        """Count a request."""
        self._requests.labels(kind).inc()

    def ended(self, kind: str, seconds: float) -> None:
        """Count the time of a request."""
        self._seconds.labels(kind).observe(seconds)

    def page(self) -> tuple[str, str]:
        """Return (the page, its media type)."""
        return generate_latest(self._registry).decode(), CONTENT_TYPE_LATEST
