"""What docs/stores.md has for servers that cannot run here is what their own clients know: names, values, messages.

No engine reads it, so this finds a wrong word, not a wrong search.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-stores" / "bin" / "python"
SECTIONS = dict(section.partition("\n")[::2] for section in (ROOT / "docs/stores.md").read_text().split("\n## ")[1:])

pytestmark = pytest.mark.long

# Refuses what a call of a client's typed classes does not name, and values that are none of the words that it takes.
KNOWN = """
import inspect, json, re, sys
index, search = json.load(sys.stdin)

def check(call, body):
    parameters = inspect.signature(call).parameters
    for name, value in body.items():
        assert name in parameters, f"{call.__qualname__} knows no {name}"
        words = re.findall(r"Literal\\[([^]]*)\\]", str(parameters[name].annotation))
        if words and isinstance(value, str):
            assert value in re.findall(r"'(.*?)'", " ".join(words)), f"{name} of {call.__qualname__} is no {value}"

rescore = search["rescore"]["query"]["rescore_query"]
"""
ELASTICSEARCH = """
from elasticsearch import Elasticsearch
from elasticsearch.dsl import field, query, types

store = Elasticsearch("http://127.0.0.1:9")
check(store.indices.create, index)
check(store.search, {name.lstrip("_"): value for name, value in search.items()})
fields = index["mappings"]["properties"]
kinds = {"dense_vector": field.DenseVector, "rank_vectors": field.RankVectors}
for settings in fields.values():
    kind = settings.pop("type")
    assert kinds[kind].name == kind
    check(kinds[kind].__init__, settings)
check(types.DenseVectorIndexOptions.__init__, fields["dense"]["index_options"])
check(types.DenseVectorIndexOptionsRescoreVector.__init__, fields["dense"]["index_options"]["rescore_vector"])
check(query.Knn.__init__, search["query"]["knn"])
check(query.ScriptScore.__init__, rescore["script_score"])
check(types.Script.__init__, rescore["script_score"]["script"])
"""
OPENSEARCH = """
from google.protobuf.json_format import ParseDict
from opensearch.protobufs.schemas import common_pb2
from opensearchpy import OpenSearch

store = OpenSearch("http://127.0.0.1:9")
assert inspect.signature(store.indices.create).parameters.keys() >= {"index", "body"}
((name, knn),) = search["query"]["knn"].items()
assert index["mappings"]["properties"][name]["type"] == "knn_vector"
knn["rescore"] = {"context": knn["rescore"]}  # the message has a level that the JSON has not
ParseDict({"field": name, **knn}, common_pb2.KnnQuery())
script = rescore.pop("script_score")["script"]
assert script.keys() <= set(common_pb2.InlineScript.DESCRIPTOR.fields_by_name)
ParseDict({**search["rescore"]["query"], "rescore_query": {"match_all": {}}}, common_pb2.RescoreQuery())
assert search["rescore"]["window_size"] == 100
"""


def run(program: str, folder: Path, stdin: str = "") -> str:
    done = subprocess.run([PYTHON, "-c", program], input=stdin, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("section", "program"),
    [("Elasticsearch", ELASTICSEARCH), ("OpenSearch", OPENSEARCH)],
    ids=["Elastic", "OpenSearch"],
)
def test_the_bodies_of_a_search_server_are_those_that_its_client_knows(
    section: str, program: str, tmp_path: Path
) -> None:
    index, search = map(json.loads, re.findall(r"^```json\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL))
    assert index["mappings"]["_meta"]["jina_v4"].keys() >= {"task", "revision"}
    for name in re.findall(r"params\.([a-z]\w*)", script(search)["source"]):
        assert name in script(search)["params"]
    run(KNOWN + program, tmp_path, json.dumps([index, search]))


def script(search: dict[str, Any]) -> dict[str, Any]:
    return search["rescore"]["query"]["rescore_query"]["script_score"]["script"]


# What OpenSearch's k-NN plugin made of each token's best similarity before it added them up, until it was mended: of
# Lucene's similarities, by the name of the space. Rows have unit length.
SCALED = {
    "innerproduct": lambda best: np.where(best < 0, 1 / (1 - best), best + 1),
    "cosinesimil": lambda best: (1 + best) / 2,
    "l2": lambda best: 1 / (1 + 2 - 2 * best),
}


@pytest.mark.parametrize("n_tokens", [1, 2, 20])
def test_the_script_of_opensearch_orders_by_maxsim_whichever_version_runs_it(n_tokens: int) -> None:
    _, search = map(json.loads, re.findall(r"^```json\n(.*?)^```", SECTIONS["OpenSearch"], re.MULTILINE | re.DOTALL))
    scale = SCALED[script(search)["params"]["space"]]
    best = np.random.default_rng(0).uniform(-1, 1, (1000, n_tokens))  # of each page and each token of the query
    scores, maxsim = scale(best).sum(axis=1), best.sum(axis=1)
    assert (np.argsort(scores) == np.argsort(maxsim)).all()
    assert (scores >= 0).all(), "OpenSearch refuses a negative score"
    assert script(search)["source"] == "lateInteractionScore(params.rows, 'multi', params._source, params.space)"


def block(section: str) -> str:
    (program,) = re.findall(r"^```python\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)
    return program.replace("from pages import FACTS", "FACTS = {'task': 'retrieval', 'revision': 'x'}")


def test_the_schema_that_vespa_s_client_writes_has_both_vectors_and_both_phases(tmp_path: Path) -> None:
    run(block("Vespa"), tmp_path)
    schema = " ".join((tmp_path / "vespa" / "schemas" / "page.sd").read_text().split())
    for part in (
        "field dense type tensor<bfloat16>(x[2048]) { indexing: attribute | index",
        "distance-metric: prenormalized-angular",
        "field multi type tensor<bfloat16>(token{}, v[128]) { indexing: attribute attribute { paged } }",
        "query(multi) tensor<float>(row{}, v[128])",
        "first-phase { expression { closeness(field, dense) } }",
        "second-phase { expression { maxsim } rerank-count: 100 }",
    ):
        assert part in schema, part
    assert json.loads((tmp_path / "vespa" / "jina_v4.json").read_text())["revision"] == "x"
    assert (tmp_path / "vespa" / "services.xml").exists()


def test_weaviate_s_client_makes_a_collection_of_both_vectors_of_the_settings(tmp_path: Path) -> None:
    rendered = "from weaviate.collections.classes.config import _CollectionConfigCreate\n"
    rendered += "print(json.dumps(_CollectionConfigCreate(**PAGES)._to_dict()))"
    made = json.loads(run(f"{block('Weaviate')}\n{rendered}", tmp_path))
    assert json.loads(made["description"])["revision"] == "x"
    dense, multi = (made["vectorConfig"][name]["vectorIndexConfig"] for name in ("dense", "multi"))
    assert (dense["distance"], dense["rq"]["enabled"], dense["rq"]["bits"]) == ("cosine", True, 8)
    assert multi["multivector"] == {"enabled": True, "muvera": {"enabled": True}}
