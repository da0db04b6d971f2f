"""Errors as the page shows them: a status, a code for the script and a message for the reader."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from jina_v4_client import ArgumentError, JinaV4Error
from jina_v4_client.errors import ServerConnectionError, ServerFailedError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from document_search.errors import DocumentError, SearchError, UsageError


class PageError(Exception):
    """A request that is refused."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


# The first that fits; what comes from the embedding server is told apart from what is wrong here.
_STATUSES: tuple[tuple[type[Exception], int, str], ...] = (
    (DocumentError, 422, "BAD_FILE"),
    (UsageError, 409, "INDEX"),
    (SearchError, 500, "INDEX"),
    (ArgumentError, 422, "BAD_QUERY"),
    (ServerConnectionError, 503, "SERVER_AWAY"),
    (JinaV4Error, 502, "SERVER"),
    (OSError, 500, "DISK"),
)
_AWAY = (502, 503, 504)  # what a gateway answers while its server does not


def error_reply(status: int, code: str, message: str) -> JSONResponse:
    """Make the reply of an error."""
    return JSONResponse({"error": {"code": code, "message": message}}, status)


def as_page_error(error: Exception) -> PageError:
    """Turn an error of the client, the index or a file into one of the page."""
    if isinstance(error, PageError):
        return error
    for kind, status, code in _STATUSES:
        if isinstance(error, kind):
            if isinstance(error, ServerFailedError) and error.status_code in _AWAY:
                status, code = 503, "SERVER_AWAY"
            return PageError(status, code, " ".join(str(error).split()))
    return PageError(500, "BUG", f"internal error: {type(error).__name__}; the terminal says more")


def answer_errors(app: FastAPI) -> None:
    """Let every error of the app be answered in this form."""

    def reply(_: Request, error: Exception) -> JSONResponse:
        page_error = as_page_error(error)
        return error_reply(page_error.status, page_error.code, str(page_error))

    for kind in (PageError, Exception, *(kind for kind, _, _ in _STATUSES)):
        app.add_exception_handler(kind, reply)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = " -> ".join(str(part) for part in first["loc"])
        return error_reply(422, "BAD_REQUEST", f"{where}: {first['msg']}")

    @app.exception_handler(HTTPException)
    def other(_: Request, error: HTTPException) -> JSONResponse:
        return error_reply(error.status_code, "HTTP", str(error.detail))
