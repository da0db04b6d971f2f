"""What a start on a GPU does, on machines that only their nvidia-smi stands for. No GPU computed anything here."""

import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpus import INSTANCE, MACHINES, Machine
from jina_v4_serve.checkpoint import BASE, Checkpoint, read_checkpoint
from jina_v4_serve.doctor.checkpoints import check_gpu_memory
from jina_v4_serve.doctor.machine import check_gpus
from jina_v4_serve.errors import OptionError
from jina_v4_serve.launch import driver, sizing
from jina_v4_serve.launch.arguments import gpu_arguments
from jina_v4_serve.launch.checks import prepare
from jina_v4_serve.launch.gpu import known_gpu
from jina_v4_serve.launch.options import count_of, says_data_parallel, value_of
from jina_v4_serve.launch.server import ServerSettings
from jina_v4_serve.launch.sizing import Step, fit, held_bytes, kv_cache_bytes, needed_bytes, offered_bytes, step_of
from servers import BIN, START_TIMEOUT_S, free_port

ROOT = Path(__file__).parents[2]
UNIFIED_BYTES = 119 * 2**30
UNKNOWN = Machine(("NVIDIA H100 80GB HBM3, 580.95.05, [N/A], [N/A], 9.0, Enabled",), devices=INSTANCE)


@pytest.fixture
def small(folded: Callable[[str], Path]) -> Path:
    return folded("bfloat16") / "jina-embeddings-v4-retrieval"


@pytest.fixture
def published(small: Path) -> Checkpoint:
    """A small checkpoint with the published model's numbers: 3.755 billion parameters, 36 layers of 2 heads of 128."""
    found = read_checkpoint(small, "retrieval")
    return replace(found, weight_bytes=2 * 3_754_885_248, kv_values=2 * 36 * 2 * 128)


@pytest.fixture
def published_int8(published: Checkpoint) -> Checkpoint:
    """The same with its layers' matrices in int8: 36 x 77,070,336 values, and 36 x 28,672 scales of 4 bytes."""
    quantized_bytes = 36 * (77_070_336 + 4 * 28_672)
    plain_bytes = 2 * (3_754_885_248 - 36 * 77_070_336)
    return replace(
        published, quantized="int8", weight_bytes=plain_bytes + quantized_bytes, quantized_bytes=quantized_bytes
    )


def arguments_of(published: Checkpoint, *options: str, n_servers: int = 1) -> dict[str, str]:
    settings = ServerSettings("retrieval", published.folder, vllm_options=options, n_servers=n_servers)
    made = gpu_arguments(settings, published, "bfloat16", {}, known_gpu())
    return dict(each.removeprefix("--").split("=") for each in made)


