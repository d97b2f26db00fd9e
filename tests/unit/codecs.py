"""The codecs that the encoding's tests run over: every serializer, in both kinds of column."""

import pytest
from taskiq.serializers import (
    CBORSerializer,
    JSONSerializer,
    MSGPackSerializer,
    ORJSONSerializer,
    PickleSerializer,
)

from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.config import TableConfig

SERIALIZERS = [
    *(PickleSerializer, JSONSerializer, ORJSONSerializer),
    *(MSGPackSerializer, CBORSerializer),
]
CODECS = {
    **{cls.__name__: Codec(TableConfig("jobs"), cls()) for cls in SERIALIZERS},
    "jsonb": Codec(TableConfig("jobs", field_for_payload="Jsonb")),
}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
