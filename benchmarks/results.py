"""All figures of a run, and how to look one up."""

from dataclasses import dataclass

from benchmarks.contenders import Contender
from benchmarks.environment import Environment
from benchmarks.footprint import Connections, Memory
from benchmarks.overhead import Overhead
from benchmarks.plan import Plan
from benchmarks.throughput import Throughput
from benchmarks.waiters import WaitersCost
from benchmarks.waiting import Waiting


@dataclass(frozen=True, slots=True)
class Results:
    environment: Environment
    plan: Plan
    throughput: list[Throughput]
    waiting: list[Waiting]
    waiters: list[WaitersCost]
    connections: list[Connections]
    memory: list[Memory]
    overhead: list[Overhead]

    def throughput_of(
        self, contender: str, operation: str, callers: int, payload_bytes: int = 200
    ) -> Throughput:
        return next(
            each
            for each in self.throughput
            if (each.contender, each.operation, each.callers, each.payload_bytes)
            == (contender, operation, callers, payload_bytes)
        )

    def overhead_of(self, variant: str) -> Overhead:
        return next(each for each in self.overhead if each.variant == variant)

    def waiting_of(self, contender: Contender, method: str) -> Waiting:
        return next(
            each
            for each in self.waiting
            if (each.contender, each.method) == (contender.name, method)
        )

    def waiters_of(self, contender: Contender, method: str) -> WaitersCost:
        return next(
            each
            for each in self.waiters
            if (each.contender, each.method) == (contender.name, method)
        )
