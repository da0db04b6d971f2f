"""What can be wrong before vLLM is started.

ServeError
├── CheckpointError   the folder is not a whole merged checkpoint, or not one of the asked task
├── OptionError       an option that cannot be served, or that would change the vectors
└── PortError         the address is taken or not ours to listen on
"""


class ServeError(Exception):
    """Base of every error that the launcher reports as one line."""


class CheckpointError(ServeError):
    """The folder is not a whole merged checkpoint, or not one of the asked task."""


class OptionError(ServeError):
    """An option that cannot be served, or that would change the vectors."""


class PortError(ServeError):
    """The address is taken or not ours to listen on."""
