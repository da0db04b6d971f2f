"""What the launcher refuses before vLLM is imported, through the real command."""

import json
import platform
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from conftest import TASKS
from jina_v4_serve.checkpoint import read_checkpoint
from jina_v4_serve.doctor.checkpoints import check_dtype
from jina_v4_serve.errors import OptionError
from jina_v4_serve.facts import PORTS
from jina_v4_serve.launch import cpu
from jina_v4_serve.launch.arguments import FIXED, api_processes, check_options
from jina_v4_serve.launch.checks import banner, check_int8, environment, prepare
from jina_v4_serve.launch.options import says_parallel
from jina_v4_serve.launch.revision import precision, revision
from jina_v4_serve.launch.server import ServerSettings
from jina_v4_serve.launch.sizing import held_bytes, kv_cache_bytes
from jina_v4_serve.launch.variables import FIXED_VARIABLES, check_variables
from servers import BIN, PATIENCE_S, free_port

pytestmark = pytest.mark.long


@pytest.fixture
def checkpoint(folded: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a whole retrieval checkpoint, to be damaged."""
    return shutil.copytree(folded("float32") / "jina-embeddings-v4-retrieval", tmp_path / "checkpoint")


def serve(*arguments: str | Path) -> tuple[int, str]:
    """Run `jina-v4-serve`; return its exit code and its last line on stderr."""
    command = [BIN / "jina-v4-serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip()


def test_a_whole_checkpoint_is_read(checkpoint: Path) -> None:
    found = read_checkpoint(checkpoint, "retrieval")
    assert (found.task, found.dtype, found.max_positions) == ("retrieval", "float32", 32768)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    code, message = serve("retrieval", "--checkpoint", tmp_path / "nowhere")
    assert code == 1
    assert message.startswith(f"error: no such folder: {tmp_path / 'nowhere'}.")


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    code, message = serve("retrieval", "--checkpoint", tmp_path)
    assert code == 1
    assert "has no manifest.json" in message


def test_a_checkpoint_of_another_task_is_refused(checkpoint: Path) -> None:
    code, message = serve("code", "--checkpoint", checkpoint)
    assert (code, message) == (1, f"error: {checkpoint} is the checkpoint of task retrieval, not of code")


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_half_a_checkpoint_is_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    code, message = serve("retrieval", "--checkpoint", checkpoint)
    assert code == 1
    assert f"is incomplete: {name} is missing" in message


def test_a_full_disk_behind_standard_output_hinders_no_start(checkpoint: Path) -> None:
    command = [BIN / "jina-v4-serve", "retrieval", "--checkpoint", checkpoint, "--port", str(free_port())]
    with Path("/dev/full").open("w") as full:  # --supervised: it ends at once, with its standard input
        done = subprocess.run(
            [*command, "--supervised"], stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert "starting vLLM" in done.stderr
    assert "No space left on device" not in done.stderr


def test_a_truncated_file_is_refused(checkpoint: Path) -> None:
    shard = checkpoint / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, message = serve("retrieval", "--checkpoint", checkpoint)
    assert code == 1
    assert f"{shard} has {shard.stat().st_size} bytes, the manifest says {shard.stat().st_size + 1}" in message


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"task": "retrieval", "dtype": "float32", "files": []}'])
def test_a_broken_manifest_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "manifest.json").write_text(content)
    code, message = serve("retrieval", "--checkpoint", checkpoint)
    assert code == 1
    assert "manifest.json" in message


def test_a_port_in_use_is_named(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, message = serve("retrieval", "--checkpoint", checkpoint, "--port", str(port))
    assert code == 1
    assert message.startswith(f"error: cannot listen on 127.0.0.1:{port}:")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["--dtype", "int8"], "dtype=int8 is not offered", id="dtype"),
        pytest.param(["--max-pixels", "100"], "--max-pixels=100 is not offered; choose 3136 to", id="small images"),
        pytest.param(["--max-pixels", "99999999"], "--max-pixels=99999999 is not offered", id="huge images"),
        pytest.param(["--host", "256.0.0.1"], "cannot listen on 256.0.0.1", id="host"),
        pytest.param(["--port", "99999"], "cannot listen on 127.0.0.1:99999", id="port"),
    ],
)
def test_an_option_out_of_range_is_named(checkpoint: Path, arguments: list[str], expected: str) -> None:
    code, message = serve("retrieval", "--checkpoint", checkpoint, *arguments)
    assert code == 1
    assert expected in message


def test_a_folder_that_is_too_long_for_sockets_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / ("x" * 71)).mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    code, message = serve("retrieval", "--checkpoint", checkpoint, "--port", str(free_port()))
    assert code == 1
    assert message.startswith(f"error: {folder} is too long for the path of a socket: ")


def test_an_unknown_task_is_refused(checkpoint: Path) -> None:
    code, message = serve("clustering", "--checkpoint", checkpoint)
    assert code == 2
    assert "'clustering' is not one of" in message


CHANGING_VECTORS = [
    ["--enable-prefix-caching"],
    ["--hf_overrides", "{}"],
    ["--runner=generate"],
    ["--dtype=float16"],
    ["--trust-remote-code"],
    ["--middleware=some.other.One"],
    ['--kv-transfer-config={"kv_connector":"ExampleConnector","kv_role":"kv_both"}'],
    ["--kv-offloading-size=1"],
]
UNREADABLE = [["--max-num-batched-token=512"], ["--enable-prefix-cach"]]  # argparse would complete these
# In one process, because vLLM is imported for 8 s.
READ_ALL = """
    import json, sys
    from jina_v4_serve.errors import OptionError
    from jina_v4_serve.vllm_side.worker import read_options

    arguments, *cases = json.loads(sys.argv[1])
    for options in cases:
        try:
            print(json.dumps(vars(read_options(arguments, options))["max_num_seqs"]))
        except (OptionError, SystemExit) as error:
            print(json.dumps(str(error)))
"""


def test_options_of_vllm_that_would_change_the_vectors_are_refused(checkpoint: Path) -> None:
    launch = prepare(ServerSettings("retrieval", checkpoint, port=free_port()))
    cases = json.dumps([launch.arguments, *UNREADABLE, *CHANGING_VECTORS, ["--max-num-seqs=7"]])
    command = [sys.executable, "-c", textwrap.dedent(READ_ALL), cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    n_cases = len(UNREADABLE) + len(CHANGING_VECTORS) + 1
    *refusals, allowed = map(json.loads, done.stdout.splitlines()[-n_cases:])
    unreadable, refusals = refusals[: len(UNREADABLE)], refusals[len(UNREADABLE) :]
    assert unreadable == ["2"] * len(UNREADABLE)
    assert all(f"error: unrecognized arguments: {option}\n" in done.stderr for (option,) in UNREADABLE)
    assert all("cannot be changed: " in refusal for refusal in refusals), refusals
    assert allowed == 7


def test_the_command_refuses_an_option_of_vllm_that_would_change_the_vectors(checkpoint: Path) -> None:
    port = str(free_port())
    code, message = serve("retrieval", "--checkpoint", checkpoint, "--port", port, "--", "--enable-prefix-caching")
    assert code == 1
    assert "error: --enable-prefix-caching cannot be changed: " in message.splitlines()[-1]


@pytest.mark.parametrize("option", ["--config", "--config=c.yaml"])
def test_a_file_of_options_is_refused(option: str, checkpoint: Path) -> None:
    with pytest.raises(OptionError, match=r"^--config is not offered: write the options of the file after the --$"):
        prepare(ServerSettings("retrieval", checkpoint, port=free_port(), vllm_options=(option,)))


@pytest.mark.parametrize("options", [["-t", "2"], ["-tp=2"], ["-dcp", "2"], ["--tensor_parallel_size=2"]], ids=str)
def test_options_that_spread_a_server_are_known(options: list[str]) -> None:
    assert says_parallel(options)
    assert not says_parallel(["--max-num-seqs=2", "-q", "fp8"])


@pytest.mark.parametrize("name", FIXED_VARIABLES)
def test_a_variable_that_would_change_the_vectors_is_refused(name: str) -> None:
    harmless, effect = FIXED_VARIABLES[name]
    for value in ("", harmless, harmless.upper()):
        check_variables({name: value})
    with pytest.raises(OptionError, match=rf"^{name}=medium cannot be served: {effect}\. Unset it$"):
        check_variables({name: "medium"})


def test_the_command_refuses_a_variable_that_would_change_the_vectors(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_FLOAT32_MATMUL_PRECISION", "high")
    code, message = serve("retrieval", "--checkpoint", checkpoint, "--port", str(free_port()))
    assert code == 1
    assert message.startswith("error: VLLM_FLOAT32_MATMUL_PRECISION=high cannot be served: ")


def test_refused_variables_are_some_that_vllm_reads() -> None:
    """A name that nobody reads would guard nothing; two are oneDNN's."""
    from vllm import envs

    unknown = {name for name in FIXED_VARIABLES if name not in envs.environment_variables}
    assert unknown == {"ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"}


def test_random_weights_are_not_served_in_the_place_of_a_checkpoint() -> None:
    with pytest.raises(OptionError, match="--load-format=dummy cannot be served: the weights would be random"):
        check_options({"load_format": "auto"}, {"load_format": "dummy"})
    check_options({"load_format": "auto"}, {"load_format": "safetensors"})


def test_what_is_fixed_are_options_that_some_vllm_has() -> None:
    """A name that no vLLM knows would guard nothing: these are of 0.26.0 to 0.33.0 and not of the installed one."""
    from vllm.engine.arg_utils import EngineArgs

    served = {"model_tag", "host", "port", "uds", "middleware", "chat_template", "trust_request_chat_template"}
    served |= {"chat_template_content_format", "allowed_methods", "allowed_headers", "allow_credentials"}
    served |= {"lora_modules"}
    known = {field.name for field in fields(EngineArgs)} | served
    assert FIXED.keys() - known == {"calculate_kv_scales", "override_attention_dtype"}


def test_vllms_allowed_origins_are_read_as_ours_are(checkpoint: Path) -> None:
    options = ("--port", str(free_port()), "--", '--allowed-origins=["https://app.example/"]')
    code, message = serve("retrieval", "--checkpoint", checkpoint, *options)
    assert code == 1
    assert "JINA_V4_ALLOWED_ORIGINS: https://app.example/ is not an origin" in message.splitlines()[-1]


def test_other_options_of_vllm_win_over_ours() -> None:
    check_options({"runner": "pooling", "max_num_seqs": 8}, {"runner": "pooling", "max_num_seqs": 16})
    with pytest.raises(OptionError, match="--runner cannot be changed: the server pools"):
        check_options({"runner": "pooling"}, {"runner": "generate"})


def test_vllm_reports_nothing_and_keeps_the_plugins_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "theirs")
    variables = environment(["code"])
    assert variables["VLLM_PLUGINS"] == "theirs,jina_v4"
    assert (variables["VLLM_NO_USAGE_STATS"], variables["DO_NOT_TRACK"]) == ("1", "1")


