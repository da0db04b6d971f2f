"""The recipes of docs/stores.md, run as they are in the real engines, find what the client's exact search finds.

The pages are made up; `jina-v4-embed` wrote them. The stores are in an environment of their own (`make test-all` makes
it), PostgreSQL included; LanceDB is in ours.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from client.conftest import FakeServer  # it plays the server
from embed_command import embed_with
from jina_v4_client.scoring import rank
from made_up_pages import MadeUp, make_up
from pyarrow import parquet

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "stores.md").read_text()
SECTIONS = dict(section.partition("\n")[::2] for section in PAGE.split("\n## ")[1:])
PYTHON = ROOT / ".venv-stores" / "bin" / "python"
RECIPES = {"Qdrant": PYTHON, "pgvector": PYTHON, "LanceDB": Path(sys.executable), "Milvus": PYTHON, "Chroma": PYTHON}
# Sections whose blocks the recipes import, and those of servers that cannot run here (test_bodies.py).
NO_RECIPES = {"What every recipe needs", "Stores without MaxSim", "Vespa", "Weaviate"}
REVISION, OTHER_REVISION = "94ab5b9a669fa4df-bfloat16-602112", "0123456789abcdef-bfloat16-602112"
N_PAGES, N_QUERIES, N_NEAR = 160, 10, 100
# Behind a recipe: searches, the first one for a text that is a URL, and once more, with a new client, when the server
# has another revision of the model.
SEARCHES = """
import json, sys
search("{url}/query 0")
print(json.dumps([search(f"query {{number}}") for number in range({n_queries})]), flush=True)
sys.stdin.readline()
client.close()
{connects}
search("query 0")
"""
# The recipe of Qdrant in the server's engine, for queries from the standard input.
QDRANT_ENGINE = """
import json, sys
from pages import pages
from qdrant_edge import (
    Distance, EdgeConfig, EdgeShard, EdgeVectorParams, HnswIndexConfig, MultiVectorComparator, MultiVectorConfig,
    Point, Prefetch, Query, QueryRequest, UpdateOperation, VectorStorageDatatype,
)
half, no_graph = VectorStorageDatatype.Float16, HnswIndexConfig(m=0, ef_construct=100, full_scan_threshold=10000)
max_sim = MultiVectorConfig(MultiVectorComparator.MaxSim)
shard = EdgeShard.create("shard", EdgeConfig(vectors={
    "dense": EdgeVectorParams(2048, Distance.Cosine, datatype=half),
    "multi": EdgeVectorParams(128, Distance.Dot, datatype=half, multivector_config=max_sim, hnsw_config=no_graph),
}))
points = [
    Point(number, {"dense": dense.tolist(), "multi": multi.tolist()}, {"page": page})
    for number, (page, dense, multi) in enumerate(pages())
]
shard.update(UpdateOperation.upsert_points(points))
found = []
for dense, rows in json.load(sys.stdin):
    near = Prefetch(100, Query.Nearest(dense, using="dense"))
    request = QueryRequest(10, query=Query.Nearest(rows, using="multi"), prefetches=[near], with_payload=True)
    found.append([point.payload["page"] for point in shard.query(request)])
