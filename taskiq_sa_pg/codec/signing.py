"""A serializer that signs: readers load only payloads that were signed with a known key."""

import hashlib
from collections.abc import Sequence
from typing import Any, Final

from taskiq.abc.serializer import TaskiqSerializer

from taskiq_sa_pg.exceptions import ConfigurationError, check_serializer

_MIN_KEY_BYTES: Final = 16

# Signatures for another purpose with the same key are not valid here.
_SALT: Final = b"taskiq_sa_pg.payload"


class SignedSerializer(TaskiqSerializer):
    """Adds a signature (HMAC with SHA-256) to the bytes of another serializer.

    A client that can write to the tables but has no key cannot make readers load its payloads: an
    unsigned or changed payload, or one signed with another key, is rejected before the other
    serializer reads it. It does not detect a payload copied from another row, and does not encrypt.

    Needs `pip install 'taskiq-sa-pg[signed]'`.

    Args:
        serializer: The serializer of the values, such as PickleSerializer().
        keys: Secrets of 16 bytes or more; a str is encoded as UTF-8. The first key signs, and all
            keys are accepted. To replace a key, put the new one first, and remove the old one when
            the results that it signed are deleted.

    Raises:
        ConfigurationError: The serializer is invalid, there is no key, a key is too short, or
            itsdangerous is not installed.
    """

    def __init__(self, serializer: TaskiqSerializer, keys: Sequence[str | bytes]) -> None:
        try:
            # Here, because it is optional: the extra `signed`.
            from itsdangerous import Signer  # noqa: PLC0415
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                "SignedSerializer needs itsdangerous: pip install 'taskiq-sa-pg[signed]'"
            ) from exc
        check_serializer(serializer)
        if isinstance(keys, str | bytes):
            raise ConfigurationError("keys must be a list of keys, not a single key")
        secrets = [key.encode() if isinstance(key, str) else bytes(key) for key in keys]
        if not secrets:
            raise ConfigurationError("SignedSerializer needs at least one key")
        if any(len(secret) < _MIN_KEY_BYTES for secret in secrets):
            raise ConfigurationError(f"a key must have at least {_MIN_KEY_BYTES} bytes")
        self.serializer: Final = serializer
        # itsdangerous signs with the last key.
        self._signer: Final = Signer(
            secrets[::-1], salt=_SALT, key_derivation="hmac", digest_method=hashlib.sha256
        )

    def dumpb(self, value: Any) -> bytes:
        """Returns the serialized value with a signature."""
        return self._signer.sign(self.serializer.dumpb(value))

    def loadb(self, value: bytes) -> Any:
        """Returns the value if the signature is valid.

        Raises:
            ValueError: The payload is not signed with one of the keys, or was changed.
        """
        from itsdangerous import BadSignature  # noqa: PLC0415

        try:
            payload = self._signer.unsign(value)
        except BadSignature:
            # `from None`: the text of itsdangerous quotes the payload.
            raise ValueError(
                "the payload is not signed with one of the keys, or was changed after signing"
            ) from None
        return self.serializer.loadb(payload)
