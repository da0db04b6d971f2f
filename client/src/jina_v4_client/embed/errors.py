"""What can go wrong with a corpus.

```
EmbedError (a JinaV4Error)
├── UsageError      the command cannot be run as it was given; nothing was embedded by it (exit code 2)
└── StoppedError    the run ended before its end; what was done is kept (exit code 1)
    └── ChangedError    the inputs are not what they were; the message says what helps
RowError            one row cannot be embedded: it stops the run or is skipped, as --on-error says
Interrupted         SIGTERM, as KeyboardInterrupt is Ctrl-C; no error that anything may catch
```
"""

from jina_v4_client.errors import JinaV4Error


class EmbedError(JinaV4Error):
    """Base of what ends a run with a message; the message is one line."""


class UsageError(EmbedError):
    """Options, inputs or the output do not allow the run."""


class StoppedError(EmbedError):
    """The run cannot go on."""


class ChangedError(StoppedError):
    """The inputs are not what they were; the message says what helps."""


class RowError(Exception):
    """A row that cannot be embedded; the message does not name it."""


class Interrupted(BaseException):
    """The process was asked to end."""
