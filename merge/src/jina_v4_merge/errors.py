"""Everything that can stop this program for a reason the user can act on.

MergeError
├── SourceError   the base model cannot be found, reached or read
├── ConfigError   a config asks for something that is not folded here
├── LayoutError   tensors unknown, missing or of the wrong shape
├── WeightError   a weight is not finite, or does not fit the output dtype
└── OutputError   the target exists already or cannot be written
"""

from collections.abc import Sequence

_NAMED_AT_MOST = 5


class MergeError(Exception):
    """Base of all errors here; the message says what happened, what is allowed, what to do."""


class SourceError(MergeError):
    """The base model cannot be found, reached or read."""


class ConfigError(MergeError):
    """A config is broken or asks for something that is not folded here."""


class LayoutError(MergeError):
    """Tensors are unknown, missing or of the wrong shape."""


class WeightError(MergeError):
    """A weight is not finite, or does not fit the output dtype."""


class OutputError(MergeError):
    """The target exists already or cannot be written."""


def named(items: Sequence[str]) -> str:
    """Return the first few items, separated by commas, and how many more there are."""
    shown = ", ".join(items[:_NAMED_AT_MOST])
    rest = len(items) - _NAMED_AT_MOST
    return f"{shown} and {rest} more" if rest > 0 else shown
