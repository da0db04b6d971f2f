"""Runs all checks, and writes the report as text or JSON."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import typer

from jina_v4_serve.doctor.checkpoints import check_checkpoints, folders_in, task_of, whole_digests
from jina_v4_serve.doctor.finding import Finding, Verdict
from jina_v4_serve.doctor.machine import check_machine
from jina_v4_serve.doctor.ports import check_ports
from jina_v4_serve.doctor.settings import check_settings
from jina_v4_serve.doctor.software import check_software
from jina_v4_serve.errors import OptionError
from jina_v4_serve.facts import GATEWAY_PORT, PORTS
from jina_v4_serve.launch.gpu import Gpu, known_gpu, read_gpus

COLOURS: dict[Verdict, str] = {"ok": "green", "warn": "yellow", "FAIL": "red"}
NARROWEST, WIDEST = 80, 120
_SUBJECT = 16  # columns


def examine(
    checkpoints: Path | None, checkpoint: Path | None, host: str, port: int | None, dtype: str = "auto"
) -> list[Finding]:
    """Run all checks.

    Args:
        checkpoints: the folder of the checkpoints of all tasks, to serve together.
        checkpoint: the folder of one checkpoint; without either, only the machine is checked.
        host: to listen on.
        port: of the gateway, or with `checkpoint` of the server; None for the default.
        dtype: as in --dtype.
    """
    folders = folders_in(checkpoints) if checkpoints else [checkpoint] if checkpoint else []
    gpus: list[Gpu] = []
    failure = ""
    try:
        gpus = read_gpus()
    except OptionError as error:
        failure = str(error)
    used = known_gpu() if gpus else None
    digests = whole_digests(folders)
    usual_port = PORTS.get(task_of(checkpoint), GATEWAY_PORT) if checkpoint else GATEWAY_PORT
    return [
        *check_software(len(gpus)),
        *check_machine(gpus, failure),
        *check_checkpoints(folders, dtype, [used] if used else gpus),
        *check_settings(host),
        *check_ports(host, port or usual_port, () if checkpoint else tuple(PORTS.values()), digests),
    ]


def as_text(findings: Sequence[Finding], width: int) -> str:
    """Write findings for a screen with `width` columns: a line each, with the advice below it."""
    indent = " " * (5 + _SUBJECT)
    wrap = partial(textwrap.wrap, width=min(max(width, NARROWEST), WIDEST), break_on_hyphens=False)
    lines: list[str] = []
    for finding in findings:
        text = f"{finding.verdict:4} {finding.subject:{_SUBJECT - 1}} {finding.found}"
        first, *rest = wrap(text, subsequent_indent=indent)
        coloured = typer.style(finding.verdict, fg=COLOURS[finding.verdict], bold=finding.verdict == "FAIL")
        lines += [first.replace(finding.verdict, coloured, 1), *rest]
        lines += wrap(finding.advice, initial_indent=f"{indent}> ", subsequent_indent=f"{indent}  ")
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in COLOURS}
    lines.append("")
    if counts["FAIL"]:
        lines.append(f"{counts['FAIL']} of {len(findings)} checks FAIL, {counts['warn']} warn")
    else:
        lines.append(f"nothing fails; {counts['warn']} of {len(findings)} checks warn")
        lines.append("what to type into Open WebUI, Dify, RAGFlow and others: jina-v4-serve doctor --programs")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """Write findings as JSON."""
    failed = any(finding.verdict == "FAIL" for finding in findings)
    return json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2)
