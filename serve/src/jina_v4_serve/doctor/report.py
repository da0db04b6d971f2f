"""All checks, and the screen or JSON that tells of them."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer

from jina_v4_serve.doctor.checkpoints import check_checkpoints, folders_in, task_of, whole_digests
from jina_v4_serve.doctor.finding import Finding, Verdict
from jina_v4_serve.doctor.machine import check_machine, read_gpus
from jina_v4_serve.doctor.ports import check_ports
from jina_v4_serve.doctor.settings import check_settings
from jina_v4_serve.doctor.software import check_software
from jina_v4_serve.launcher import PORTS

COLOURS: dict[Verdict, str] = {"ok": "green", "warn": "yellow", "FAIL": "red"}
NARROWEST, WIDEST = 80, 120
_SUBJECT = 16  # columns


def examine(
    checkpoints: Path | None, checkpoint: Path | None, host: str, port: int | None, dtype: str = "auto"
) -> list[Finding]:
    """Run all checks.

    Args:
        checkpoints: folder of all tasks' checkpoints, which are to be served together; None for no such folder.
        checkpoint: folder of one; without either the machine alone is looked at.
        host: that is to be listened on.
        port: of the gateway, with `checkpoint` of the server; None for the usual one.
        dtype: as --dtype.
    """
    folders = folders_in(checkpoints) if checkpoints else [checkpoint] if checkpoint else []
    gpus = read_gpus()
    known = [] if isinstance(gpus, str) else gpus
    digests = whole_digests(folders)
    usual_port = PORTS.get(task_of(checkpoint), 8000) if checkpoint else 8000
    return [
        *check_software(len(known)),
        *check_machine(gpus),
        *check_checkpoints(folders, dtype, known),
        *check_settings(host),
        *check_ports(host, port or usual_port, () if checkpoint else tuple(PORTS.values()), digests),
    ]


def as_text(findings: Sequence[Finding], width: int) -> str:
    """Write findings for a screen: a line each, what to do below it.

    Args:
        findings: in the order of the checks.
        width: of the screen, in columns.
    """
    width = min(max(width, NARROWEST), WIDEST)
    indent = " " * (5 + _SUBJECT)
    lines = []
    for finding in findings:
        wrapped = textwrap.wrap(
            f"{finding.verdict:4} {finding.subject:{_SUBJECT - 1}} {finding.found}",
            width,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
        coloured = typer.style(finding.verdict, fg=COLOURS[finding.verdict], bold=finding.verdict == "FAIL")
        lines.append("\n".join(wrapped).replace(finding.verdict, coloured, 1))
        if finding.advice:
            first, later = f"{indent}> ", f"{indent}  "
            lines += textwrap.wrap(
                finding.advice, width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False
            )
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in COLOURS}
    lines.append("")
    if counts["FAIL"]:
        lines.append(f"{counts['FAIL']} of {len(findings)} checks FAIL, {counts['warn']} warn")
    else:
        lines.append(f"nothing fails; {counts['warn']} of {len(findings)} checks warn")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """Write findings for programs."""
    failed = any(finding.verdict == "FAIL" for finding in findings)
    return json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2)
