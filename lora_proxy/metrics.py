"""Every metric's name, labels and meaning, in a registry of its own.

Label values come from configuration, upstreams and fixed lists only: a client cannot make
a new series. `adapter` is a public adapter name, a base model's name, or `NONE`.

Children are cached by their label values: prometheus_client's `labels()` takes a lock and
checks its arguments on each call, which costs more than the increment.
"""

from functools import cache
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

NONE: Final = "-"
"""The `adapter` or `upstream` of a request that never came to have one."""

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# Seconds. From a refusal inside the proxy to a generation of ten minutes.
_DURATION = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LOAD = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

LABELS: Final[dict[str, tuple[str, ...]]] = {
    "lora_proxy_requests_total": ("adapter", "upstream", "endpoint", "code"),
    "lora_proxy_request_duration_seconds": ("adapter",),
    "lora_proxy_time_to_first_token_seconds": ("adapter",),
    "lora_proxy_requests_in_flight": ("adapter", "upstream"),
    "lora_proxy_routing_decisions_total": ("tier",),
    "lora_proxy_retries_total": ("upstream", "reason"),
    "lora_proxy_adapter_loads_total": ("adapter", "upstream", "result"),
    "lora_proxy_adapter_load_duration_seconds": ("adapter",),
    "lora_proxy_adapter_unloads_total": ("adapter", "upstream", "reason"),
    "lora_proxy_adapter_resident": ("adapter", "upstream"),
    "lora_proxy_upstream_up": ("upstream",),
    "lora_proxy_auth_failures_total": ("reason",),
    "lora_proxy_queue_depth": (),
    "lora_proxy_queue_wait_seconds": ("adapter",),
    "lora_proxy_mirrored_total": ("adapter", "result"),
}
"""Name -> labels of everything exported besides the process's own figures."""


class Metrics:
    """One process's metrics. Each attribute is called with its label values in order.

    `metrics.requests("sql", "gpu-0", "/v1/completions", "200").inc()`
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        counter, gauge = self._counter, self._gauge
        self.requests = cache(
            counter("requests_total", "Requests finished, by what served them.").labels
        )
        self.duration = cache(
            self._histogram(
                "request_duration_seconds", "From the request's head to its end.", _DURATION
            ).labels
        )
        self.first_token = cache(
            self._histogram(
                "time_to_first_token_seconds",
                "From the request's head to the first bytes of a streamed answer.",
                _FIRST_TOKEN,
            ).labels
        )
        self.in_flight = cache(
            gauge("requests_in_flight", "Requests that an upstream is answering now.").labels
        )
        self.decisions = cache(
            counter("routing_decisions_total", "Upstreams chosen, by routing tier.").labels
        )
        self.retries = cache(
            counter("retries_total", "Requests sent again, and why the first try failed.").labels
        )
        self.loads = cache(
            counter(
                "adapter_loads_total", "Loads asked of vLLM: ok, adopted, or the error's code."
            ).labels
        )
        self.load_duration = cache(
            self._histogram(
                "adapter_load_duration_seconds", "Inspection and vLLM's own load.", _LOAD
            ).labels
        )
        self.unloads = cache(counter("adapter_unloads_total", "Unloads, and why.").labels)
        self.resident = cache(
            gauge("adapter_resident", "1 while the upstream knows the adapter.").labels
        )
        self.queue_depth = gauge("queue_depth", "Requests that wait for an upstream.")
        self.queue_wait = cache(
            self._histogram(
                "queue_wait_seconds", "How long requests waited for an upstream.", _LOAD
            ).labels
        )
        self.mirrored = cache(
            counter("mirrored_total", "Copies of requests: sent, failed or dropped.").labels
        )
        self.auth_failures = cache(
            counter("auth_failures_total", "Requests without a key, or with an unknown one.").labels
        )
        self.upstream_up = cache(
            gauge("upstream_up", "1 while probes of the upstream succeed.").labels
        )

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        full = f"lora_proxy_{name}"
        return Counter(full, text, LABELS[full], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        full = f"lora_proxy_{name}"
        return Gauge(full, text, LABELS[full], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        full = f"lora_proxy_{name}"
        return Histogram(full, text, LABELS[full], buckets=buckets, registry=self.registry)
