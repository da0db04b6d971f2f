"""Other people's clients, as published, against a real server: the examples of docs/other-clients.md give golden rows.

They run in an environment of their own (`make test` makes it), in processes that may reach this machine only; our own
adapters run in ours.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Golden
from oracle import cut
from wire import BOUND, IMAGES, IMAGES_BASE64, MAX_LENGTH, TASK, Site, Wire, array, assert_near

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
ADAPTED = "from jina_v4_client.integrations."
DOCUMENT = (ROOT / "docs" / "other-clients.md").read_text()
SECTIONS = dict(section.partition("\n")[::2] for section in DOCUMENT.split("\n## ")[1:])
PAGE = 2  # the golden image that the examples call page.png

# Section of the document to the golden rows that its examples give, in order.
EXPECTED = {
    "openai": [["passage/0", "passage/1", f"image/{PAGE}"]],
    "openai, async": [["query/0 cut to 128"]],
    "cohere": [["query/0", "passage/1", f"image/{PAGE}"]],
    "litellm, as OpenAI": [["passage/0"]],
    "litellm, as Jina": [["passage/0", f"image/{PAGE}"]],
    "haystack": [["query/0", "passage/1"], [f"image/{PAGE}"]],
    "langchain": [["query/0", "passage/1"]],
    "langchain, with images": [["query/0", "passage/1", f"image/{PAGE}"]],
    "llama-index": [["query/0", "passage/1"]],
    "llama-index, with images": [["query/0", "passage/1", f"image/{PAGE}"]],
}
# The examples of rankings, by the client that each begins with: what they rank, and the golden rows of it.
RANKINGS = dict(re.findall(r"### (.*?)\n.*?```python\n(.*?)```", SECTIONS["Rankings"], re.DOTALL))
RANKED = ("query/0", ["passage/1", "passage/0", "passage/2"])
EXAMPLES = [
    pytest.param(program, rows, id=f"{section} {i + 1}")
    for section, expected in EXPECTED.items()
    for i, (program, rows) in enumerate(
        zip(re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL), expected, strict=True)
    )
]

# Keeps a process on this machine, and remembers what it tried to reach elsewhere.
FENCE = """
import json, sys
elsewhere = []
def fence(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = args[0] if event == "socket.getaddrinfo" else args[1][0] if isinstance(args[1], tuple) else "127.0.0.1"
        if host not in (None, "127.0.0.1", b"127.0.0.1"):
            elsewhere.append(str(host))
            raise OSError(f"{host} is not to be reached from here")
sys.addaudithook(fence)
"""

Run = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path, wire: Wire) -> Run:
    """Run a program in the clients' environment, in a folder with a page.png."""
    shutil.copy(IMAGES[PAGE], tmp_path / "page.png")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HAYSTACK_TELEMETRY_ENABLED": "False",
        "PYTHONUTF8": "1",
    }
    assert PYTHON.exists(), "`make test` makes the clients' environment"

    def run(program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable if ADAPTED in program else PYTHON, "-"],
            input=FENCE + program.replace("http://127.0.0.1:8000", wire.base_url),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def golden_row(golden: Golden, name: str) -> np.ndarray:
    name, _, size = name.partition(" cut to ")
    dense = golden.rows[f"{TASK}/{name}/dense"]
    return cut(dense, int(size)) if size else dense


@pytest.mark.parametrize(("program", "rows"), EXAMPLES)
def test_an_example_of_the_document_gives_the_golden_rows(
    program: str, rows: list[str], run: Run, golden: Golden
) -> None:
    done = run(f"{program}\nprint(json.dumps({{'vectors': vectors, 'elsewhere': elsewhere}}))")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["elsewhere"] == []
    assert_near([array(vector) for vector in printed["vectors"]], [golden_row(golden, name) for name in rows])


def test_every_section_with_python_is_run() -> None:
    assert {name for name, text in SECTIONS.items() if "```python" in text} == EXPECTED.keys() | {"Rankings"}
    assert SECTIONS["Rankings"].count("```python") == len(RANKINGS) == 7


@pytest.mark.parametrize("program", RANKINGS.values(), ids=RANKINGS.keys())
def test_an_example_of_a_ranking_gives_the_order_and_the_scores_of_the_golden_rows(
    program: str, run: Run, golden: Golden
) -> None:
    done = run(f"{program}\nprint(json.dumps({{'ranking': ranking, 'elsewhere': elsewhere}}))")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["elsewhere"] == []
    query, *documents = (golden.rows[f"{TASK}/{name}/multi"] for name in (RANKED[0], *RANKED[1]))
    expected = np.array([(query @ rows.T).max(axis=1).mean() for rows in documents])
    order = np.argsort(-expected)[: 2 if "top_" in program else None]
    assert [index for index, _ in printed["ranking"]] == order.tolist()
    assert np.abs(np.array([score for _, score in printed["ranking"]]) - expected[order]).max() <= BOUND


def test_rankings_clients_read_our_errors(run: Run) -> None:
    done = run(
        """
import cohere, litellm
from cohere.errors import UnprocessableEntityError
client = cohere.ClientV2("none", base_url="http://127.0.0.1:8000")
try:
    client.rerank(model="jina-embeddings-v4-retrieval", query="x", documents=["y"], top_n=0)
except UnprocessableEntityError as error:
    print(error.body["message"])
try:
    litellm.rerank(model="jina_ai/jina-embeddings-v4-retrieval", query="x", documents=[], api_key="none",
                   api_base="http://127.0.0.1:8000/v1")
except Exception as error:
    print(str(error))
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.jina import JinaRanker
url = "http://127.0.0.1:8000/v1/rerank"
ranker = JinaRanker(model="jina-embeddings-v4-code", api_key=Secret.from_token("none"), base_url=url)
try:
    ranker.run(query="x", documents=[Document(content="y")])
except RuntimeError as error:
    print(error.args[0]["message"])
"""
    )
    assert done.returncode == 0, done.stderr
    assert "top_n=0 is not offered" in done.stdout
    assert "documents is empty" in done.stdout
    assert "is for the code server" in done.stdout