def test_gpus_are_counted_as_nvidia_smi_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert environment(["code"])["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert environment(["code"])["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


def test_an_idle_connection_is_kept_for_75_s_unless_the_user_has_another_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, expected in ((None, "75"), ("", "75"), ("20", "20")):
        monkeypatch.delenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", raising=False)
        if said is not None:
            monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", said)
        assert environment(["code"])["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == expected


@pytest.mark.parametrize(("dtype", "n_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_keys_and_values_of_the_two_longest_prompts_have_room(
    dtype: str, n_bytes: int, folded: Callable[[str], Path]
) -> None:
    checkpoint = read_checkpoint(folded("float32") / "jina-embeddings-v4-code", "code")
    n_layers, n_heads, head_dim = 3, 1, 128
    assert kv_cache_bytes(checkpoint, dtype) == 2 * 32768 * n_layers * n_heads * 2 * head_dim * n_bytes


@pytest.mark.parametrize(
    ("n_cores", "n_servers", "expected"), [(2, 1, 1), (8, 1, 2), (16, 1, 4), (64, 1, 4), (16, 3, 1), (64, 3, 4)]
)
def test_a_gpu_has_api_processes_by_the_cores_beside_it(n_cores: int, n_servers: int, expected: int) -> None:
    assert api_processes(n_cores, n_servers) == expected


def test_a_revision_is_of_the_files_and_of_what_they_are_served_with(folded: Callable[[str], Path]) -> None:
    checkpoint = read_checkpoint(folded("float32") / "jina-embeddings-v4-code", "code")
    assert revision(checkpoint, "float32", None) == f"{checkpoint.digest[:16]}-float32-602112"
    assert revision(checkpoint, "bfloat16", 1_000_000) == f"{checkpoint.digest[:16]}-bfloat16-1000000"


@pytest.mark.parametrize(
    ("quantization", "kv_cache_dtype", "vision", "expected"),
    [
        (None, "auto", None, "bfloat16"),
        (None, "bfloat16", None, "bfloat16"),
        ("fp8", "auto", None, "bfloat16+fp8"),
        (None, "fp8", None, "bfloat16+kv_fp8"),
        (None, "float16", None, "bfloat16+kv_float16"),
        (None, "bfloat16", None, "bfloat16"),
        (None, "auto", "fp8", "bfloat16+vision_fp8"),
        ("fp8", "fp8_e4m3", "fp8", "bfloat16+fp8+kv_fp8_e4m3+vision_fp8"),
    ],
)
def test_a_revision_tells_what_is_quantized(
    quantization: str | None, kv_cache_dtype: str, vision: str | None, expected: str
) -> None:
    merged = {"dtype": "bfloat16", "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    assert precision({**merged, "mm_encoder_attn_dtype": vision}) == expected


@pytest.mark.parametrize("quantization", [None, "compressed-tensors"], ids=["by the checkpoint", "by the option too"])
def test_a_revision_tells_what_a_checkpoint_s_matrices_are(quantization: str | None) -> None:
    merged = {"dtype": "float32", "quantization": quantization, "kv_cache_dtype": "fp8"}
    assert precision(merged, "int8") == "float32+int8+kv_fp8"


@pytest.mark.parametrize(
    ("kind", "on_cpu", "warned"), [("fp8", True, True), ("int8", True, False), ("fp8", False, False)]
)
def test_a_start_says_what_is_quantized_and_that_fp8_is_slow_on_a_cpu(
    kind: str, on_cpu: bool, warned: bool, folded: Callable[[str], Path]
) -> None:
    plain = read_checkpoint(folded("bfloat16") / "jina-embeddings-v4-code", "code")
    settings = ServerSettings("code", plain.folder, dtype="float16")
    said = banner(settings, replace(plain, quantized=kind), on_cpu, None)
    assert f"task code, float16+{kind}, from " in said
    assert ("fp8 is slow on a CPU" in said) == warned


@pytest.mark.parametrize(
    ("host", "options", "address"),
    [
        ("::1", (), "http://[::1]:8003"),
        ("0.0.0.0", (), "http://127.0.0.1:8003"),  # noqa: S104 - nothing listens
        ("127.0.0.1", ("--ssl-certfile=c.pem",), "https://127.0.0.1:8003"),
    ],
)
def test_a_start_shows_an_address_that_can_be_opened(
    host: str, options: tuple[str, ...], address: str, folded: Callable[[str], Path]
) -> None:
    plain = read_checkpoint(folded("bfloat16") / "jina-embeddings-v4-code", "code")
    settings = ServerSettings("code", plain.folder, host, 8003, vllm_options=options)
    assert f"it will answer on {address}/v1 " in banner(settings, plain, True, None)


@pytest.mark.parametrize(
    ("flags", "exact"),
    [
        ("avx2 avx512f", False),
        ("avx2", False),
        ("avx2 avx_vnni", True),
        ("avx512f avx512_vnni", True),
        ("avx512f avx512_vnni amx_int8", True),
    ],
)
def test_int8_is_served_where_its_products_are_exact(
    flags: str, exact: bool, folded: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "_CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags} lm\n")
    plain = read_checkpoint(folded("bfloat16") / "jina-embeddings-v4-code", "code")
    quantized = replace(plain, quantized="int8")
    with nullcontext() if exact else pytest.raises(OptionError, match="no VNNI: int8 products overflow"):
        check_int8(quantized, True, "bfloat16")
    assert check_dtype([plain, quantized], "auto", True, []).verdict == ("ok" if exact else "FAIL")
    for served in (plain, replace(plain, quantized="fp8")):
        check_int8(served, True, "bfloat16")
    check_int8(quantized, False, "bfloat16")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    check_int8(quantized, True, "bfloat16")


def test_int8_is_not_computed_in_float32_with_amx(
    folded: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags\t\t: avx512f avx512_vnni amx_bf16 amx_int8 amx_tile lm\n")
    plain = read_checkpoint(folded("bfloat16") / "jina-embeddings-v4-code", "code")
    quantized = replace(plain, quantized="int8")
    with pytest.raises(OptionError, match="does not compute int8 in float32: add --dtype bfloat16"):
        check_int8(quantized, True, "float32")
    assert check_dtype([quantized], "float32", True, []).verdict == "FAIL"
    assert check_dtype([quantized], "auto", True, []).verdict == "ok"
    check_int8(quantized, True, "bfloat16")
    check_int8(plain, True, "float32")
    check_int8(quantized, False, "float32")


def test_a_server_that_others_reach_without_a_key_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, words = read_checkpoint(checkpoint, "retrieval"), "no key is set: everyone who can reach 0.0.0.0 may use it"
    settings = ServerSettings("retrieval", checkpoint, host="0.0.0.0")  # noqa: S104 - not bound
    monkeypatch.setenv("JINA_V4_API_KEY", "")  # as Compose's ${KEY:-} sets it
    assert words in banner(settings, read, True, None)
    assert "no key is set" not in banner(ServerSettings("retrieval", checkpoint), read, True, None)
    monkeypatch.setenv("JINA_V4_API_KEY", "a key")
    assert "no key is set" not in banner(settings, read, True, None)


def test_a_server_takes_its_weights_and_its_keys_and_values(folded: Callable[[str], Path]) -> None:
    checkpoint = read_checkpoint(folded("bfloat16") / "jina-embeddings-v4-code", "code")
    assert held_bytes(checkpoint, (), "bfloat16") == checkpoint.weight_bytes + kv_cache_bytes(checkpoint, "bfloat16")
    assert held_bytes(checkpoint, (), "float32") == 2 * held_bytes(checkpoint, (), "bfloat16")


def test_each_task_has_a_port_and_the_plugin_is_registered_once() -> None:
    assert tuple(PORTS) == TASKS
    assert [point.value for point in entry_points(group="vllm.general_plugins") if point.name == "jina_v4"] == [
        "jina_v4_serve.vllm_side.plugin:register"
    ]


def test_the_package_itself_imports_nothing_heavy() -> None:
    program = "import sys, jina_v4_serve.cli; print(json.dumps([m for m in ('torch', 'vllm') if m in sys.modules]))"
    done = subprocess.run([BIN / "python", "-c", f"import json; {program}"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
