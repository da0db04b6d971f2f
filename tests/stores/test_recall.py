"""What the quantization of each store loses on made-up vectors, beside exact search; docs/stores.md has the figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Figure
from jina_v4_client.quantization import quantize_binary, quantize_int8, search
from jina_v4_client.scoring import rank
from made_up_pages import make_up

PYTHON = Path(__file__).parents[2] / ".venv-stores" / "bin" / "python"
N_PAGES, N_QUERIES = 3000, 60

pytestmark = pytest.mark.slow

# Each prints, by method, the places of what it finds for each query.
QDRANT = """
from qdrant_edge import (
    BinaryQuantizationConfig, Distance, EdgeConfig, EdgeOptimizersConfig, EdgeShard, EdgeVectorParams, Point, Query,
    QuantizationSearchParams, QueryRequest, ScalarQuantizationConfig, ScalarType, SearchParams, UpdateOperation,
)
quantizations = {"int8": ScalarQuantizationConfig(type=ScalarType.Int8), "binary": BinaryQuantizationConfig()}
for name, quantization in quantizations.items():
    params = EdgeVectorParams(size=2048, distance=Distance.Cosine, quantization_config=quantization)
    at_once = EdgeOptimizersConfig(indexing_threshold=1)
    shard = EdgeShard.create(name, EdgeConfig(vectors={"dense": params}, optimizers=at_once))
    shard.update(UpdateOperation.upsert_points([Point(i, {"dense": page.tolist()}) for i, page in enumerate(pages)]))
    assert shard.optimize()
    for label, search in {
        name: QuantizationSearchParams(rescore=False),
        f"{name}, rescored": QuantizationSearchParams(rescore=True, oversampling=4.0),
    }.items():
        found[label] = [
            [
                point.id
                for point in shard.query(
                    QueryRequest(
                        limit=10,
                        query=Query.Nearest(query.tolist(), using="dense"),
                        params=SearchParams(hnsw_ef=200, quantization=search),
                    )
                )
            ]
            for query in queries
        ]
"""

PGVECTOR = """
import psycopg
from pgvector import HalfVector
from pgvector.psycopg import register_vector

store = psycopg.connect("dbname=pages", autocommit=True)
store.execute("CREATE EXTENSION vector")
register_vector(store)
store.execute(
    "CREATE TABLE pages (id int, dense halfvec(2048),"
    " bits bit(2048) GENERATED ALWAYS AS (binary_quantize(dense)::bit(2048)) STORED)"
)
with store.cursor().copy("COPY pages (id, dense) FROM STDIN WITH (FORMAT binary)") as copy:
    copy.set_types(["int4", "halfvec"])
    for i, page in enumerate(pages):
        copy.write_row([i, HalfVector(page)])
def go(sql):
    return [[i for (i,) in store.execute(sql, {"q": HalfVector(query)})] for query in queries]
bits = "bits <~> binary_quantize(%(q)s)::bit(2048)"
again = f"SELECT id FROM (SELECT * FROM pages ORDER BY {bits} LIMIT 40) AS near ORDER BY dense <=> %(q)s LIMIT 10"
found["halfvec, no index"] = go("SELECT id FROM pages ORDER BY dense <=> %(q)s LIMIT 10")
store.execute("CREATE INDEX ON pages USING hnsw (bits bit_hamming_ops)")
store.execute("SET hnsw.ef_search = 200; SET enable_seqscan = off")
found["bits"] = go(f"SELECT id FROM pages ORDER BY {bits} LIMIT 10")
found["bits, rescored"] = go(again)
store.execute("CREATE INDEX ON pages USING hnsw (dense halfvec_cosine_ops)")
found["halfvec, HNSW"] = go("SELECT id FROM pages ORDER BY dense <=> %(q)s LIMIT 10")
"""

LANCEDB = """
import lancedb, pyarrow
from lancedb.index import HnswSq, IvfPq

store = lancedb.connect("lance")
vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(pages.reshape(-1)), 2048)
indexes = {"IVF_PQ": IvfPq(distance_type="cosine", num_partitions=8, num_sub_vectors=128),
           "IVF_HNSW_SQ": HnswSq(distance_type="cosine", num_partitions=8)}
