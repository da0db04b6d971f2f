"""The check of the pages finds what it is for, and nothing in code."""

import subprocess
import sys
from pathlib import Path

import pytest

LINT = Path(__file__).parents[1] / "docs" / "lint.py"
WORDS = " ".join(["a"] * 41)


@pytest.mark.parametrize(
    ("page", "line", "finding"),
    [
        (f"# Title\n\nShort.\n\nOne {WORDS}.\n", 5, "a sentence of 42 words"),
        (f"1. first\n2. {WORDS}.\n", 2, "a sentence of 42 words"),
        (f"| a | b |\n|---|---|\n| x | {'y' * 161} |\n", 3, "a cell of 161 characters"),
        ("| a | b |\n\n|---|---|\n| x | y |\n", 1, "no line of dashes below this row"),
        ("x" * 121 + "\n", 1, "a line of 121 characters"),
        ("A sort\nof such of them\n", 2, '"such of"'),
    ],
    ids=["a long sentence", "a long item", "a long cell", "a broken table", "a long line", "a phrase"],
)
def test_what_is_hard_to_read_is_found(tmp_path: Path, page: str, line: int, finding: str) -> None:
    path = tmp_path / "page.md"
    path.write_text(page)
    done = subprocess.run([sys.executable, LINT, path], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.startswith(f"{path}:{line}: {finding}"), done.stdout


def test_code_and_addresses_of_links_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    address = "https://example.com/" + "a" * 200
    path.write_text(f"```\n{WORDS} {WORDS}\n```\n\nSee [it]({address}).\n\n| [a]({address}) | b |\n|---|---|\n")
    done = subprocess.run([sys.executable, LINT, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
