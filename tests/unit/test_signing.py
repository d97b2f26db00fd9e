"""Payloads that are signed: only holders of a key can write what readers load."""

import base64
import json
import pickle
from typing import Any

import pytest
from taskiq.serializers import JSONSerializer, PickleSerializer

from taskiq_sa_pg import ConfigurationError, ResultDecodeError, SignedSerializer, TableConfig
from taskiq_sa_pg.codec import Codec
from tests.unit.codecs import decode, encode

OLD, NEW, FOREIGN = "old key, 16 bytes", b"new key, 16 bytes", "another key, 16 bytes"


class Loaded(Exception):
    """What unpickling a forged payload raises, where it comes so far."""


class Forged:
    def __reduce__(self) -> Any:
        return _load, ()


class Unloadable(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(code)


def _load() -> None:
    raise Loaded


def signed(*keys: str | bytes) -> SignedSerializer:
    return SignedSerializer(PickleSerializer(), keys)


@pytest.mark.parametrize("inner", [PickleSerializer(), JSONSerializer()])
@pytest.mark.parametrize("value", [None, 1, "text", {"nested": [1, "x" * 10_000]}])
def test_what_was_signed_comes_back(inner: Any, value: Any) -> None:
    serializer = SignedSerializer(inner, [NEW])
    assert serializer.loadb(serializer.dumpb(value)) == value


@pytest.mark.parametrize("inner", ["pickle", PickleSerializer])
def test_what_is_no_serializer_is_refused(inner: Any) -> None:
    with pytest.raises(ConfigurationError, match="serializer must be an object"):
        SignedSerializer(inner, [NEW])


def test_an_exception_that_signed_pickle_cannot_load_becomes_an_error_result() -> None:
    codec = Codec(TableConfig(), signed(NEW))
    assert decode(codec, encode(codec, return_value=[KeyError()])).is_err is False
    assert decode(codec, encode(codec, return_value=[Unloadable(code=1)])).is_err is True


def test_keys_rotate() -> None:
    before, between, after = signed(OLD), signed(NEW, OLD), signed(NEW)
    assert between.loadb(before.dumpb("value")) == "value"
    assert after.loadb(between.dumpb("value")) == "value"
    with pytest.raises(ValueError, match="not signed with one of the keys"):
        after.loadb(before.dumpb("value"))


def forgeries() -> dict[str, bytes]:
    payload = signed(NEW).dumpb("value")
    forged = pickle.dumps(Forged())
    return {
        "unsigned": forged,
        "empty": b"",
        "separator": b".",
        "no signature": forged + b".",
        "another payload's signature": forged + payload[payload.rindex(b".") :],
        "foreign key": signed(FOREIGN).dumpb(Forged()),
        "flipped bit": bytes([payload[0] ^ 1]) + payload[1:],
        "longer": b"x" + payload,
        "shorter": payload[:-1],
        "plain hash": forged + b"." + base64.urlsafe_b64encode(b"0" * 32).rstrip(b"="),
    }


@pytest.mark.parametrize("name", forgeries())
def test_what_was_not_signed_is_refused_unread(name: str) -> None:
    with pytest.raises(
        ValueError, match="not signed with one of the keys, or was changed"
    ) as caught:
        signed(NEW).loadb(forgeries()[name])
    assert caught.value.__cause__ is None


def test_no_key_shows() -> None:
    serializer = signed(NEW, OLD)
    with pytest.raises(ValueError, match="not signed") as caught:
        serializer.loadb(b"forged")
    shown = f"{serializer!r} {serializer} {caught.value!r}"
    assert OLD not in shown
    assert NEW.decode() not in shown


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([], "at least one key"),
        (["short"], "at least 16 bytes"),
        ([OLD, b""], "at least 16 bytes"),
        (OLD, "a list of keys"),
        (NEW, "a list of keys"),
    ],
)
def test_keys_that_protect_nothing_are_refused(keys: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        SignedSerializer(PickleSerializer(), keys)


FORGED = pickle.dumps(Forged())
FIELDS: dict[str, dict[str, Any]] = {
    "return_value": {"return_value": FORGED},
    "error": {"error": FORGED},
    "labels": {"labels": json.dumps({"a": {"$serialized": base64.b64encode(FORGED).decode()}})},
}


@pytest.mark.parametrize("field", FIELDS)
def test_no_part_of_a_forged_row_is_loaded(field: str) -> None:
    codec = Codec(TableConfig(), signed(NEW))
    fields: dict[str, Any] = {"error": KeyError("x"), "labels": {"when": object}}
    row = encode(codec, **fields)
    assert decode(codec, row).return_value == 1
    with pytest.raises(ResultDecodeError, match="not signed with one of the keys"):
        decode(codec, row._replace(**FIELDS[field]))
    trusting = Codec(TableConfig(), PickleSerializer())
    with pytest.raises(ResultDecodeError, match="Loaded"):
        decode(trusting, encode(trusting, **fields)._replace(**FIELDS[field]))


def test_jsonb_takes_no_signed_payloads() -> None:
    with pytest.raises(ConfigurationError, match="needs a serializer that writes JSON"):
        Codec(TableConfig(field_for_payload="Jsonb"), SignedSerializer(JSONSerializer(), [NEW]))
