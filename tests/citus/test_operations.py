"""Everything that a backend and a broker can do, on a Citus cluster."""

from collections.abc import Awaitable, Callable

import pytest

from tests.citus import operations, queue_operations
from tests.citus.places import Place

Operation = Callable[[Place], Awaitable[None]]


@pytest.mark.parametrize(
    "operation",
    [*operations.OPERATIONS, *queue_operations.OPERATIONS],
    ids=lambda each: each.__name__,
)
async def test_operations(operation: Operation, place: Place) -> None:
    await operation(place)
