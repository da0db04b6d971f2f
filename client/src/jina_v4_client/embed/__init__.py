"""`jina-v4-embed`: embeds a corpus; it can be killed at any moment and goes on where it was.

The way of a row: ``inputs`` opens what the command line names, and ``tables``, ``pages`` or ``folder`` yield the row.
``work`` reads its ``content``, has it embedded in a batch by ``encoder``, and keeps the vector on disk in the
``journal``. ``output`` writes all vectors to one file, in the order of the input. ``run`` puts these together. What is
done so far is in the ``work_folder``, and only a run with the same ``job`` (options and inputs) goes on with it. The
command needs the client's extra `embed`.
"""

import importlib
import sys

from jina_v4_client.embed.errors import UsageError

# The packages of the extra, by the name they are imported with.
EXTRA = ("typer", "tqdm", "pyarrow", "pypdfium2")


def main() -> None:
    """Run the command, or say which package is missing."""
    try:
        from jina_v4_client.embed.cli import app
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.stderr.write(f"error: {_missing(error.name)}\n")
        sys.exit(2)
    app(prog_name="jina-v4-embed")


def check_installed(name: str) -> None:
    """Refuse an input or output whose package is not installed; packages that not every run needs are imported late.

    Raises:
        UsageError: it is not installed.
    """
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(_missing(name)) from error


def _missing(name: str) -> str:
    return f"jina-v4-embed needs {name} here; install it with: pip install 'jina-v4-client[embed]'"
