"""MTEB's tasks against servers of this model: `python -m jina_v4_client.integrations.mteb`, or `JinaV4Encoder` in code.

``mapping`` says which adapter and prompt a task gets, ``encoder`` is what mteb calls, ``run`` evaluates tasks one by
one, ``published`` holds the figures to compare with, ``cli`` prints them beside the scores. It needs the extra
``mteb``, and mteb imports torch; so the encoder is imported no sooner than it is asked for.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jina_v4_client.integrations.mteb.encoder import JinaV4Encoder

__all__ = ["JinaV4Encoder"]

# The packages of the extra, by the name they are imported with.
EXTRA = ("mteb", "typer")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from jina_v4_client.integrations.mteb import encoder
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_missing(error), name=error.name) from error
    return getattr(encoder, name)


def main() -> None:
    """Run the command, or say what is missing for it."""
    try:
        from jina_v4_client.integrations.mteb.cli import app

        app(prog_name=f"python -m {__name__}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.stderr.write(f"error: {_missing(error)}\n")
        sys.exit(2)


def _missing(error: ModuleNotFoundError) -> str:
    return f"the evaluation needs {error.name} here; install it with: pip install 'jina-v4-client[mteb]'"
