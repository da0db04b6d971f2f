"""Runs `jina-v4-embed` in this process, for the tests that look at what it takes and what it says."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jina_v4_client.embed.cli import app
from numpy.typing import NDArray
from pyarrow import parquet
from typer.testing import CliRunner


@dataclass(frozen=True)
class Ran:
    code: int
    stdout: str
    stderr: str

    @property
    def line(self) -> str:
        """The one line that the run ended with."""
        (line,) = self.stderr.splitlines()
        return line


Embed = Callable[..., Ran]


def embed_with(*options: object) -> Embed:
    """Make a function that runs the command with these options and others."""

    def run(*arguments: object, stdin: bytes | None = None) -> Ran:
        result = CliRunner().invoke(app, [*map(str, options), *map(str, arguments)], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    table = parquet.read_table(path)
    return table["id"].to_pylist(), np.array(table["vector"].to_pylist(), dtype=np.float32)


def read_errors(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(f"{path}.errors.jsonl").read_text().splitlines()]