print(json.dumps(found))
"""

pytestmark = pytest.mark.long


@dataclass(frozen=True)
class Site:
    """A server of made-up vectors, and the files that `jina-v4-embed` wrote from it."""

    server: FakeServer
    folder: Path
    queries: MadeUp


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made_up = make_up(N_PAGES, N_QUERIES)
    server = FakeServer()
    server.play_ours()

    def place(item: str) -> int:  # of "Passage: page 7" or "Query: query 7"
        _, kind, number = item.replace("/", " ").rsplit(maxsplit=2)
        return int(number) + (N_QUERIES if kind == "page" else 0)

    # type: ignore, because mypy wants methods to stay what they are; this server returns made-up vectors instead.
    server.vector = lambda item, *_: made_up.dense[place(item)]  # type: ignore[method-assign] # see above
    server.token_rows = lambda item: made_up.multi[place(item)]  # type: ignore[method-assign] # see above
    server.revisions = {"retrieval": REVISION}
    folder = tmp_path_factory.mktemp("stores")
    (folder / "pages").write_text("".join(f"page {number}\n" for number in range(N_PAGES)))
    embed = embed_with("--quiet", "--batch-size", 100, "--input-format", "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for arguments in re.findall(r"^\$ jina-v4-embed (.*)$", PAGE, re.MULTILINE):
            ran = embed(*arguments.replace("http://127.0.0.1:8001", server.url).split())
            assert ran.code == 0, ran.stderr
    for section in ("What every recipe needs", "Stores without MaxSim"):
        for name, module in re.findall(
            r"^```python\n# (\w+\.py)\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL
        ):
            (folder / name).write_text(module.replace("http://127.0.0.1:8001", server.url))
    yield Site(server, folder, MadeUp(made_up.dense[:N_QUERIES], made_up.multi[:N_QUERIES]))
    server.close()


@pytest.fixture(scope="module")
def exact(site: Site) -> list[list[str]]:
    """What exact search finds: the ten best by MaxSim among the hundred best by cosine."""
    table = parquet.read_table(site.folder / "dense.parquet")
    ids, dense = table["id"].to_pylist(), np.stack(table["vector"].to_numpy())
    multi = [np.stack(page) for page in parquet.read_table(site.folder / "multi.parquet")["vector"].to_numpy()]
    found = []
    for vector, rows in zip(site.queries.dense, site.queries.multi, strict=True):
        near = [hit.index for hit in rank(vector, dense, N_NEAR)]
        found.append([ids[near[hit.index]] for hit in rank(rows, [multi[i] for i in near], 10)])
    return found


def recipe(section: str) -> str:
    (program,) = re.findall(r"^```python\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)
    return program.replace("coastal cities", "query 0")


@pytest.mark.parametrize("section", RECIPES)
def test_a_recipe_finds_what_exact_search_finds_and_refuses_another_revision(
    section: str, site: Site, exact: list[list[str]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    variables = request.getfixturevalue("postgres") if section == "pgvector" else {}
    for file in site.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    program = recipe(section)
    (connects,) = re.findall(r"^client = connect\(.*\)$", program, re.MULTILINE)
    (tmp_path / "recipe.py").write_text(
        program + SEARCHES.format(n_queries=N_QUERIES, connects=connects, url=site.server.url)
    )
    process = subprocess.Popen(
        [RECIPES[section], "recipe.py"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        first, searches = process.stdout.readline(), process.stdout.readline()
        site.server.revisions = {"retrieval": OTHER_REVISION}
        _, errors = process.communicate("\n")
        site.server.revisions = {"retrieval": REVISION}
    assert searches, errors
    assert {seen.path for seen in site.server.seen} == {"/v1/models", "/v1/embeddings"}, "a query is a text"
    assert json.loads(searches) == exact
    assert first == f"{exact[0]}\n"
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("jina_v4_client.errors.WrongServerError: "), errors
    assert OTHER_REVISION in errors


def write_multi(folder: Path, change: str) -> None:
    """Write multi.parquet and multi.safetensors as another run would have written them."""
    table = parquet.read_table(folder / "multi.parquet")
    tensors = (folder / "multi.safetensors").read_bytes()
    if change == "another page":
        ids = ["page of later", *table["id"].to_pylist()[1:]]
        table = table.set_column(table.schema.get_field_index("id"), "id", [ids])
    else:
        facts = table.schema.metadata[b"jina_v4"].replace(REVISION.encode(), OTHER_REVISION.encode())
        tensors = tensors.replace(REVISION.encode(), OTHER_REVISION.encode())
        table = table.replace_schema_metadata({b"jina_v4": facts})
    for name in ("multi.parquet", "multi.safetensors"):
        (folder / name).unlink()  # a link to what the other tests read
    parquet.write_table(table, folder / "multi.parquet")
    (folder / "multi.safetensors").write_bytes(tensors)


@pytest.mark.parametrize("change", ["another page", "another revision"])
@pytest.mark.parametrize("section", ["Qdrant", "LanceDB"])
def test_a_recipe_refuses_multi_vectors_of_another_page_or_revision(
    section: str, change: str, site: Site, tmp_path: Path
) -> None:
    for file in site.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    write_multi(tmp_path, change)
    done = subprocess.run([RECIPES[section], "-"], input=recipe(section), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: "), done.stderr
    assert "dense.parquet" in last
    assert "multi.parquet" in last
    assert change == "another page" or (REVISION in last and OTHER_REVISION in last)


def test_maxsim_refuses_a_file_of_another_revision_than_the_dense_vectors(site: Site, tmp_path: Path) -> None:
    for file in site.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    write_multi(tmp_path, "another revision")
    (tmp_path / "multi.parquet").unlink()
    (tmp_path / "multi.parquet").symlink_to(site.folder / "multi.parquet")
    done = subprocess.run([sys.executable, "-c", "import maxsim"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"ValueError: multi.safetensors has revision {OTHER_REVISION}")


def test_qdrant_s_engine_finds_the_same_as_the_local_mode_of_its_client(
    site: Site, exact: list[list[str]], tmp_path: Path
) -> None:
    for file in site.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    queries = [
        [dense.tolist(), rows.tolist()] for dense, rows in zip(site.queries.dense, site.queries.multi, strict=True)
    ]
    done = subprocess.run(
        [PYTHON, "-c", QDRANT_ENGINE], input=json.dumps(queries), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == exact


def test_every_section_with_python_is_run() -> None:
    assert {name for name, text in SECTIONS.items() if "```python" in text} == RECIPES.keys() | NO_RECIPES