def row(name: str, published: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the launcher does on a machine, as a row of the table in docs/operations.md."""
    MACHINES[name].use(folder, monkeypatch)
    monkeypatch.setattr(sizing, "read_checkpoint", lambda *_: published)
    monkeypatch.setattr(sizing.cpu, "memory_bytes", lambda: UNIFIED_BYTES)
    gpu = known_gpu()
    assert gpu is not None
    if failure := driver.driver_failure(gpu):
        return f"| {name} | refused: {failure.partition('; ')[2]} | | | | | |"
    said = arguments_of(published)
    step, offered = step_of(known_gpu()), offered_bytes(known_gpu())
    assert (int(said["max-num-batched-tokens"]), int(said["long-prefill-token-threshold"])) == (
        step.tokens,
        step.prompt_tokens,
    )
    cells = (
        name,
        f"{step.tokens:,}",
        f"{step.prompt_tokens:,}",
        f"{int(said['kv-cache-memory-bytes']) / 1e9:.1f} GB",
        said["gpu-memory-utilization"],
        f"{needed_bytes(published, (), 'bfloat16', step) / 1e9:.1f} GB of {offered / 1e9:.1f}",
        "three servers" if fit(Path()).fits else "one base",
    )
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", MACHINES)
def test_the_docs_have_what_the_launcher_does(
    name: str, published: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = row(name, published, tmp_path, monkeypatch)
    assert found in (ROOT / "docs/operations.md").read_text().splitlines(), found


@pytest.mark.parametrize("name", ["L4, 24 GB", "A100, 40 GB", "A100, 80 GB", "H100, MIG 2g.20gb"])
def test_the_docs_have_what_fits_quantized(
    name: str, published_int8: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MACHINES[name].use(tmp_path, monkeypatch)
    monkeypatch.setattr(sizing, "read_checkpoint", lambda *_: published_int8)
    step, offered = step_of(known_gpu()), offered_bytes(known_gpu()) or 0
    one = needed_bytes(published_int8, (), "bfloat16", step)
    n_servers = min(3, offered // one)
    found = f"| {name} | {one / 1e9:.1f} GB | {3 * one / 1e9:.1f} GB | {offered / 1e9:.1f} GB | {n_servers} |"
    assert found in (ROOT / "docs/operations.md").read_text().splitlines(), found
    assert fit(Path()).fits == (n_servers == 3)


def test_the_docs_have_the_weights_and_the_memory_of_int8(published_int8: Checkpoint) -> None:
    weights = {dtype: held_bytes(published_int8, (), dtype) for dtype in ("bfloat16", "float32")}
    on_cpu = {dtype: needed_bytes(published_int8, (), dtype) for dtype in weights}
    text = " ".join((ROOT / "docs/operations.md").read_text().split())
    assert f"weights of {published_int8.weight_bytes / 1e9:.1f} GB" in text
    kv = {dtype: kv_cache_bytes(published_int8, dtype) for dtype in weights}
    assert weights["float32"] - kv["float32"] == 2 * (3_754_885_248 * 2 - 2 * 36 * 77_070_336) + (
        published_int8.quantized_bytes
    )
    assert f"{on_cpu['bfloat16'] / 1e9:.1f} GB of a CPU's memory" in text
    assert f"{on_cpu['float32'] / 1e9:.1f} GB where it computes in float32" in text


def test_the_docs_have_no_other_machine() -> None:
    part = (ROOT / "docs/operations.md").read_text().partition("\n### What a start on a GPU does\n")[2]
    table = part.partition("\n### ")[0].partition("| machine |")[2].partition("\n\n")[0]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]] == list(MACHINES)


def test_the_sums_of_the_docs_are_the_code_s(published: Checkpoint) -> None:
    needed = [needed_bytes(published, (), "bfloat16", Step(tokens, tokens // 2)) / 1e9 for _, tokens in sizing.STEPS]
    large, middle, little = needed
    text = " ".join((ROOT / "docs/operations.md").read_text().split())
    assert f"| {little:.1f} GB at 2,048 tokens a step, {middle:.1f} at 4,096, {large:.1f} at 8,192 |" in text
    three = f"{3 * little:.1f} GB at 2,048, {3 * middle:.1f} at 4,096, {3 * large:.1f} at 8,192"
    assert f"Three servers need {three}" in text
    deploy = " ".join((ROOT / "docs/deploy.md").read_text().split())
    assert f"{3 * large:.1f} GB of a GPU of 70 GB and more, {3 * middle:.1f} GB" in deploy


@pytest.mark.parametrize(
    ("name", "tokens", "share", "fits"),
    [
        ("L4, 24 GB", 2048, 0.415, False),
        ("A10, 24 GB", 2048, 0.415, False),
        ("A100, 40 GB", 4096, 0.235, False),
        ("A100, 80 GB", 8192, 0.12, True),
        ("H100, 80 GB", 8192, 0.12, True),
        ("H200, 141 GB", 8192, 0.068, True),
        ("H100, MIG 2g.20gb", 2048, 0.501, False),
        ("GB10, unified memory", 2048, 0.05, True),
        ("two L4", 2048, 0.415, False),
    ],
)
def test_a_start_is_sized_by_the_gpu(
    name: str,
    tokens: int,
    share: float,
    fits: bool,
    published: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    MACHINES[name].use(tmp_path, monkeypatch)
    monkeypatch.setattr(sizing, "read_checkpoint", lambda *_: published)
    monkeypatch.setattr(sizing.cpu, "memory_bytes", lambda: UNIFIED_BYTES)
    said = arguments_of(published)
    assert int(said["max-num-batched-tokens"]) == tokens
    assert int(said["long-prefill-token-threshold"]) == tokens // 2
    assert float(said["gpu-memory-utilization"]) == pytest.approx(share, abs=0.0011)
    assert int(said["kv-cache-memory-bytes"]) == (2 * 32768 + tokens) * 18432 * 2
    assert fit(tmp_path).fits is fits


def test_prompts_that_are_half_computed_have_room(published: Checkpoint) -> None:
    """vLLM's rule: what is running gets its part first, in order; what waits begins with what a step has left."""
    longest, draw = published.max_model_len, random.Random(0)  # noqa: S311 - lengths of texts
    for step in (Step(2048, 1024), Step(4096, 1024), Step(8192, 3000), Step(2048, 2048)):
        room = kv_cache_bytes(published, "bfloat16", step) // (published.kv_values * 2)
        running: list[list[int]] = []  # computed, length
        for _ in range(3000):
            left = step.tokens
            for prompt in running:
                part = min(prompt[1] - prompt[0], step.prompt_tokens, left)
                prompt[0], left = prompt[0] + part, left - part
            while left > 0:
                length = draw.choice((1, 16, 500, 3000, longest))
                part = min(length, step.prompt_tokens, left)
                running.append([part, length])
                left -= part
            assert sum(computed for computed, _ in running) <= room
            running = [prompt for prompt in running if prompt[0] < prompt[1]]
            assert len(running) <= step.n_begun


def test_three_servers_and_their_restarts_ask_for_what_each_holds_alone(
    published: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside two that are busy, a third that starts again asks for no more than it gave back."""
    MACHINES["H100, 80 GB"].use(tmp_path, monkeypatch)
    alone = arguments_of(published)
    (tmp_path / "gpus").write_text("NVIDIA H100 80GB HBM3, 580.95.05, 81559, 40000, 9.0, Disabled\n")
    again = arguments_of(published, n_servers=3)
    assert again["gpu-memory-utilization"] == alone["gpu-memory-utilization"]
    assert float(again["gpu-memory-utilization"]) * 81559 * 2**20 >= sizing.held_bytes(
        published, (), "bfloat16", Step(8192, 4096)
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--max-num-batched-tokens", "1024"), {"long-prefill-token-threshold": "512"}),
        (("--long_prefill_token_threshold=512",), {"kv-cache-memory-bytes": str((4 * 32768 + 2048) * 36864)}),
        (("--max-model-len=700",), {"long-prefill-token-threshold": "700"}),
        (("--max-model-len=1k",), {"long-prefill-token-threshold": "1000"}),
        (("--max-model-len=auto",), {"long-prefill-token-threshold": None}),
        (("--tensor-parallel-size=2",), {"api-server-count": "4", "gpu-memory-utilization": "0.050"}),
        (("-tp", "2"), {"api-server-count": "4"}),
        (("-q", "fp8"), {"gpu-memory-utilization": "0.050"}),
        (("--cpu_offload_gb=4",), {"gpu-memory-utilization": "0.050"}),
        (("--data-parallel-size=8",), {"api-server-count": None}),
        (("-dp=8",), {"api-server-count": None}),
        (("--headless",), {"api-server-count": None}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_our_settings_follow_the_options_of_the_user(
    options: tuple[str, ...],
    expected: Mapping[str, str | None],
    published: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    MACHINES["L4, 24 GB"].use(tmp_path, monkeypatch)
    monkeypatch.setattr(sizing.cpu, "n_cores", lambda: 16)
    said = arguments_of(published, *options)
    assert {name: said.get(name) for name in expected} == expected


def test_a_gpu_that_cannot_hold_the_model_is_named(
    published: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(("NVIDIA GeForce RTX 3070, 580.95.05, 8192, 8000, 8.6, [N/A]",)).use(tmp_path, monkeypatch)
    with pytest.raises(
        OptionError, match=r"need 9\.3 GiB, NVIDIA GeForce RTX 3070 has 8\.0 GiB: use a larger GPU \(CUDA_VI"
    ):
        arguments_of(published)
    assert arguments_of(published, "--quantization=fp8")["gpu-memory-utilization"] == "0.050"


def test_an_option_is_read_however_it_is_written() -> None:
    options = ("--a-b=1", "--a_b", "2", "--c", "-dpl=2")
    assert value_of(options, "--a-b") == "2"
    assert count_of(options, "--a-b") == 2
    assert (value_of(options, "--c"), value_of(options, "--d")) == ("-dpl=2", None)
    assert says_data_parallel(options)
    assert not says_data_parallel(("--tensor-parallel-size=2", "-pp", "2"))


@pytest.mark.parametrize("value", ["8192", "16k", "16K", "1.5k", "25.6k", "2M", " 4k ", "1g"])
def test_a_count_is_read_as_vllm_reads_it(value: str) -> None:
    from vllm.utils.argparse_utils import human_readable_int  # here: it takes seconds

    assert count_of((f"--a-b={value}",), "--a-b") == human_readable_int(value)


@pytest.mark.parametrize("value", ["auto", "-1", "1.5K", "1.5", "k", ""])
def test_what_is_no_count_is_left_to_vllm(value: str) -> None:
    assert count_of((f"--a-b={value}",), "--a-b") is None


def test_tokens_a_step_in_thousands_are_sized_as_such() -> None:
    assert step_of(None, ("--max-num-batched-tokens=16k",)) == Step(16_000, 8_000)


def test_in_containers_servers_know_how_many_they_are(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MACHINES["H100, 80 GB"].use(tmp_path, monkeypatch)
    monkeypatch.setattr(sizing.cpu, "n_cores", lambda: 16)
    settings = ServerSettings("retrieval", small, port=free_port())
    assert "--api-server-count=4" in prepare(settings).arguments
    monkeypatch.setenv("JINA_V4_SERVERS_ON_MACHINE", "3")
    assert "--api-server-count=1" in prepare(settings).arguments


@pytest.mark.parametrize("broken", ["[N/A]", "fails", "is not there"])
def test_a_server_starts_where_nothing_tells_the_memory(
    broken: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    UNKNOWN.use(tmp_path, monkeypatch)
    if broken == "fails":
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'Failed to initialize NVML'\nexit 18\n")
    elif broken != "[N/A]":
        (tmp_path / "nvidia-smi").unlink()
    for options in ((), ("--gpu-memory-utilization=0.3",)):
        launch = prepare(ServerSettings("retrieval", small, port=free_port(), vllm_options=options))
        assert {"--max-num-batched-tokens=2048", "--gpu-memory-utilization=0.050"} <= set(launch.arguments)
        assert launch.options == options
        name = "the GPU is NVIDIA H100 80GB HBM3" if broken == "[N/A]" else "the GPU is unknown to nvidia-smi"
        assert f"\n{name}: each step computes up to 2,048 tokens" in launch.banner
    found = fit(small.parent)
    assert not found.fits
    assert found.line.endswith("and the memory of the GPU is unknown: they may not fit")


def test_the_instance_that_is_named_is_the_one_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = MACHINES["H100, MIG 2g.20gb"]
    listing = machine.listing + "  MIG 1c.3g.40gb  Device  1: (UUID: MIG-other)\n"
    whole = ("NVIDIA H100 80GB HBM3, 580.95.05, 81559, 81000, 9.0, Enabled",)
    for devices, expected in ((INSTANCE, 20), ("MIG-other", 40), ("MIG-gone", None), ("", 20)):
        Machine(whole, listing, devices).use(tmp_path, monkeypatch)
        found = known_gpu()
        assert found is not None
        assert found.total_bytes == (expected and expected * 10**9)
        assert not found.shares_memory


@pytest.mark.parametrize(
    ("machine", "words", "verdicts"),
    [
        (MACHINES["GB10, unified memory"], "uses the machine's memory", ("ok", "ok")),
        (
            MACHINES["H100, MIG 2g.20gb"],
            "NVIDIA H100 80GB HBM3 MIG 2g.20gb, driver 580.95.05, 18.6 GiB",
            ("ok", "FAIL"),
        ),
        (UNKNOWN, "memory unknown", ("warn", "warn")),
        (MACHINES["L4, 24 GB"], "22.0 GiB free of 22.5 GiB", ("ok", "FAIL")),
    ],
    ids=["unified", "MIG", "unknown", "L4"],
)
def test_the_doctor_takes_the_same_sums(
    machine: Machine,
    words: str,
    verdicts: tuple[str, str],
    published: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine.use(tmp_path, monkeypatch)
    monkeypatch.setattr(sizing.cpu, "memory_bytes", lambda: UNIFIED_BYTES)
    gpu = known_gpu()
    assert gpu is not None
    (finding,) = check_gpus([gpu])
    assert words in finding.found
    assert finding.verdict == "ok"
    found = [check_gpu_memory([published] * n_servers, "auto", [gpu]) for n_servers in (1, 3)]
    assert tuple(each.verdict for each in found) == verdicts


@pytest.mark.parametrize(("machine", "code"), [("H100, 80 GB", 0), ("H100, MIG 2g.20gb", 1)])
def test_the_fits_command_answers_make_serve(machine: str, code: int, small: Path, tmp_path: Path) -> None:
    """The real command; 1 has `make serve` take one base, and where nothing tells it is 1 too."""
    variables = MACHINES[machine].install(tmp_path)
    if code:
        (tmp_path / "listing").write_text("")
    done = run([BIN / "jina-v4-serve", "fits", "--checkpoints", small.parent], variables)
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.startswith("3 servers need ")


# The driver


def run(command: list[str | Path], variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    path = ":".join(each for each in (variables["PYTHONPATH"], os.environ.get("PYTHONPATH")) if each)
    environment = {**os.environ, **variables, "PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_TIMEOUT_S)


def test_a_driver_that_is_too_old_is_named_before_anything_starts(small: Path, tmp_path: Path) -> None:
    variables = MACHINES["H100, driver 550"].install(tmp_path)
    start = [BIN / "jina-v4-serve", "retrieval", "--checkpoint", small, "--port", str(free_port())]
    done = run(start, variables)
    words = "the GPU's driver is 550.163.01; torch is built for CUDA 13, which needs 580 or newer: "
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {words}")
    assert "Traceback" not in done.stderr
    done = run([BIN / "jina-v4-serve", "all", "--checkpoints", small.parent, "--port", str(free_port())], variables)
    assert (done.returncode, words in done.stderr) == (1, True)
    done = run([BIN / "jina-v4-serve", "doctor", "--json"], variables)
    assert (done.returncode, words.removesuffix(": ") in done.stdout) == (1, True)


def test_make_install_names_an_old_driver_and_continues(tmp_path: Path) -> None:
    """Without any of our distributions, as before an installation."""
    variables = MACHINES["H100, driver 550"].install(tmp_path)
    (line,) = [each for each in (ROOT / "Makefile").read_text().splitlines() if "launch.driver" in each]
    module = line.partition("-m ")[2].partition(";")[0]
    environment = {**variables, "PYTHONPATH": str(ROOT / "serve/src")}
    program = f"import runpy, sys; sys.flags.no_site or sys.exit(9); runpy.run_module('{module}', run_name='__main__')"
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: the GPU's driver is 550.163.01; torch is built for CUDA 13, which needs")
    assert "cuda-toolkit==13." in (ROOT / "requirements/gpu.txt").read_text()


@pytest.mark.parametrize(
    ("torch", "compatible", "fails"),
    [
        ("2.13.0", "", True),
        ("2.13.0+cu130", "0", True),
        ("2.13.0", "1", False),
        ("2.13.0+cu129", "", False),
        ("2.13.0+cpu", "", True),
    ],
)
def test_the_driver_that_is_needed_follows_torchs_cuda(
    torch: str, compatible: str, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MACHINES["H100, driver 550"].use(tmp_path, monkeypatch)
    monkeypatch.setattr(driver.metadata, "version", lambda _: torch)
    monkeypatch.setenv(driver.COMPATIBLE, compatible)
    if fails:
        with pytest.raises(OptionError, match="needs 580 or newer"):
            driver.check_driver(known_gpu())
    else:
        driver.check_driver(known_gpu())


@pytest.mark.long
def test_vllm_takes_all_that_is_passed(small: Path, tmp_path: Path) -> None:
    """The installed vLLM's own parser, in a process of its own: its imports are not ours to mend."""
    variables = MACHINES["H100, 80 GB"].install(tmp_path)
    program = """
        from jina_v4_serve.launch.checks import prepare
        from jina_v4_serve.launch.server import ServerSettings
        from pathlib import Path
        import sys
        launch = prepare(ServerSettings("retrieval", Path(sys.argv[1]), port=int(sys.argv[2])))
        sys.path.remove(sys.argv[3])  # the CPU build is the one that can be imported
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from jina_v4_serve.vllm_side.versions import moved
        parsed = moved("make_arg_parser")(FlexibleArgumentParser()).parse_args(list(launch.arguments))
        print(parsed.max_num_batched_tokens, parsed.long_prefill_token_threshold, parsed.gpu_memory_utilization)
    """
    done = run([BIN / "python", "-c", textwrap.dedent(program), small, str(free_port()), str(tmp_path)], variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:-1] == ["8192", "4096"]


def test_one_base_counts_its_adapters(published: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MACHINES["L4, 24 GB"].use(tmp_path, monkeypatch)
    settings = ServerSettings(BASE, published.folder)
    adapters = {task: SimpleNamespace(weight_bytes=10**9) for task in ("a", "b", "c")}
    with_them, without = (
        float(argument.partition("=")[2])
        for each in (adapters, {})
        for argument in gpu_arguments(settings, published, "bfloat16", each, known_gpu())
        if argument.startswith("--gpu-memory-utilization")
    )
    assert with_them - without == pytest.approx(3e9 / (23034 * 2**20), abs=0.001)
