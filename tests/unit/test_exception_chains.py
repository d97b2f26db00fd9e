"""Chains and groups of exceptions through the codec."""

import asyncio
import itertools
import sys
from typing import Any

import pytest

from taskiq_sa_pg.codec import Codec
from tests.unit.codecs import each, every_codec
from tests.unit.codecs import error_through as through


class Failure(Exception):
    def __init__(self, *, step: int) -> None:
        super().__init__(f"step {step}")


class Failures(ExceptionGroup[Exception]):
    """Its constructor takes other arguments than ExceptionGroup's."""

    step: int

    def __new__(cls, errors: list[Exception], step: int) -> "Failures":
        self = super().__new__(cls, f"step {step}", errors)
        self.step = step
        return self


@every_codec
def test_cause_and_context_come_back(codec: Codec) -> None:
    try:
        try:
            raise Failure(step=1)
        except Failure:
            raise KeyError("second") from OSError(2, "cause")
    except KeyError as exc:
        error = through(codec, exc)
    assert type(error.__cause__) is FileNotFoundError
    assert type(error.__context__) is Failure
    assert str(error.__context__) == "step 1"
    assert error.__suppress_context__


@every_codec
@pytest.mark.parametrize("suppressed", [True, False])
def test_suppress_context_comes_back(codec: Codec, suppressed: bool) -> None:
    original = ValueError("last")
    original.__context__ = KeyError("first")
    original.__suppress_context__ = suppressed
    error = through(codec, original)
    assert error.__suppress_context__ is suppressed
    assert error.__context__.args == ("first",)
    assert error.__cause__ is None


@every_codec
def test_an_exception_that_is_its_own_cause_comes_back(codec: Codec) -> None:
    original = ValueError("x")
    original.__cause__ = original
    error = through(codec, original)
    assert error.__cause__ is error


@every_codec
def test_a_cyclic_chain_comes_back(codec: Codec) -> None:
    first, second, third = ValueError("first"), Failure(step=2), KeyError("third")
    first.__cause__, second.__context__, third.__cause__ = second, third, first
    error = through(codec, first)
    assert error.__cause__.args == ("step 2",)
    assert error.__cause__.__context__.__cause__ is error


@every_codec
def test_cause_and_context_that_are_one_stay_one(codec: Codec) -> None:
    original = ValueError("x")
    original.__cause__ = original.__context__ = KeyError("y")
    error = through(codec, original)
    assert error.__cause__.args == ("y",)
    assert error.__cause__ is error.__context__


@each("pickle", "json", "jsonb")
def test_a_chain_of_any_length_comes_back(codec: Codec) -> None:
    length = 2 * sys.getrecursionlimit()
    original = last = Failure(step=0)
    for step in range(1, length):
        last.__context__ = Failure(step=step)
        last = last.__context__
    error = through(codec, original)
    for step in range(length):
        assert str(error) == f"step {step}"
        error = error.__context__
    assert error is None


@every_codec
def test_nested_groups_come_back(codec: Codec) -> None:
    original = ExceptionGroup(
        "outer",
        [ValueError(1), ExceptionGroup("inner", [Failure(step=2), KeyError("a")]), OSError(2, "b")],
    )
    original.add_note("noted")
    original.__cause__ = KeyError("cause")
    error = through(codec, original)
    value_error, inner, os_error = error.exceptions
    assert (type(error), error.message, error.__notes__) == (ExceptionGroup, "outer", ["noted"])
    assert (value_error.args, os_error.errno) == ((1,), 2)
    assert list(map(type, inner.exceptions)) == [Failure, KeyError]
    assert type(error.__cause__) is KeyError


@every_codec
def test_a_group_whose_constructor_takes_other_arguments_comes_back(codec: Codec) -> None:
    error = through(codec, Failures([ValueError("a")], 5))
    assert error.__class__ is Failures
    assert (str(error), error.step) == ("step 5 (1 sub-exception)", 5)
    assert error.exceptions[0].args == ("a",)


@every_codec
def test_a_member_may_be_in_the_chain_of_its_group(codec: Codec) -> None:
    original = Failure(step=1)
    original.__cause__ = ExceptionGroup("outer", [ExceptionGroup("inner", [original])])
    error = through(codec, original)
    assert error.__cause__.exceptions[0].exceptions[0] is error
    assert type(error) is Failure


@every_codec
def test_a_member_that_two_groups_share_stays_one(codec: Codec) -> None:
    shared = ValueError("shared")
    groups = [ExceptionGroup("a", [shared]), ExceptionGroup("b", [shared, shared])]
    first, second = through(codec, ExceptionGroup("both", groups)).exceptions
    assert first.exceptions[0] is second.exceptions[0] is second.exceptions[1]


@each("pickle", "json", "jsonb")
def test_groups_nested_a_thousand_deep_come_back(codec: Codec) -> None:
    original: Exception = ValueError("bottom")
    for depth in range(1_000):
        original = ExceptionGroup(str(depth), [original])
    error = through(codec, original)
    for depth in reversed(range(1_000)):
        assert error.message == str(depth)
        [error] = error.exceptions
    assert error.args == ("bottom",)


@every_codec
async def test_a_task_groups_failure_comes_back(codec: Codec) -> None:
    async def fail(step: int) -> None:
        raise Failure(step=step)

    async def fail_together() -> None:
        async with asyncio.TaskGroup() as tasks:
            for step in range(3):
                tasks.create_task(fail(step))

    with pytest.raises(ExceptionGroup) as caught:
        await fail_together()
    error = through(codec, caught.value)
    assert [str(member) for member in error.exceptions] == ["step 0", "step 1", "step 2"]


@every_codec
def test_a_failure_in_the_chain_leaves_the_others_alone(codec: Codec) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise self

        __repr__ = __str__

        def __reduce__(self) -> Any:
            raise self

    original = ValueError("x")
    original.__cause__ = Mute(itertools.count())
    original.__cause__.__cause__ = KeyError("y")
    error = through(codec, original)
    assert error.__cause__.__cause__.args == ("y",)
    assert type(error.__cause__).__name__ == "Mute"
    assert type(error) is ValueError
