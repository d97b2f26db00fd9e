"""A serializer that signs: readers load only what holders of a key have written."""

import hashlib
from collections.abc import Sequence
from typing import Any, Final

from taskiq.abc.serializer import TaskiqSerializer

from taskiq_sa_pg.exceptions import ConfigurationError, check_serializer

_MIN_KEY_BYTES: Final = 16

# Signatures made for something else with the same key are of no use here.
_SALT: Final = b"taskiq_sa_pg.payload"


class SignedSerializer(TaskiqSerializer):
    """Adds a signature, HMAC with SHA-256, to what another serializer writes.

    Whoever can write the tables but has no key cannot make readers load what he wrote: a payload
    that is unsigned, altered or signed with another key is refused before the other serializer
    sees it. It protects from forged payloads, not from a whole payload copied from another row,
    and hides nothing.

    Needs `pip install 'taskiq-sa-pg[signed]'`.

    Args:
        serializer: What writes and reads the values, such as PickleSerializer().
        keys: Secrets of 16 bytes or more; a str counts in UTF-8. The first signs, and all of them
            are accepted: put a new key before the old one, and take the old one away when the
            results that it signed are gone.

    Raises:
        ConfigurationError: No serializer, no key, one that is too short, or itsdangerous is not
            installed.
    """

    def __init__(self, serializer: TaskiqSerializer, keys: Sequence[str | bytes]) -> None:
        try:
            # Here, because it is an extra's.
            from itsdangerous import Signer  # noqa: PLC0415
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                "SignedSerializer needs itsdangerous: pip install 'taskiq-sa-pg[signed]'"
            ) from exc
        check_serializer(serializer)
        if isinstance(keys, str | bytes):
            raise ConfigurationError("keys must be a list of keys, not one key")
        secrets = [key.encode() if isinstance(key, str) else bytes(key) for key in keys]
        if not secrets:
            raise ConfigurationError("SignedSerializer needs at least one key")
        if any(len(secret) < _MIN_KEY_BYTES for secret in secrets):
            raise ConfigurationError(f"a key must have at least {_MIN_KEY_BYTES} bytes")
        self.serializer: Final = serializer
        # It signs with the last of them.
        self._signer: Final = Signer(
            secrets[::-1], salt=_SALT, key_derivation="hmac", digest_method=hashlib.sha256
        )

    def dumpb(self, value: Any) -> bytes:
        """The value, signed."""
        return self._signer.sign(self.serializer.dumpb(value))

    def loadb(self, value: bytes) -> Any:
        """The value, if its signature is right.

        Raises:
            ValueError: The payload is not signed, not with one of the keys, or was altered.
        """
        from itsdangerous import BadSignature  # noqa: PLC0415

        try:
            payload = self._signer.unsign(value)
        except BadSignature:
            # `from None`: what itsdangerous says quotes the payload.
            raise ValueError(
                "the payload is not signed with one of the keys, or was altered after it was signed"
            ) from None
        return self.serializer.loadb(payload)
