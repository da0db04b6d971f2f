"""What can go wrong; each message is one line.

```
SearchError          the command cannot go on: exit code 1
├── DocumentError    a PDF file is at fault; others can be indexed all the same
└── UsageError       the command cannot be run as it was given: exit code 2
```
Errors of the client come as they are.
"""


class SearchError(Exception):
    """Base of what ends a command with a message."""


class DocumentError(SearchError):
    """A PDF file cannot be read or rendered."""


class UsageError(SearchError):
    """Arguments, or the index they name, do not allow the command."""