for name, index in indexes.items():
    table = store.create_table(name, pyarrow.table({"id": range(len(pages)), "vector": vectors}))
    table.create_index("vector", config=index)
    for label, factor in {name: None, f"{name}, rescored": 4}.items():
        found[label] = []
        for query in queries:
            search = table.search(query, "vector").distance_type("cosine").nprobes(8).limit(10)
            search = search.refine_factor(factor) if factor else search
            found[label].append(search.select(["id", "_distance"]).to_arrow()["id"].to_pylist())
"""

MILVUS = """
from pymilvus import DataType, MilvusClient

store = MilvusClient("milvus.db")
kinds = {"HNSW_SQ": {"M": 16, "efConstruction": 200, "sq_type": "SQ8"}, "IVF_SQ8": {"nlist": 16}}
for name, params in kinds.items():
    schema = store.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("dense", DataType.FLOAT_VECTOR, dim=2048)
    index = store.prepare_index_params()
    index.add_index("dense", index_type=name, metric_type="COSINE", params=params)
    store.create_collection(name, schema=schema, index_params=index)
    for start in range(0, len(pages), 1000):
        rows = [{"id": start + i, "dense": page} for i, page in enumerate(pages[start : start + 1000])]
        store.insert(name, rows)
    store.flush(name)
    store.load_collection(name)
    hits = store.search(name, list(queries), limit=10, search_params={"params": {"ef": 200, "nprobe": 16}})
    found[name] = [[hit["id"] for hit in near] for near in hits]
"""
PROGRAM = """
import json
import numpy as np
queries, pages, found = np.load("queries.npy"), np.load("pages.npy"), {{}}
{}
with open("found.json", "w") as file:
    json.dump(found, file)
"""

# By store and method, how much of the exact ten best it finds at least.
AT_LEAST = {
    "Qdrant": {"int8": 0.98, "int8, rescored": 0.99, "binary": 0.88, "binary, rescored": 0.99},
    "pgvector": {"halfvec, no index": 0.99, "halfvec, HNSW": 0.98, "bits": 0.75, "bits, rescored": 0.98},
    "LanceDB": {"IVF_PQ": 0.7, "IVF_PQ, rescored": 0.98, "IVF_HNSW_SQ": 0.97, "IVF_HNSW_SQ, rescored": 0.98},
    "Milvus": {"HNSW_SQ": 0.97, "IVF_SQ8": 0.97},
}
PROGRAMS = {"Qdrant": QDRANT, "pgvector": PGVECTOR, "LanceDB": LANCEDB, "Milvus": MILVUS}


@pytest.mark.parametrize("store", PROGRAMS)
def test_a_store_s_quantization_finds_nearly_what_exact_search_finds(
    store: str, tmp_path: Path, figure: Figure, request: pytest.FixtureRequest
) -> None:
    variables = request.getfixturevalue("postgres") if store == "pgvector" else {}
    queries, pages = np.split(make_up(N_PAGES, N_QUERIES).dense, [N_QUERIES])
    np.save(tmp_path / "queries.npy", queries)
    np.save(tmp_path / "pages.npy", pages)
    done = subprocess.run(
        [sys.executable if store == "LanceDB" else PYTHON, "-"],
        input=PROGRAM.format(PROGRAMS[store]),
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    exact = [{hit.index for hit in rank(query, pages, 10)} for query in queries]
    for method, found in json.loads((tmp_path / "found.json").read_text()).items():
        recall = np.mean([len(best & set(hits)) / 10 for best, hits in zip(exact, found, strict=True)])
        figure(f"{method} {recall:.3f}")
        assert recall >= AT_LEAST[store][method], method


def test_the_client_s_own_quantization_finds_most_of_exact_search(figure: Figure) -> None:
    queries, pages = np.split(make_up(N_PAGES, N_QUERIES).dense, [N_QUERIES])
    exact = [{hit.index for hit in rank(query, pages, 10)} for query in queries]
    int8, bits, half = quantize_int8(pages), quantize_binary(pages), pages.astype(np.float16)
    methods = {
        "float16": lambda query: rank(query, half, 10),
        "int8": lambda query: search(query, int8),
        "binary": lambda query: search(query, bits),
        "binary, bits only": lambda query: search(query, bits, bits_only=True),
        "binary, bits only, rescored": lambda query: search(query, bits, bits_only=True, rescore_with=half),
    }
    for method, find in methods.items():
        found = [{hit.index for hit in find(query)} for query in queries]
        recall = np.mean([len(best & hits) / 10 for best, hits in zip(exact, found, strict=True)])
        figure(f"{method} {recall:.3f}")
        assert recall > 0.7, method
