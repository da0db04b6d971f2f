"""The settings are defined once: docs/serve.md has a row for each, as its definition says."""

from dataclasses import fields
from pathlib import Path

import pytest
from jina_v4_serve.settings import PREFIX, Settings, read_settings, variable_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [setting.name for setting in fields(Settings)])
def test_the_docs_have_the_row_of_each_setting(name: str) -> None:
    (about,) = [setting.metadata for setting in fields(Settings) if setting.name == name]
    row = f"| `{variable_of(name)}` | {about['shown']} | {about['about']} |"
    assert row in (ROOT / "docs" / "serve.md").read_text().splitlines()


def test_the_docs_have_no_row_that_is_no_setting() -> None:
    rows = [line for line in (ROOT / "docs" / "serve.md").read_text().splitlines() if line.startswith(f"| `{PREFIX}")]
    assert len(rows) == len(fields(Settings))


def test_a_variable_of_a_name_is_read_into_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in fields(Settings):
        text = {"log": "json", "allowed_origins": "https://a.example", "image_hosts": "minio"}.get(setting.name, "7")
        monkeypatch.setenv(variable_of(setting.name), text)
    found = read_settings()
    assert {setting.name for setting in fields(Settings) if getattr(found, setting.name) == setting.default} == set()
    assert (found.max_items, found.log, found.image_hosts) == (7, "json", {"minio"})
