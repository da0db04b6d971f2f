"""The encoder for mteb without a model: the mapping of tasks, what is sent, what is filed where, and the command."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import mteb
import mteb_tasks
import numpy as np
import pytest
from jina_v4_client import ArgumentError, WrongServerError
from jina_v4_client._model import MAX_LENGTH, TRUNCATE_DIMS
from jina_v4_client.integrations.mteb import JinaV4Encoder
from jina_v4_client.integrations.mteb.cli import app
from jina_v4_client.integrations.mteb.mapping import CROSS_MODAL, RANKED, SYMMETRIC, prompt_name_for, task_for
from jina_v4_client.integrations.mteb.published import PUBLISHED, Published
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.task_metadata import TaskType
from mteb.models.model_implementations.jina_models import JinaV4Wrapper, get_programming_task_override
from mteb.similarity_functions import max_sim
from mteb.types import PromptType
from PIL import Image
from torch.utils.data import DataLoader
from typer.main import get_command
from typer.testing import CliRunner

pytestmark = pytest.mark.proof

OLD, NEW = "94ab5b9a669fa4df-bfloat16-602112", "0123456789abcdef-bfloat16-602112"
OURS = RANKED | CROSS_MODAL | SYMMETRIC
PUBLISHED_META = mteb.get_model_meta("jinaai/jina-embeddings-v4")
TASKS_OF_OURS = [
    task.metadata
    for task in mteb.get_tasks()
    if task.metadata.type in OURS and not {"audio", "video"} & set(task.metadata.modalities)
]
TEXTS = [f"text {i}" for i in range(11)]
PAIRS = [(f"left {i}", f"right {i}") for i in range(12)]
GRADES = [float(i * 5 % 12) for i in range(12)]

Make = Callable[..., JinaV4Encoder]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def make(server: Any) -> Iterator[Make]:
    """Make encoders for a gateway of three tasks; all are closed at the end."""
    server.revisions = {"retrieval": OLD, "text-matching": OLD, "code": NEW}
    server.play_gateway()
    made = []

    def make_one(**options: Any) -> JinaV4Encoder:
        made.append(JinaV4Encoder(server.url, max_retries=0, **options))
        return made[-1]

    yield make_one
    for encoder in made:
        encoder.close()


def encode(
    encoder: JinaV4Encoder, rows: list[dict[str, Any]], prompt_type: PromptType | None = None, **facts: Any
) -> Any:
    """Encode as mteb does: batches of a data loader, in which images stay a list."""

    def collate(batch: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {name: [row[name] for row in batch] for name in batch[0]}

    loader: Any = DataLoader(rows, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    return encoder.encode(
        loader,
        task_metadata=mteb_tasks.metadata(**facts),
        hf_split="test",
        hf_subset="default",
        prompt_type=prompt_type,
        batch_size=4,
    )


def as_rows(texts: list[str]) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts]


def asked(server: Any) -> list[tuple[str, str | None]]:
    """The adapter and prompt of each request."""
    return [(body["task"], body.get("prompt_name")) for body in server.bodies("/v1/embeddings")]


# The mapping


def test_every_type_of_texts_and_images_has_an_adapter() -> None:
    others = {name for name in get_args(TaskType) if name.startswith(("Audio", "Video"))}
    assert set(get_args(TaskType)) - others == OURS
    assert len(OURS) == len(RANKED) + len(CROSS_MODAL) + len(SYMMETRIC)


def test_maxsim_is_allowed_for_exactly_the_tasks_that_mteb_ranks() -> None:
    for task in mteb.get_tasks():
        if task.metadata.type in OURS and not isinstance(task, AbsTaskAggregate):
            assert isinstance(task, AbsTaskRetrieval) == (task.metadata.type in RANKED), task.metadata.name


KNOWN_TASKS = {
    "retrieval": "NanoSCIDOCSRetrieval SciDocsRR JinaVDRMPMQARetrieval VidoreDocVQARetrieval Flickr30kI2TRetrieval "
    "CIFAR10ZeroShot LEMBNarrativeQARetrieval",
    "text-matching": "STS12 STS17 TwitterURLCorpus Tatoeba Banking77Classification ArXivHierarchicalClusteringP2P",
    "code": "CodeSearchNetRetrieval CosQA StackOverflowQA SprintDuplicateQuestions",
}


@pytest.mark.parametrize("adapter", KNOWN_TASKS)
def test_known_tasks_get_their_adapter(adapter: str) -> None:
    for name in KNOWN_TASKS[adapter].split():
        assert task_for(mteb.get_task(name).metadata) == adapter, name


def test_tasks_of_programming_are_those_that_mteb_lists() -> None:
    ours = {metadata.name for metadata in TASKS_OF_OURS if task_for(metadata) == "code"}
    theirs = {metadata.name for metadata in TASKS_OF_OURS if get_programming_task_override(metadata, None) == "code"}
    assert ours == theirs
    assert len(ours) > 50


def test_retrieval_and_similarity_are_embedded_as_by_the_wrapper_of_the_published_figures() -> None:
    wrapper = object.__new__(JinaV4Wrapper)  # without its weights
    wrapper.model_prompts = PUBLISHED_META.loader_kwargs["model_prompts"]
    sides = {
        "Retrieval": (PromptType.query, PromptType.document),
        "DocumentUnderstanding": (PromptType.query,),  # documents are images; where not, theirs gives them "query"
        "STS": (None,),
        "PairClassification": (None,),
    }
    n_compared = 0
    for metadata in TASKS_OF_OURS:
        for side in sides.get(metadata.type, ()):
            adapter, prompt_name, _ = wrapper._resolve_task_parameters(metadata, side)
            assert (task_for(metadata), prompt_name_for(side)) == (adapter, prompt_name), metadata.name
            n_compared += 1
    assert n_compared > 1000


def test_a_task_of_sounds_is_refused() -> None:
    with pytest.raises(ArgumentError, match="of type AudioClustering, which the model is not for; it is for Any2Any"):
        task_for(mteb_tasks.metadata(type="AudioClustering", modalities=["audio"], category="a2a"))


# What is sent


@pytest.mark.parametrize(
    ("facts", "prompt_type", "expected"),
    [
        ({"type": "Retrieval"}, PromptType.query, ("retrieval", "query")),
        ({"type": "Retrieval"}, PromptType.document, ("retrieval", "passage")),
        ({"type": "Reranking"}, PromptType.document, ("retrieval", "passage")),
        ({"type": "STS"}, None, ("text-matching", "query")),
        ({"type": "BitextMining"}, None, ("text-matching", "query")),
        ({"type": "Retrieval", "domains": ["Programming"]}, PromptType.query, ("code", "query")),
        ({"type": "Retrieval", "eval_langs": ["python-Code"]}, PromptType.document, ("code", "passage")),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else None,
)
def test_adapter_and_prompt_go_with_the_request(
    facts: dict[str, Any], prompt_type: PromptType | None, expected: tuple[str, str], make: Make, server: Any
) -> None:
    found = encode(make(), as_rows(TEXTS[:2]), prompt_type, **facts)
    assert asked(server) == [expected]
    prefix = "Passage: " if expected[1] == "passage" else "Query: "
    assert np.array_equal(found, np.stack([server.vector(prefix + text) for text in TEXTS[:2]]))
    assert found.dtype == np.float32


@pytest.mark.parametrize("multivector", [False, True], ids=["dense", "multivector"])
def test_blocks_and_requests_keep_the_order(multivector: bool, make: Make, server: Any) -> None:
    encoder = make(multivector=multivector, batch_size=1, max_concurrency=1)  # blocks of 4 requests
    found = encode(encoder, as_rows(TEXTS), PromptType.query)
    one = server.token_rows if multivector else server.vector
    assert len(found) == len(TEXTS)
    for row, text in zip(found, TEXTS, strict=True):
        assert np.array_equal(row, one("Query: " + text))
    assert [len(body["input"]) for body in server.bodies("/v1/embeddings")] == [1] * len(TEXTS)


def test_a_corpus_of_pages_is_not_read_at_once(make: Make, server: Any) -> None:
    read: list[int] = []

    class Pages:
        dataset = range(12)

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for i in range(12):
                read.append(len(server.bodies("/v1/embeddings")))
                yield {"image": [Image.new("RGB", (30, 30), (i, 0, 0))]}

    encoder = make(image_batch_size=1, max_concurrency=1)
    pages: Any = Pages()
    facts = {"type": "DocumentUnderstanding", "category": "t2i", "modalities": ["text", "image"]}
    encoder.encode(pages, task_metadata=mteb_tasks.metadata(**facts), hf_split="test", hf_subset="default")
    assert read == [0] * 4 + [4] * 4 + [8] * 4


def test_settings_go_with_the_request(make: Make, server: Any) -> None:
    encoder = make(truncate_dim=128, max_length=99, max_pixels=100_000)
    encode(encoder, as_rows(["a"]), PromptType.query)
    encode(encoder, [{"image": Image.new("RGB", (40, 40))}], PromptType.document)
    of_text, of_image = server.bodies("/v1/embeddings")
    assert (of_text["dimensions"], of_text["max_length"]) == (128, 99)
    assert (of_image["dimensions"], of_image["max_pixels"]) == (128, 100_000)


@pytest.mark.parametrize("multivector", [False, True], ids=["dense", "multivector"])
def test_a_text_with_an_image_is_fused_from_the_two(multivector: bool, make: Make, server: Any) -> None:
    images = [Image.new("RGB", (40, 40), (i, 0, 0)) for i in range(6)]
    encoder = make(multivector=multivector, image_batch_size=1, max_concurrency=1)
    rows = [{"text": text, "image": image} for text, image in zip(TEXTS, images, strict=False)]
    found = encode(encoder, rows, PromptType.document)
    alone = [encode(encoder, [{name: row[name]} for row in rows], PromptType.document) for name in ("text", "image")]
    for fused, text, image in zip(found, *alone, strict=True):
        if multivector:
            assert np.array_equal(fused, np.concatenate([text, image]))
        else:
            assert fused == pytest.approx((text + image) / np.linalg.norm(text + image), abs=1e-7)


def test_multivectors_are_refused_where_mteb_cannot_score_them(make: Make, server: Any) -> None:
    with pytest.raises(ArgumentError, match="is of type STS: mteb compares single vectors there"):
        encode(make(multivector=True), as_rows(["a"]), type="STS")
    with pytest.raises(ArgumentError, match="truncate_dim does not go with multivector"):
        make(multivector=True, truncate_dim=128)
    assert server.bodies("/v1/embeddings") == []


def test_a_task_that_the_address_does_not_serve_is_refused(make: Make, server: Any) -> None:
    server.play_ours("retrieval")
    encoder = make()
    assert encoder.revisions == {"retrieval": OLD}
    with pytest.raises(WrongServerError, match="serves the task 'retrieval', and 'text-matching' was asked for"):
        encode(encoder, as_rows(["a"]), type="STS")


# Scores


def test_no_padding_takes_part_in_maxsim(make: Make) -> None:
    encoder = make(multivector=True)
    random = np.random.default_rng(0)
    queries = [row / np.linalg.norm(row) for row in random.standard_normal((3, 1, 128)).astype(np.float32)]
    documents = [-query.repeat(n, axis=0) for query, n in zip(queries, (1, 5, 9), strict=True)]
    expected = [[mteb_tasks.maxsim(query, document) for document in documents] for query in queries]
    assert encoder.similarity(queries, documents).numpy() == pytest.approx(np.array(expected), abs=1e-6)
    assert expected[0][0] == pytest.approx(-1)
    assert max_sim(queries, documents)[0, 0] == 0  # what mteb's own would have said: its padding wins
    pairwise = encoder.similarity_pairwise(queries, documents).numpy()
    assert pairwise == pytest.approx(np.diag(expected), abs=1e-6)


def test_maxsim_takes_one_query_as_mteb_hands_it_back(make: Make) -> None:
    import torch

    encoder = make(multivector=True)
    query, documents = np.eye(2, 128, dtype=np.float32), [np.eye(n, 128, dtype=np.float32) for n in (1, 3)]
    for given in (query, torch.from_numpy(query).unsqueeze(0), [query]):
        assert encoder.similarity(given, documents).tolist() == [[1.0, 2.0]]


def test_the_figure_of_sts_is_that_of_plain_numpy(make: Make, server: Any) -> None:
    result = mteb.evaluate(
        make(), mteb_tasks.sts(PAIRS, GRADES), cache=None, show_progress_bar=False, co2_tracker=False
    )
    left, right = (np.stack([server.vector("Query: " + pair[side]) for pair in PAIRS]) for side in (0, 1))
    expected = mteb_tasks.spearman(left, right, GRADES)
    assert result.task_results[0].get_score() == pytest.approx(expected, abs=1e-5)
    assert set(asked(server)) == {("text-matching", "query")}


# What mteb knows of the model


def test_mteb_and_this_client_agree_about_the_published_model(make: Make) -> None:
    assert PUBLISHED_META.max_tokens == MAX_LENGTH
    assert PUBLISHED_META.embed_dim == TRUNCATE_DIMS[-1]
    assert PUBLISHED_META.n_parameters == 3_934_695_552
    meta = make().mteb_model_meta
    assert set(meta.modalities) == {"text", "image"}
    assert meta.training_datasets == PUBLISHED_META.training_datasets
    assert (meta.name, meta.license) == ("jina-v4-serve/jina-embeddings-v4", None)


def test_each_setting_and_each_model_has_results_of_its_own(make: Make, server: Any, tmp_path: Path) -> None:
    cache = mteb.ResultCache(tmp_path)

    def place(**options: Any) -> Path:
        return cache.get_task_result_path("STS12", make(**options).mteb_model_meta)

    settings: list[dict[str, Any]] = [
        {},
        {"multivector": True},
        {"truncate_dim": 128},
        {"truncate_dim": 256},
        {"max_pixels": 100_000},
        {"max_length": 512},
        {"revision": "named"},
    ]
    places = [place(**options) for options in settings]
    assert places == [place(**options) for options in settings]
    server.revisions["code"] = OLD
    places += [place(**options) for options in settings]
    server.play_ours("retrieval")
    places += [place(**options) for options in settings]
    assert len(set(places)) == len(places)
    assert place(batch_size=3, image_batch_size=2, max_concurrency=1) == place()


def test_results_of_a_server_without_a_revision_are_reused_only_if_it_is_named(make: Make, server: Any) -> None:
    server.revisions = {}
    assert make().mteb_model_meta.revision != make().mteb_model_meta.revision
    assert make(revision="mine").mteb_model_meta.revision == "mine"


# The command


@pytest.fixture
def run(make: Make, server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the command with tasks made on the spot: two of similarity, one whose data cannot be had."""

    class Unreachable(AbsTaskRetrieval):
        metadata = mteb_tasks.metadata(name="Unreachable")

        def load_data(self, *_args: object, **_kwargs: object) -> None:
            raise ConnectionError("no data set\nhere")

    tasks = {name: mteb_tasks.sts(PAIRS, GRADES, name=name) for name in ("First", "Second")}
    tasks["Unreachable"] = Unreachable()
    benchmark = mteb.Benchmark(name="Both", tasks=[tasks["First"], tasks["Second"]])
    unknown = mteb.get_benchmark

    def get_benchmark(name: str) -> Any:
        return benchmark if name == "Both" else unknown(name)

    monkeypatch.setattr(mteb, "get_tasks", lambda: list(tasks.values()))
    monkeypatch.setattr(mteb, "get_task", tasks.__getitem__)
    monkeypatch.setattr(mteb, "get_benchmark", get_benchmark)

    def run_once(*arguments: str) -> tuple[int, str, str]:
        options = ["--base-url", server.url, "--out", str(tmp_path), "--max-retries", "0", "--quiet"]
        result = CliRunner().invoke(app, [*options, *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return run_once


def score_of_first(server: Any) -> float:
    left, right = (np.stack([server.vector("Query: " + pair[side]) for pair in PAIRS]) for side in (0, 1))
    return 100 * mteb_tasks.spearman(left, right, GRADES)


def test_the_command_prints_a_score_a_task_and_the_mean(run: Run, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"Both": Published(dense=71.5, multivector=1.0), "First": Published(multivector=1.0)}
    monkeypatch.setattr("jina_v4_client.integrations.mteb.published.PUBLISHED", figures)
    code, stdout, stderr = run("Both")
    score = f"{score_of_first(server):.2f}"
    assert [line.split() for line in stdout.splitlines()] == [
        ["First", "cosine_spearman", score],
        ["Second", "cosine_spearman", score],
        ["Both", "mean", "of", "2", score, "published", "71.50"],
    ]
    assert code == 0
    assert f"retrieval {OLD}, text-matching {OLD}, code {NEW}" in stderr


def test_a_task_is_run_again_only_for_another_model_or_setting(run: Run, server: Any) -> None:
    def n_requests(*arguments: str) -> int:
        before = len(server.bodies("/v1/embeddings"))
        assert run("First", *arguments)[0] == 0
        return len(server.bodies("/v1/embeddings")) - before

    assert n_requests() == 2
    assert n_requests() == 0
    assert n_requests("--dimensions", "128") == 2
    assert n_requests("--overwrite") == 2
    server.revisions["text-matching"] = NEW
    assert n_requests() == 2
    assert n_requests() == 0


def test_a_task_that_fails_does_not_end_the_run(run: Run) -> None:
    code, stdout, _ = run("Unreachable", "First")
    assert code == 3
    assert "Unreachable" in stdout.splitlines()[0]
    assert stdout.splitlines()[0].endswith("-  ConnectionError: no data set here")
    assert stdout.splitlines()[1].startswith("First")


def test_a_server_that_is_gone_ends_the_run(run: Run, server: Any) -> None:
    server.routes["/v1/embeddings"] = lambda _: server.dropped()
    code, stdout, stderr = run("First", "Second")
    assert (code, stdout) == (1, "")
    assert stderr.endswith("run the same command again to resume\n")


def test_a_command_that_cannot_be_run_says_why(run: Run) -> None:
    for arguments, message in (
        (["Nowhere"], "no task or benchmark 'Nowhere'"),
        (["Both", "--type", "Retrieval"], "Both has no task of type Retrieval; it has STS"),
        (["First", "--multivector", "--dimensions", "128"], "truncate_dim does not go with multivector"),
        (["First", "--api-key-file", "/nowhere/key"], "No such file"),
    ):
        code, stdout, stderr = run(*arguments)
        assert (code, stdout) == (2, "")
        assert message in stderr


def test_without_a_server_the_command_says_how_to_start_one(run: Run) -> None:
    code, _, stderr = run("First", "--base-url", "http://127.0.0.1:9")
    assert code == 1
    assert "no server answers at http://127.0.0.1:9" in stderr
    assert "make serve-retrieval" in stderr


def test_the_docs_name_every_option_and_no_other() -> None:
    document = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    named = {option for row in re.findall(r"^\| (`--.*?) \|", document, re.MULTILINE) for option in row.split(", ")}
    command = get_command(app)
    offered = {f"`{name}`" for option in command.params for name in option.opts if name.startswith("--")}
    assert named == offered - {"`--help`"}


def in_a_fresh_python(statements: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", statements], capture_output=True, text=True)


def test_mteb_is_imported_no_sooner_than_it_is_needed() -> None:
    found = in_a_fresh_python(
        "import sys, jina_v4_client; assert not any('integrations' in name for name in sys.modules);"
        "import jina_v4_client.integrations.mteb.cli; print(*{'mteb', 'torch', 'sklearn'} & set(sys.modules))"
    )
    assert (found.returncode, found.stdout) == (0, "\n"), found.stderr


def test_without_the_extra_the_command_says_what_to_install() -> None:
    found = in_a_fresh_python(
        "import sys; sys.modules['mteb'] = None; sys.argv = ['x', 'STS12'];"
        "from jina_v4_client.integrations.mteb import main; main()"
    )
    assert found.returncode == 2
    assert found.stderr == (
        "error: the evaluation needs mteb here; install it with: pip install 'jina-v4-client[mteb]'\n"
    )


def test_without_the_extra_the_encoder_says_what_to_install() -> None:
    found = in_a_fresh_python(
        "import sys; sys.modules['mteb'] = None; from jina_v4_client.integrations.mteb import JinaV4Encoder"
    )
    assert found.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: the evaluation needs mteb here; install it with: pip install 'jina-v4-client[mteb]'"
    )


def test_each_published_name_is_one_that_mteb_has_and_a_benchmarks_is_the_mean_of_its_tasks() -> None:
    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    for name in PUBLISHED.keys() - known:
        scores = [PUBLISHED[task.metadata.name].multivector for task in mteb.get_benchmark(name).tasks]
        assert PUBLISHED[name].multivector == pytest.approx(np.mean(scores), abs=1e-3)
