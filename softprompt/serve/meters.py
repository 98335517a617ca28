"""Numbers for Prometheus. Labels are of bounded number: routes, statuses and kinds of models, never a name that somebody sent."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from softprompt.serve.account import Account
from softprompt.serve.asking import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)
METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")


class Meters:
    """Those of one server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Now(engine))
        own = self.registry
        labels = ("method", "route", "kind", "status")
        self._requests = Counter("softprompt_requests", "Requests that have ended.", labels, registry=own)
        self._tokens = Counter("softprompt_tokens", "Tokens of texts, those kept, of prompts, of answers.", ("part", "kind"), registry=own)
        self._seconds = Histogram("softprompt_request_seconds", "From head to end of a request.", ("route",), registry=own, buckets=SECONDS)
        self._first = Histogram("softprompt_first_token_seconds", "From head to first token.", ("kind",), registry=own, buckets=SECONDS)
        self._between = Histogram("softprompt_between_tokens_seconds", "From token to token of an answer.", registry=own, buckets=SECONDS)

    def between(self, seconds: float, count: int) -> None:
        for _ in range(count):
            self._between.observe(seconds)

    def report(self, account: Account) -> None:
        """What a request was, at its end."""
        method = account.method if account.method in METHODS else "other"
        self._requests.labels(method, account.route, account.kind, str(account.status)).inc()
        self._seconds.labels(account.route).observe(account.seconds)
        if account.first_token is not None:
            self._first.labels(account.kind).observe(account.first_token)
        parts = {"text": account.num_prompt, "cached": account.num_cached, "virtual": account.num_virtual, "answer": account.num_said}
        for part, count in parts.items():
            self._tokens.labels(part, account.kind).inc(count)


class _Now(Collector):
    """What an engine holds at this moment."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        load = self.engine.load()
        yield GaugeMetricFamily("softprompt_batch_answers", "Answers being made: the size of the batch.", load.running)
        yield GaugeMetricFamily("softprompt_waiting_answers", "Answers that wait for a place.", load.waiting)
        yield GaugeMetricFamily("softprompt_kept_bytes", "Kept of prompts and texts that nobody asks just now.", load.kept_bytes)
        yield GaugeMetricFamily("softprompt_batch_bytes", "Kept of answers being made.", load.batch_bytes)
        yield GaugeMetricFamily("softprompt_models", "Base, prompts and ensembles that are served.", len(self.engine.models()))
