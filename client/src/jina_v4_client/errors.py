"""Every error of this package.

```
JinaV4Error
├── ArgumentError (also ValueError)               the call cannot be made; nothing was embedded
│   └── ImageError                                an image that cannot be read, or fetched from its URL
└── ServerError                                   the server did not return what was requested; no vector is returned
    ├── ServerConnectionError                     nobody answered
    │   └── ServerTimeoutError                    no answer in time
    ├── ServerAuthenticationError                 401, 403: the API key
    ├── ServerRefusedError                        any other 3xx or 4xx: the server's reason is in the message
    ├── ServerFailedError                         5xx, after the retries
    ├── WrongServerError                          a server that serves another task, or is set up in another way
    └── BadReplyError                             status 200, but not the vectors that were asked for
```

Where an exception of the openai package is behind one of these, it is the ``__cause__``.
"""


class JinaV4Error(Exception):
    """Base of every error of this package."""


class ArgumentError(JinaV4Error, ValueError):
    """An argument that is not allowed; found before anything of the call is sent to be embedded."""


class ImageError(ArgumentError):
    """An image that cannot be read; the message names its place in the list and its source."""


class ServerError(JinaV4Error):
    """The server did not return what was requested.

    Attributes:
        status_code: the HTTP status of the reply, None if there was none.
        retry_after_s: the Retry-After of the reply, if it has one.
        param: the field at fault, as the server names it, such as ``input[3].image``; its count is the request's.
    """

    def __init__(
        self,
        message: str,
        *,
        status_code: int | None = None,
        retry_after_s: float | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.retry_after_s = retry_after_s
        self.param = param


class ServerConnectionError(ServerError):
    """Nobody answered at the address, or the connection broke."""


class ServerTimeoutError(ServerConnectionError):
    """No answer within the time allowed."""


class ServerAuthenticationError(ServerError):
    """The server did not accept the API key."""


class ServerRefusedError(ServerError):
    """The server refused the request and said why."""


class ServerFailedError(ServerError):
    """The server failed, and failed again when the request was repeated."""


class WrongServerError(ServerError):
    """The server works, but serves another task or is set up so that it returns other vectors."""


class BadReplyError(ServerError):
    """A reply with status 200 that does not hold the vectors that were asked for."""
