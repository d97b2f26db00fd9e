"""Calls per second and latency of the four calls, by callers."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final, Literal

from taskiq.depends.progress_tracker import TaskProgress, TaskState

from benchmarks.contenders import (
    OURS,
    PEER,
    PEER_AGAIN,
    Backend,
    Contender,
    make_payload,
    make_result,
    new_ids,
    started,
)
from benchmarks.measure import Call, Plan, Sample, call_each, measure, medians
from benchmarks.servers import Server, Servers

OPERATIONS: Final = ("set_result", "set_progress", "is_result_ready", "get_result")
CALLERS: Final = (1, 10, 100, 1000)
SMALL: Final = 200
LARGE: Final = 10_000
# More than there are callers, so that no two of them use the same row at once.
TASKS: Final = 2000

_WARM_UP_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Scenario:
    operation: str
    callers: int
    payload_bytes: int = SMALL


SCENARIOS: Final = (
    *(Scenario(operation, callers) for operation in OPERATIONS for callers in CALLERS),
    Scenario("set_result", 100, LARGE),
    Scenario("get_result", 100, LARGE),
)


# The medians of the rounds.
Throughput = dict[tuple[Scenario, Contender], Sample]


def compare(
    throughput: Throughput, scenario: Scenario, figure: Literal["per_second", "p50_ms"]
) -> tuple[float, float]:
    """Ours / the peer's, and the noise: how far the two figures of the peer differ."""
    ours, peer, again = (
        getattr(throughput[scenario, each], figure) for each in (OURS, PEER, PEER_AGAIN)
    )
    return ours / peer, max(peer, again) / min(peer, again) - 1


async def measure_throughput(servers: Servers, plan: Plan) -> Throughput:
    samples: defaultdict[tuple[Scenario, Contender], list[Sample]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        subjects = []
        for each in [*servers.contenders, PEER_AGAIN]:
            server = servers.of(each)
            backend = await stack.enter_async_context(started(each, server.address, "throughput"))
            subjects.append(_Subject(each, backend, server))
        for number in range(plan.rounds + 1):
            print(f"throughput: round {number} of {plan.rounds}", flush=True)
            seconds = plan.seconds if number else _WARM_UP_SECONDS
            # Who comes first meets what the scenario before has left, so that changes.
            first = number % len(subjects)
            for scenario in SCENARIOS:
                for subject in subjects:
                    await subject.prepare(scenario)
                for subject in [*subjects[first:], *subjects[:first]]:
                    sample = await subject.measure(scenario, seconds)
                    if number:  # round 0 is to warm up
                        samples[scenario, subject.contender].append(sample)
    return {key: medians(each) for key, each in samples.items()}


class _Subject:
    """A contender that runs."""

    def __init__(self, contender: Contender, backend: Backend, server: Server) -> None:
        self.contender = contender
        self._backend = backend
        self._server = server
        self._stored: list[str] = []
        # Tasks that report progress have no result yet.
        self._in_progress = list(itertools.islice(new_ids(), TASKS))

    async def prepare(self, scenario: Scenario) -> None:
        if scenario.operation == "set_result":
            # Else whoever is fast would soon have the largest table.
            await self._server.empty(self.contender.table)
            self._stored.clear()
        elif scenario.operation == "set_progress":
            if await self._backend.get_progress(self._in_progress[-1]) is None:
                await call_each(self._call(scenario), self._in_progress, callers=100)
        else:
            result = await self._backend.get_result(self._stored[0])
            assert result.return_value == make_payload(scenario.payload_bytes)

    async def measure(self, scenario: Scenario, seconds: float) -> Sample:
        task_ids = self._task_ids(scenario.operation)
        return await measure(self._call(scenario), task_ids, scenario.callers, seconds)

    def _task_ids(self, operation: str) -> Iterator[str]:
        if operation == "set_result":
            return self._new_ids()
        # Results are read of the tasks that the set_result before has stored.
        known = self._in_progress if operation == "set_progress" else self._stored
        return itertools.cycle(known[:TASKS])

    def _new_ids(self) -> Iterator[str]:
        for task_id in new_ids():
            self._stored.append(task_id)
            yield task_id

    def _call(self, scenario: Scenario) -> Call:
        backend, payload = self._backend, make_payload(scenario.payload_bytes)
        result = make_result(payload)
        progress = TaskProgress(state=TaskState.STARTED, meta={"text": payload})
        calls: dict[str, Call] = {
            "set_result": lambda task_id: backend.set_result(task_id, result),
            "set_progress": lambda task_id: backend.set_progress(task_id, progress),
            "is_result_ready": backend.is_result_ready,
            "get_result": backend.get_result,
        }
        return calls[scenario.operation]
