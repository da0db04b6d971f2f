"""llama.cpp with exported GGUF files: its own tokenizer's tokens, and the published model's vectors of texts.

The bindings are built from source, so they are no part of the installation; without them these tests are skipped. What
needs no llama.cpp is tested in tests/merge. The benchmarks' side of it is tested here, too.
"""

import importlib
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN, TASKS, Figure, Golden
from gguf import GGUFReader
from jina_v4_merge.export.gguf import export_gguf
from jina_v4_merge.standin.weights import standin
from near import largest_difference
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from wire import TASK, TEXTS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BOUND = 1e-5  # 1 - cosine; the benchmark's keys and values are float16
BOUND_F32 = 1e-4  # of any element
BOUNDS = {"f16": 1e-5, "bf16": 1e-3, "q8_0": 1e-3}  # 1 - cosine
GGML_TYPE_F32 = 0
HAS_BINDINGS = importlib.util.find_spec("llama_cpp") is not None
NEEDS_BINDINGS = pytest.mark.skipif(not HAS_BINDINGS, reason="pip install llama-cpp-python, ten minutes from source")
SENTENCES = [
    *TEXTS,
    "It's what they'LL say: we've 12345.678 reasons, don't we?",
    "def f(x):\n\n\treturn  x ** 2   # squared\r\n\r\n",
    " leading,  double  and trailing spaces  ",
    "naïve café, Straße, ΑΒΓ, ὕδωρ, Привет-мир, 日本語のテキスト、한국어 텍스트, שלום, नमस्ते",
    "emoji 👩‍👩‍👧 🇩🇪 and ​zero widths",
    "<|im_start|>user <|vision_start|> <|im_end|>",
    "a" * 300,
    "",
]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/, which is a folder of scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@contextmanager
def llama(folder: Path, **options: Any) -> Iterator[Any]:
    """Load the file of an exported folder as users of the bindings do, with float32 keys and values.

    Its matrices are not repacked (`llama-server --no-repack`): ggml's kernels for AMX, which q8_0 is repacked for, end
    the process on virtual machines that announce AMX and cannot do it.
    """
    import llama_cpp

    params = llama_cpp.llama_model_default_params

    def without_repacking() -> Any:
        made = params()
        made.use_extra_bufts = False
        return made

    (path,) = folder.glob("*.gguf")
    settings = {"n_ctx": 2048, "n_batch": 2048, "n_ubatch": 2048, "type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", without_repacking)
        model = llama_cpp.Llama(str(path), embedding=True, verbose=False, **(settings | options))
    with closing(model):
        yield model


def unit(vector: Any) -> Any:
    return np.asarray(vector) / np.linalg.norm(vector, axis=-1, keepdims=True)


@pytest.mark.slow
@NEEDS_BINDINGS
@pytest.mark.parametrize("dtype", ["f32", *BOUNDS])
def test_llama_cpp_with_its_own_tokenizer_gives_the_published_vectors_of_texts(
    dtype: str, golden: Golden, tmp_path: Path, figure: Figure
) -> None:
    differences: list[float] = []
    distances: list[float] = []
    for task in TASKS:
        export_gguf(str(golden.checkpoint), tmp_path / task, task, dtype)
        with llama(tmp_path / task) as model:
            prefixes = {name: model.metadata[f"jina_v4.prompt.{name}"] for name in ("query", "passage")}
            for name, prefix in prefixes.items():
                vectors = unit(model.embed([prefix + text for text in golden.texts]))
                for i, vector in enumerate(vectors):
                    row = golden.rows[f"{task}/{name}/{i}/dense"]
                    differences.append(float(np.abs(vector - row).max()))
                    distances.append(1 - float(vector @ row.astype(np.float64)))
    difference, distance = np.max(differences), np.max(distances)
    figure(f"{dtype}: largest difference {difference:.1e}, largest 1 - cosine {distance:.1e}")
    assert difference <= BOUND_F32 if dtype == "f32" else distance <= BOUNDS[dtype]


