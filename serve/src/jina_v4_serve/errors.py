"""Errors before and while vLLM starts.

ServeError
├── CheckpointError   the folder is not a complete merged checkpoint, or is of another task
├── EngineError       the engine fails or hangs at the start
├── OptionError       an option or setting that is not offered, or that would change the vectors
└── PortError         the address is in use, or this user may not listen on it
"""


class ServeError(Exception):
    """Base of every error that the launcher reports as one line."""


class CheckpointError(ServeError):
    """The folder is not a complete merged checkpoint, or is of another task."""


class EngineError(ServeError):
    """The engine fails or hangs at the start."""


class OptionError(ServeError):
    """An option or setting that is not offered, or that would change the vectors."""


class PortError(ServeError):
    """The address is in use, or this user may not listen on it."""
