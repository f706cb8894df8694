"""What /metrics says, in Prometheus's text format."""

from prometheus_client import CollectorRegistry
from prometheus_client import Counter
from prometheus_client import Gauge
from prometheus_client import Histogram
from prometheus_client import generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counts of one server, with a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def named(kind, name: str, text: str, **more):
            return kind(f"jaxrl_{name}", text, registry=registry, **more)

        self.requests = named(Counter, "requests", "Answers by route and status.", labelnames=("route", "status"))
        self.cancelled = named(Counter, "cancelled", "Generations whose client was gone.")
        self.prompt_tokens = named(Counter, "prompt_tokens", "Tokens of prompts that were taken into a slot.")
        self.reused_tokens = named(Counter, "reused_tokens", "Of these, tokens that a slot held already.")
        self.generated_tokens = named(Counter, "generated_tokens", "Tokens that were drawn.")
        self.busy_slots = named(Gauge, "busy_slots", "Slots at work.")
        self.queued = named(Gauge, "queued_generations", "Generations that wait for a slot.")
        self.weights_version = named(Gauge, "weights_version", "Version of the weights.")
        self.first_token = named(
            Histogram, "time_to_first_token_seconds", "From the request to its first token.", buckets=SECONDS
        )
        self.step = named(Histogram, "step_seconds", "A decode step of all slots.", buckets=SECONDS)
        self.mask = named(Histogram, "mask_seconds", "Masks of the grammars of a step.", buckets=SECONDS)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)
