"""What our wheels need of other packages and this Python lacks, as pinned lines: `python3 unmet.py PINS > more.txt`.

An image of vLLM is not resolved anew when our wheels are added: what is there was built and tested together. With
`--check` nothing is printed, and the exit code says whether all is there; so it ends a build whose image cannot work.
"""

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = ("jina-v4-merge", "jina-v4-serve")


def unmet(distribution: str) -> list[Requirement]:
    """Return the requirements of an installed distribution that are not installed, or in no version that will do."""
    found = []
    for line in metadata.requires(distribution) or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(requirement)
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(requirement)
    return found


def pinned(pins: Path) -> dict[str, str]:
    """Return the lines of a requirements file that hold here, by name."""
    lines = {}
    for line in pins.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            lines[canonicalize_name(requirement.name)] = f"{requirement.name}{requirement.specifier}"
    return lines


def main(arguments: list[str]) -> int:
    """Print or check; return the exit code."""
    *options, pins = arguments
    missing = {canonicalize_name(each.name): each for distribution in OURS for each in unmet(distribution)}
    if options == ["--check"]:
        for each in missing.values():
            sys.stderr.write(f"error: {each} is needed and not there\n")
        return 1 if missing else 0
    lines = pinned(Path(pins))
    if unknown := missing.keys() - lines.keys():
        sys.stderr.write(f"error: {pins} pins no {', '.join(sorted(unknown))}\n")
        return 1
    sys.stdout.writelines(f"{lines[name]}\n" for name in sorted(missing))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