def test_token_ids_of_langchain_are_refused_with_the_reason(run: Run) -> None:
    """Its default. The tokenizer's vocabulary would be downloaded, so one of single bytes stands in for it."""
    done = run(
        """
import tiktoken
from tiktoken import registry
ranks = {bytes([i]): i for i in range(256)}
name = "cl100k_base"
registry.ENCODINGS[name] = tiktoken.Encoding(name, pat_str=".", mergeable_ranks=ranks, special_tokens={})
from langchain_openai import OpenAIEmbeddings
from openai import UnprocessableEntityError
client = OpenAIEmbeddings(model="jina-embeddings-v4-retrieval", base_url="http://127.0.0.1:8000/v1", api_key="none")
try:
    client.embed_query("x")
except UnprocessableEntityError as error:
    print(error)
"""
    )
    assert done.returncode == 0, done.stderr
    assert "input[0] has token ids" in done.stdout
    assert "send text" in done.stdout


def test_openai_reads_our_errors(run: Run) -> None:
    done = run(
        """
from openai import BadRequestError, NotFoundError, OpenAI, UnprocessableEntityError
client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", max_retries=0)
cases = [
    (UnprocessableEntityError, {"input": "x", "dimensions": 300}),
    (BadRequestError, {"input": "a b " * 40_000}),
    (NotFoundError, {"input": "x", "model": "text-embedding-3-small"}),
]
for kind, arguments in cases:
    try:
        client.embeddings.create(**({"model": "jina-embeddings-v4-retrieval"} | arguments))
    except kind as error:
        print(json.dumps([error.status_code, error.code, error.param, error.body["message"], error.request_id]))
"""
    )
    assert done.returncode == 0, done.stderr
    errors = [json.loads(line) for line in done.stdout.splitlines()]
    assert [error[:3] for error in errors] == [
        [422, "VALIDATION_ERROR", "dimensions"],
        [400, "INPUT_TOKEN_LIMIT_EXCEEDED", "input"],
        [404, "MODEL_NOT_FOUND", "model"],
    ]
    assert "dimensions=300 is not offered" in errors[0][3]
    assert f"the limit is {MAX_LENGTH}" in errors[1][3]
    assert all(error[4] for error in errors)


def test_cohere_reads_our_errors(run: Run) -> None:
    done = run(
        """
import cohere
from cohere.errors import NotFoundError, UnprocessableEntityError
client = cohere.ClientV2("none", base_url="http://127.0.0.1:8000")
cases = [
    (UnprocessableEntityError, {"input_type": "clustering"}),
    (NotFoundError, {"input_type": "search_query", "model": "embed-v4.0"}),
]
for kind, arguments in cases:
    try:
        client.embed(**({"model": "jina-embeddings-v4-retrieval", "texts": ["x"]} | arguments))
    except kind as error:
        print(json.dumps([error.status_code, error.body["message"]]))
"""
    )
    assert done.returncode == 0, done.stderr
    errors = [json.loads(line) for line in done.stdout.splitlines()]
    assert [status for status, _ in errors] == [422, 404]
    assert "input_type=clustering is not offered" in errors[0][1]
    assert "there is no model embed-v4.0 here" in errors[1][1]


def test_haystack_reads_our_errors(run: Run) -> None:
    done = run(
        """
from haystack.utils import Secret
from haystack_integrations.components.embedders.jina import JinaTextEmbedder
url = "http://127.0.0.1:8000/v1/embeddings"
embedder = JinaTextEmbedder(Secret.from_token("none"), "jina-embeddings-v4", task="code.query", base_url=url)
try:
    embedder.run("x")
except RuntimeError as error:
    print(error.args[0]["message"])
"""
    )
    assert done.returncode == 0, done.stderr
    assert "task=code.query is for the code server" in done.stdout


def test_the_curl_example_of_the_model_card_gives_twelve_vectors(
    wire: Wire, pictures: Site, golden: Golden, tmp_path: Path
) -> None:
    (script,) = re.findall(r"```bash\n(.*?)```", SECTIONS["curl"], re.DOTALL)
    changes = {
        "http://127.0.0.1:8000": wire.base_url,
        "https://example.com/beach.png": f"{pictures.url}/{IMAGES[0].name}",
        "base64,PICTURE": f"base64,{IMAGES_BASE64[1]}",
        '"PICTURE"': f'"{IMAGES_BASE64[3]}"',
        '"text-matching"': f'"{TASK}"',
    }
    for old, new in changes.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    options = f"curl --silent --show-error --noproxy '*' --output {tmp_path}/answer --write-out '%{{http_code}}'"
    script = script.replace("curl", options, 1)
    done = subprocess.run(
        ["bash"], input=script, capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"]}
    )
    assert (done.returncode, done.stdout) == (0, "200"), done.stderr
    answer = json.loads((tmp_path / "answer").read_bytes())
    assert [item["index"] for item in answer["data"]] == list(range(12))
    vectors = [array(item["embedding"]) for item in answer["data"]]
    assert all(abs(np.linalg.norm(vector) - 1) < 1e-6 for vector in vectors)
    assert_near(vectors[9:], [golden_row(golden, f"image/{i}") for i in (0, 1, 3)])
    singles = [wire.ask({"input": text})["data"][0]["embedding"] for text in re.findall(r'"text": "(.*?)"', script)]
    assert len(singles) == 9
    assert_near(vectors[:9], [array(vector) for vector in singles])
