"""How much a run measures."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class LargePlan:
    """The full run; QUICK is for a look.

    Attributes:
        rows: How many results the full tables have.
        few_rows: How many the other table has where results are read; no fewer than calls.
        rounds: How often each operation is measured on both tables.
        calls: How many calls a measurement has, by the number of callers.
        window: Seconds for which pruning runs, and for which it rests, by turns.
    """

    rows: int = 1_000_000
    few_rows: int = 5000
    rounds: int = 20
    calls: tuple[tuple[int, int], ...] = ((1, 300), (100, 5000))
    window: float = 0.5


FULL: Final = LargePlan()
QUICK: Final = LargePlan(rows=50_000, rounds=3, window=0.1)
