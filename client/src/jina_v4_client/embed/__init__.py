"""`jina-v4-embed`: a corpus in, vectors out, to be killed and resumed at any moment.

``inputs`` (with ``tables`` and ``pages``) gives the rows, ``work`` has them embedded by several requests at once,
``journal`` keeps on the disk what is done, ``output`` joins it into one file in the order of the input. ``job`` tells
whether a run may go on where another ended. The command needs more than the client does: the extra ``embed``.
"""

import sys

# The packages of the extra, by the name they are imported with.
EXTRA = ("typer", "tqdm", "pyarrow", "pypdfium2")


def main() -> None:
    """Run the command, or say what is missing for it."""
    try:
        from jina_v4_client.embed.cli import app
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.stderr.write(f"error: {missing(error.name)}\n")
        sys.exit(2)
    app(prog_name="jina-v4-embed")


def missing(name: str) -> str:
    """Say how a package of the extra is installed."""
    return f"jina-v4-embed needs {name} here; install it with: pip install 'jina-v4-client[embed]'"
