"""How much a run measures."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Plan:
    """The full run; QUICK is for a look.

    Attributes:
        rounds: How often everything is measured; the figures are medians over the rounds.
        seconds: How long one measurement of calls per second is to take.
        calls_per_caller: At least so many, so that not only their common start is measured.
        waits: How often a 10 ms task is waited for through our own backend.
        peer_waits: The same through the others, which take longer.
        window: Seconds for which the statements of waiters are counted.
        warm_up: Seconds before that.
        results: How many results are stored while memory is watched.
        overhead_rounds: As rounds, of what TTL and metadata cost; at least 2.
    """

    rounds: int = 12
    seconds: float = 0.4
    calls_per_caller: int = 3
    waits: int = 50
    peer_waits: int = 30
    window: float = 10
    warm_up: float = 2
    results: int = 200_000
    overhead_rounds: int = 120


FULL: Final = Plan()
QUICK: Final = Plan(
    rounds=1,
    seconds=0.1,
    calls_per_caller=1,
    waits=5,
    peer_waits=5,
    window=1,
    warm_up=1,
    results=20_000,
    overhead_rounds=3,
)
