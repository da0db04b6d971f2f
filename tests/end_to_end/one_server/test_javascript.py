"""JavaScript clients, as published, against a real server: the examples of docs/other-clients.md give golden rows."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import httpx2
import pytest
from conftest import Golden
from doors import ORIGIN
from servers import PATIENCE_S
from wire import IMAGES, TASK, Wire, array, assert_near

ROOT = Path(__file__).parents[3]
CLIENTS = ROOT / ".node-clients"
PAGE = 2  # the golden image that the examples call page.png
EXAMPLES = dict(
    re.findall(r"^### (.*?)\n.*?```js\n(.*?)```", (ROOT / "docs/other-clients.md").read_text(), re.M | re.S)
)
EXPECTED = {
    "openai": ["passage/1"],
    "ai, with jina-ai-provider": ["passage/1", f"image/{PAGE}"],
    "langchain": ["query/0", "passage/1"],
}


def test_every_example_has_its_rows() -> None:
    assert EXAMPLES.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.skipif(not (CLIENTS / "node_modules").exists(), reason="`make test` found no npm, or no package index")
def test_an_example_gives_the_golden_rows(name: str, wire: Wire, golden: Golden, tmp_path: Path) -> None:
    shutil.copy(IMAGES[PAGE], tmp_path / "page.png")
    (tmp_path / "node_modules").symlink_to(CLIENTS / "node_modules")
    program = EXAMPLES[name].replace("http://127.0.0.1:8000", wire.base_url)
    (tmp_path / "program.mjs").write_text(f"{program}\nconsole.log(JSON.stringify(vectors));\n")
    done = subprocess.run(
        ["node", "program.mjs"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    found = [array(vector) for vector in json.loads(done.stdout.splitlines()[-1])]
    assert_near(found, [golden.rows[f"{TASK}/{row}/dense"] for row in EXPECTED[name]])


def test_a_page_of_an_allowed_origin_may_call_and_another_may_not(wire: Wire) -> None:
    """What a browser asks before it lets a page post JSON."""
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    with httpx2.Client(base_url=wire.base_url, timeout=60, trust_env=False) as http:
        allowed = http.options("/v1/embeddings", headers={**wanted, "origin": ORIGIN})
        refused = http.options("/v1/embeddings", headers={**wanted, "origin": "https://evil.example"})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (204, ORIGIN)
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers
