"""What can go wrong with a corpus.

```
UsageError          the command cannot be run with these options, inputs or output; it embedded nothing (exit code 2)
StoppedError        the run ended early; what is done is kept (exit code 1)
└── ChangedError    an input has changed; the message says what to do
RowError            one row cannot be embedded: it stops the run or is skipped, by --on-error
Interrupted         SIGTERM; like KeyboardInterrupt, which is Ctrl-C, no handler of errors catches it
```

UsageError and StoppedError are JinaV4Errors; their message is one line.
"""

from jina_v4_client.errors import JinaV4Error


class UsageError(JinaV4Error):
    """Options, inputs or the output do not allow the run."""


class StoppedError(JinaV4Error):
    """The run cannot go on."""


class ChangedError(StoppedError):
    """An input has changed; the message says what to do."""


class RowError(Exception):
    """A row that cannot be embedded; the message does not name the row."""


class Interrupted(BaseException):
    """The process received SIGTERM."""
