"""Runs it: `python examples/document_search`."""

import sys
from pathlib import Path

if not __package__:  # run as a folder, not with -m: Python then looks for modules in the folder itself
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from document_search.cli import main

main()
