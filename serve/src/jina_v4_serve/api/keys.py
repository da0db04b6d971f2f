"""The API keys: one from a variable, or several named ones from a file, which is read again when it changes.

A line of the file is `KEY` or `NAME: KEY`. A line that begins with `#` is a comment. All keys in the file are valid, so
a key can be replaced without refusing any caller. Logs and metrics show the name, never the key.
"""

import hmac
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path

from jina_v4_serve.errors import OptionError
from jina_v4_serve.settings import Settings, variable_of
from jina_v4_serve.watched_file import signature

logger = logging.getLogger(__name__)

UNNAMED = "default"
_KEY, _KEY_FILE = variable_of("api_key"), variable_of("api_key_file")
_NAMED = re.compile(r"([A-Za-z0-9_.-]{1,64}):[ \t]+(\S.*)")
_NAME_ALONE = re.compile(r"[A-Za-z0-9_.-]{1,64}:")
_CHECK_S = 1.0  # between two checks of the file


class Keys:
    """The valid keys."""

    def __init__(self, settings: Settings) -> None:
        """Read the keys.

        Raises:
            OptionError: the file cannot be read, has no key, or has one that no client can send.
        """
        self._file = Path(settings.api_key_file) if settings.api_key_file else None
        self._checked_at = time.monotonic()
        self._signature = signature(self._file) if self._file else None
        self._keys = read_key_file(self._file) if self._file else _only(settings.api_key)
        self._failure = ""

    @property
    def open(self) -> bool:
        """Whether callers need no key."""
        return not self._keys

    @property
    def all(self) -> Mapping[str, str]:
        """Every key by its name."""
        return self._keys

    @property
    def first(self) -> str | None:
        """The first key, for a program that calls the server itself; None if there is none."""
        return next(iter(self._keys.values()), None)

    def name_of(self, authorization: str) -> str | None:
        """Return the name of the key in a request's Authorization header; None if the key is not valid."""
        self._read_again()
        scheme, _, sent = authorization.partition(" ")
        secret = sent.strip(" ").encode("utf-8", "surrogateescape")
        name = None
        for each, key in self._keys.items():
            # Every key is compared in constant time, so that nobody can guess one letter by letter.
            if hmac.compare_digest(secret, key.encode()):
                name = each
        return name if scheme.lower() == "bearer" else None

    def _read_again(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._checked_at < _CHECK_S:
            return
        self._checked_at = now
        current = signature(self._file)
        # A file that was written just now may not be complete yet.
        if current == self._signature or (current and 0 <= time.time() - current[0] / 1e9 < _CHECK_S):
            return
        try:
            self._keys = read_key_file(self._file)
        except OptionError as error:  # perhaps for a moment only: the next check reads it again
            if str(error) != self._failure:
                logger.error("the API keys stay as they were: %s", error)
            self._failure = str(error)
            return
        self._signature, self._failure = current, ""
        logger.warning("API keys read again: %s", ", ".join(self._keys))


def read_key_file(path: Path) -> dict[str, str]:
    """Read a file of keys; return the keys by name.

    Raises:
        OptionError: the file cannot be read, has no key, has one that no client can send, or has a name twice.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise OptionError(f"{_KEY_FILE}: cannot read {path}: {error}") from error
    keys: dict[str, str] = {}
    for line in lines:
        if not line or line.startswith("#"):
            continue
        if _NAME_ALONE.fullmatch(line):
            raise OptionError(f"{_KEY_FILE}: {path} has no key after {line} write NAME: KEY, or remove the line")
        match = _NAMED.fullmatch(line)
        name, key = match.groups() if match else (UNNAMED, line)
        if name in keys:
            raise OptionError(f"{_KEY_FILE}: {path} has two keys of the name {name}; write NAME: KEY in each line")
        keys[name] = _checked(f"{_KEY_FILE}: {path}", key)
    if not keys:
        raise OptionError(
            f"{_KEY_FILE}: {path} is empty; write a key into it, or unset the variable to serve everybody"
        )
    return keys


def _only(key: str) -> Mapping[str, str]:
    return {UNNAMED: _checked(_KEY, key)} if key else {}


def _checked(place: str, key: str) -> str:
    if not (key.isascii() and key.isprintable()):
        raise OptionError(
            f"{place} has a key that no header can hold; a key is one line of ASCII (openssl rand -hex 32)"
        )
    return key
