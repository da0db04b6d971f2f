"""What folding all three tasks costs at full size, beside a plain copy of the same bytes and beside PEFT.

- `fold` is `jina-v4-merge fold` for three tasks. With `--gguf` it is `export-gguf` of one task, in two dtypes, and with
  `--quantize` `fold` of one task: as it is, to int8 and to fp8.
- `copy` reads what was written and writes it once more, each file through to the disk, hard links once: what the bytes
  cost. `copy, pages let go` does so as `fold` writes, keeping the files out of the page cache: what they can cost.
- `PEFT` is its usual way for one task, times three: load the base in bfloat16 with transformers, put the adapter on it,
  `merge_and_unload`, `save_pretrained`, then fsync as the others. It cannot read the published adapter file, so the
  task's tensors are put into a file of their own first, which is not counted; and it leaves out the projector.

Each is a process of its own, after its inputs were dropped from the page cache. The base is a full-size stand-in
(8 GB), made if it is not there; about 36 GB more are used for a while. Wall time is that from start to end of the
process, imports included; memory is the largest sum of the process's own pages (RssAnon + RssShmem: without the page
cache and the libraries' code), asked for every 50 ms, and the peak RSS, which has those; bytes read and written are
those of the disk, by the kernel's count.

    .venv/bin/python benchmarks/merge.py --base checkpoints/standin-full --work /tmp/merge-benchmark
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _about import surroundings

BIN = Path(sys.executable).parent
TASK = "retrieval"
N_TASKS = 3
GGUF_DTYPES = ("f16", "q8_0")
QUANTIZED = ("int8", "fp8")
WINDOW_BYTES = 64 << 20
PACKAGES = ("torch", "safetensors", "transformers", "peft", "jina-v4-merge")


def measure(command: list[str], inputs: Iterable[Path]) -> dict[str, float]:
    """Run a program with its inputs not in the page cache; return what it cost."""
    for path in inputs:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    load, start_s, peak_kib = os.getloadavg()[0], time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    while True:
        peak_kib = max(peak_kib, sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status.read_text()))))
        ended, ending, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(ending)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    return {
        "wall_s": time.monotonic() - start_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "cpu_user_s": usage.ru_utime,
        "cpu_kernel_s": usage.ru_stime,
        "peak_own_memory_mib": peak_kib / 1024,
        "peak_rss_mib": usage.ru_maxrss / 1024,
        "read_gb": usage.ru_inblock * 512 / 1e9,
        "written_gb": usage.ru_oublock * 512 / 1e9,
        "load_before": load,
    }


def files_in(folder: Path) -> list[Path]:
    """Return every file below a folder, one of several hard links only once."""
    found = {path.stat().st_ino: path for path in sorted(folder.rglob("*")) if path.is_file()}
    return sorted(found.values())


def copy(source: Path, target: Path, let_go: bool) -> None:
    """Copy every file once, each through to the disk."""
    target.mkdir()
    for number, path in enumerate(files_in(source)):
        with path.open("rb", buffering=0) as read, (target / str(number)).open("wb", buffering=0) as written:
            n_bytes = 0
            while chunk := read.read(1 << 20):
                written.write(chunk)
                n_bytes += len(chunk)
                if let_go and n_bytes % WINDOW_BYTES == 0:
                    for file in (read, written):
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.fsync(written.fileno())


def split_adapter(base: Path, target: Path) -> None:
    """Write one task's adapter, without the projector, as PEFT reads it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    target.mkdir()
    with safe_open(base / "adapters" / "adapter_model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if f".{TASK}." in name and "_projector" not in name]  # noqa: SIM118 - no dict
        save_file(
            {name.replace(f".{TASK}.", "."): file.get_tensor(name) for name in names},
            target / "adapter_model.safetensors",
        )
    config = json.loads((base / "adapters" / "adapter_config.json").read_text())
    config["target_modules"] = r".*language_model.*\.(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj)"
    config["task_type"] = None
    (target / "adapter_config.json").write_text(json.dumps(config))


def merge_with_peft(base: Path, adapter: Path, target: Path) -> None:
    """Merge one task the usual way."""
    import torch
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def available_gb() -> float:
    """Return how much memory is free or can be freed."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 / 1e9 if found else 0.0


def products(base: Path, out: Path, kind: str) -> dict[str, tuple[int, list[str]]]:
    """Return the ways to be measured: for how many tasks each is, and its command."""
    program = str(BIN / "jina-v4-merge")
    fold = [program, "fold", "--base", str(base), "--out", str(out)]
    if kind == "fold":
        return {"fold": (N_TASKS, fold)}
    if kind == "quantize":
        one = [*fold, "--task", TASK]
        return {"fold": (1, one)} | {f"fold to {to}": (1, [*one, "--quantize", to]) for to in QUANTIZED}
    export = [program, "export-gguf", "--base", str(base), "--task", TASK]
    return {f"GGUF {dtype}": (1, [*export, "--dtype", dtype, str(out)]) for dtype in GGUF_DTYPES}


def compare(base: Path, work: Path, rounds: int, with_peft: bool, kind: str) -> list[dict[str, Any]]:
    """Measure all ways; in each round a product and its copies follow one another."""
    itself = [sys.executable, str(Path(__file__)), "--base", str(base), "--work", str(work), "--part"]
    out, copied, merged = work / "folded", work / "copied", work / "peft"
    results: list[dict[str, Any]] = []

    def note(way: str, n_tasks: int, cost: dict[str, float]) -> None:
        results.append({"way": way, "n_tasks": n_tasks, **cost})
        print(f"{way:>30}: {cost['wall_s']:.1f} s", file=sys.stderr)

    for _ in range(rounds):
        for product, (n_tasks, command) in products(base, out, kind).items():
            note(product, n_tasks, measure(command, files_in(base)))
            of = "" if kind == "fold" else f" of {product}"
            for way, part in ((f"copy{of}", "copy"), (f"copy{of}, pages let go", "copy-let-go")):
                note(way, n_tasks, measure([*itself, part], files_in(out)))
                shutil.rmtree(copied)
            shutil.rmtree(out)
    if with_peft:
        split_adapter(base, work / "adapter")
        note("PEFT", 1, measure([*itself, "peft"], files_in(base)))
        shutil.rmtree(merged)
    return results


def show(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    keys = ("wall_s", "cpu_s", "peak_own_memory_mib", "peak_rss_mib", "read_gb", "written_gb", "load_before")
    heads = ("wall, s", "CPU, s", "own, MiB", "RSS, MiB", "read, GB", "written, GB", "load")
    print(f"{'':>30} {'tasks':>5} " + " ".join(f"{head:>11}" for head in heads))
    for result in results:
        print(f"{result['way']:>30} {result['n_tasks']:>5} " + " ".join(f"{result[key]:11.1f}" for key in keys))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="full-size stand-in; made if it is not there")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for what is written, 36 GB; must not exist yet"
    )
    parser.add_argument("--rounds", type=int, default=1, help="measurements of fold and copies")
    parser.add_argument("--without-peft", action="store_true", help="needs little memory then")
    parser.add_argument("--gguf", action="store_true", help="exports for llama.cpp in place of folds; without PEFT")
    parser.add_argument("--quantize", action="store_true", help="one task as it is, to int8 and to fp8; without PEFT")
    parser.add_argument("--part", choices=("copy", "copy-let-go", "peft"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    base, work = options.base, options.work
    kind = "gguf" if options.gguf else "quantize" if options.quantize else "fold"
    with_peft = kind == "fold" and not options.without_peft
    if options.part == "peft":
        merge_with_peft(base, work / "adapter", work / "peft")
    elif options.part:
        copy(work / "folded", work / "copied", options.part == "copy-let-go")
    if options.part:
        return
    about = surroundings(PACKAGES)
    if not base.exists():
        subprocess.run([BIN / "jina-v4-merge", "standin", base, "--size", "full"], check=True)
    base_gb = sum(path.stat().st_size for path in files_in(base)) / 1e9
    if with_peft and available_gb() < 1.3 * base_gb:
        sys.exit(
            f"PEFT needs {1.3 * base_gb:.0f} GB of memory and {available_gb():.0f} are available; --without-peft does"
        )
    work.mkdir(parents=True)
    try:
        results = compare(base, work, options.rounds, with_peft, kind)
    finally:
        shutil.rmtree(work)
    show(results)
    ways = dict.fromkeys(result["way"] for result in results)
    wall_s = {way: statistics.median(r["wall_s"] for r in results if r["way"] == way) for way in ways}
    for product in [way for way in ways if way.split()[0] in ("fold", "GGUF")]:
        of = "" if kind == "fold" else f" of {product}"
        ratio = wall_s[product] / wall_s[f"copy{of}"]
        memory = max(r["peak_rss_mib"] for r in results if r["way"] == product)
        asked = "" if kind != "fold" else f", asked <= 1.3: {'held' if ratio <= 1.3 else 'NOT held'}"
        print(f"{product} / copy: {ratio:.2f}{asked}")
        print(f"{product} / copy, pages let go: {wall_s[product] / wall_s[f'copy{of}, pages let go']:.2f}")
        print(f"peak RSS of {product}: {memory:.0f} MiB, asked <= 1536: {'held' if memory <= 1536 else 'NOT held'}")
    if "PEFT" in wall_s:
        print(f"PEFT, one task times {N_TASKS} / fold: {N_TASKS * wall_s['PEFT'] / wall_s['fold']:.1f}")
    benchmark = "merge" if kind == "fold" else f"merge-{kind}"
    print(json.dumps({"benchmark": benchmark, **about, "base_gb": base_gb, "results": results}))


if __name__ == "__main__":
    main()
