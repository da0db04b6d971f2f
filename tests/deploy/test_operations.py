"""docs/operations.md: alerts and links lead to its sections, and its sums are those of the model's numbers."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operations.md"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rules() -> list[dict[str, dict[str, str]]]:
    groups = yaml.safe_load((ROOT / "deploy" / "monitoring" / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def test_every_alert_leads_to_a_section_of_the_runbook() -> None:
    links = [rule["annotations"]["runbook"] for rule in rules()]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert anchor in anchors(ROOT / path), link


def test_every_section_of_the_runbook_is_some_alerts() -> None:
    part = PAGE.read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
    sections = {heading.lower().replace(" ", "-") for heading in re.findall(r"^### (.+)$", part, re.MULTILINE)}
    assert sections == {rule["annotations"]["runbook"].partition("#")[2] for rule in rules()}


def test_links_between_pages_and_to_sections_resolve() -> None:
    for path, anchor in re.findall(r"\]\(([\w.-]*\.md)?(?:#([\w-]+))?\)", PAGE.read_text()):
        target = PAGE.parent / path if path else PAGE
        assert target.is_file(), path
        assert not anchor or anchor in anchors(target), anchor


def test_the_sections_that_the_doctor_names_are_there() -> None:
    sources = (ROOT / "serve" / "src" / "jina_v4_serve" / "doctor").glob("*.py")
    named = {anchor for path in sources for anchor in re.findall(r"operations\.md#([\w-]+)", path.read_text())}
    assert named
    assert named <= anchors(PAGE)


def test_the_bytes_of_the_tables_follow_from_the_model() -> None:
    text = " ".join(PAGE.read_text().split())
    rows, pooled, token_values = 768 + 11, (768 + 11) // 4, 2 * 36 * 2 * 128
    per_page = (2048 * 4, 2048 + 4, 2048 // 8, rows * 512, rows * 256, rows * 132, rows * 16, pooled * 132, pooled * 16)
    for n_bytes in per_page:
        assert f"| {n_bytes:,} |" in text
    assert f"{token_values:,} numbers a token" in text
    assert f"{1e9 / 88 / 3600:,.0f} GPU hours" in text
    assert f"{1e9 * 512 / 128_000 / 3600:,.0f} GPU hours" in text
    assert f"{32768 * token_values * 2 / 1e9:.2f} GB" in text


def test_the_table_of_the_pipeline_is_what_its_script_prints() -> None:
    ran = subprocess.run([sys.executable, ROOT / "benchmarks/corpus.py"], capture_output=True, text=True, check=True)
    table = ran.stdout.partition("\n")[2]
    assert table.count("\n") == 11
    assert table in PAGE.read_text()
