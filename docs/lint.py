"""Find what makes a page hard to read: long sentences, cells and lines, broken tables, words that we do not use.

    python docs/lint.py README.md docs/*.md

Code blocks are left out. Prints a line for each finding; the exit code is 1 where there is any.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

MOST_WORDS = 40  # of a sentence
MOST_CELL = 160  # characters of a table's cell, without the addresses of its links
MOST_LINE = 120  # characters of a line of prose
NOT_USED = (
    "it is gone on with",
    "gone on with",
    "such of",
    "none yet",
    "does it grow",
    "thousand million",
    "waits for nothing",
    "is to be gone",
)
_BLOCK = re.compile(r"^```.*?^```\n?", re.MULTILINE | re.DOTALL)
_SEPARATOR = re.compile(r"\|(?: *:?-+:? *\|)+")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_SENTENCE_END = re.compile(r"(?<=[.!?:;])\)?\s+(?=[A-Z`\[\"(])")


def findings(page: str) -> Iterator[tuple[int, str]]:
    """Yield the number of a line and what is wrong there.

    Args:
        page: Markdown.
    """
    prose = _BLOCK.sub(lambda block: "\n" * block[0].count("\n"), page)
    lines = prose.splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("|"):
            begins = number == 1 or not lines[number - 2].startswith("|")
            if begins and not _SEPARATOR.fullmatch("".join(lines[number : number + 1])):
                yield number, "no line of dashes below this row, so it begins no table"
            for cell in re.split(r"(?<!\\)\|", _LINK.sub(r"\1", line))[1:-1]:
                if len(cell.strip()) > MOST_CELL:
                    yield number, f"a cell of {len(cell.strip())} characters: {cell.strip()[:40]}..."
        elif len(_LINK.sub(r"\1", line)) > MOST_LINE and "](" not in line:
            yield number, f"a line of {len(line)} characters"
        for phrase in NOT_USED:
            if phrase in line.lower():
                yield number, f'"{phrase}"'
    number = 1
    for paragraph in re.split(r"(\n\s*\n|\n(?=\s*(?:[-*#|]|\d+\. )))", prose):
        if paragraph.strip() and not paragraph.lstrip().startswith("|"):
            for sentence in _SENTENCE_END.split(" ".join(_LINK.sub(r"\1", paragraph).split())):
                if len(sentence.split()) > MOST_WORDS:
                    yield number, f"a sentence of {len(sentence.split())} words: {sentence[:60]}..."
        number += paragraph.count("\n")


def main() -> int:
    """Print the findings of the pages that are named; return the exit code."""
    n_found = 0
    for name in sys.argv[1:]:
        for number, finding in sorted(findings(Path(name).read_text())):
            print(f"{name}:{number}: {finding}")  # noqa: T201 - what the command is for
            n_found += 1
    return min(n_found, 1)


if __name__ == "__main__":
    sys.exit(main())