@pytest.mark.slow
@NEEDS_BINDINGS
def test_the_rows_of_all_tokens_through_the_projector_are_the_published_multi_vectors(
    golden: Golden, tmp_path: Path, figure: Figure
) -> None:
    from llama_cpp import LLAMA_POOLING_TYPE_NONE

    export_gguf(str(golden.checkpoint), tmp_path / TASK, TASK, "f32")
    projector = load_file(tmp_path / TASK / "multi_vector_projector.safetensors")
    weight, bias = (projector[f"multi_vector_projector.{name}"] for name in ("weight", "bias"))
    vectors = []
    with llama(tmp_path / TASK, pooling_type=LLAMA_POOLING_TYPE_NONE) as model:
        for text in golden.texts:
            rows = np.array(model.embed("Query: " + text))  # (n_tokens, hidden)
            vectors.append(unit(rows @ weight.T + bias))  # (n_tokens, projector dim)
    worst = largest_difference(vectors, [golden.rows[f"{TASK}/query/{i}/multi"] for i in range(len(golden.texts))])
    figure(f"multi-vectors: largest difference {worst:.1e}")
    assert worst <= BOUND_F32


@pytest.mark.slow
@NEEDS_BINDINGS
def test_llama_cpp_cuts_texts_into_the_tokens_of_qwen2(tmp_path: Path) -> None:
    standin(tmp_path / "tiny")
    export_gguf(str(tmp_path / "tiny"), tmp_path / "out", TASK, "q8_0")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tiny" / "tokenizer.json"))
    special = {added.content for added in tokenizer.get_added_tokens_decoder().values()}
    with llama(tmp_path / "out", vocab_only=True) as model:

        def tokens(text: str, special: bool = False) -> list[int]:
            return list(model.tokenize(text.encode(), special=special))

        for sentence in SENTENCES:
            expected = tokenizer.encode("Query: " + sentence, add_special_tokens=False).ids
            assert tokens("Query: " + sentence, special=True) == expected, sentence
            if not any(token in sentence for token in special):
                assert tokens("Query: " + sentence) == expected, sentence  # as `embed` does it
        assert tokenizer.token_to_id("<|im_start|>") not in tokens("<|im_start|>"), "plain text of users"
        decomposed = unicodedata.normalize("NFD", "naïve café")
        assert tokens(decomposed) != tokenizer.encode(decomposed, add_special_tokens=False).ids, "docs say so"


def test_the_benchmark_writes_the_checkpoint_as_the_command_writes_the_base(
    module: Any, folded: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    checkpoint = folded("float32") / f"jina-embeddings-v4-{TASK}"
    assert module("_llama_cpp").write_gguf(checkpoint, tmp_path / "model.gguf") == "float32"
    export_gguf(str(GOLDEN / "checkpoint"), tmp_path / "out", TASK, "f32")
    (path,) = (tmp_path / "out").glob("*.gguf")
    expected = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    found = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_the_side_is_left_out_with_the_reason_where_its_package_is_missing(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = module("_sides")
    assert "llama.cpp" in sides.SIDES
    monkeypatch.setattr(sides, "find_spec", lambda _: None)
    assert "pip install llama-cpp-python" in sides.missing_sides()["llama.cpp"]
    monkeypatch.setattr(sides, "find_spec", lambda name: SimpleNamespace(name=name))
    assert sides.missing_sides() == {}


@NEEDS_BINDINGS
def test_the_benchmark_gives_the_golden_rows_of_texts(
    module: Any, folded: Callable[[str], Path], golden: Golden, figure: Figure
) -> None:
    side = module("_llama_cpp").LlamaCpp(folded("float32") / f"jina-embeddings-v4-{TASK}")
    texts = [*TEXTS, TEXTS[3] * 8, *[TEXTS[0]] * 40]  # one longer than a batch, and more than a batch's sequences
    vectors = side.embed("text", texts, "dense")["dense"]
    rows = [golden.rows[f"{TASK}/query/{i}/dense"] for i in range(len(TEXTS))]
    worst = max(1 - float(a.astype(np.float64) @ b) for a, b in zip(vectors, rows, strict=False))
    figure(f"largest 1 - cosine to the golden rows {worst:.1e}")
    assert worst <= BOUND
    assert all(abs(1 - float(vector @ rows[0])) <= BOUND for vector in vectors[-40:])
    assert (
        len(side.tokenizer.encode("Query: " + TEXTS[3] * 8, add_special_tokens=False).ids)
        > module("_llama_cpp").BATCH_TOKENS
    )
