"""The learner on one GPU: is it right, how fast is it, what is it worth to share prompts?

    python3 benchmarks/gpu.py [--parts golden speed ...] [--budget-s 480] [--out FOLDER]
    python3 benchmarks/gpu.py --device cpu --tiny      # try the script itself, without a GPU

For a machine that has torch, transformers, triton and what DeepSpeed needs, but neither Ray nor
vLLM. The parts (gpu_parts.py says what each does) run one after another, each in a process of its
own with a time limit; results.json is written after every part. A part that fails or runs out of
time is a line with its error, one that no longer fits into the budget is a line that says so, and
the others run all the same. A table is printed last. Models have random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# By worth, with the seconds that each may take, and those without which it is not begun.
PARTS = {
    "golden": (150, 40),
    "speed": (130, 30),
    "sharing": (120, 30),
    "step": (75, 30),
    "seven": (80, 35),
    "float8": (90, 30),
    "ipc": (50, 20),
}


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on; runs in a child: a parent that forks must not use CUDA."""
    import deepspeed
    import torch
    import transformers
    import triton

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "deepspeed": deepspeed.__version__,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_memory_gib": f"{properties.total_memory / 2**30:.1f}",
            "cuda": str(torch.version.cuda),
        }
    return found


def child(part: str, options: argparse.Namespace, found: dict[str, Any], rows: Path) -> None:
    """One part, in a process and a session of its own; every row is written as it comes."""
    os.setsid()
    with (options.out / "gpu.log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    print(f"\n==== {part}", flush=True)
    with rows.open("a", encoding="utf-8") as file:

        def emit(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(row, flush=True)

        try:
            if part == "machine":
                emit(machine(options.device))
                return
            import gpu_parts

            given = gpu_parts.Given(options.device, options.tiny, found.get("dynamic", True))
            for row in gpu_parts.PARTS[part](given):
                emit(row)
        except BaseException as error:  # noqa: BLE001 - said, and the next part goes on
            traceback.print_exc()
            emit({"what": "the part", "error": f"{type(error).__name__}: {error}"[:300]})
            sys.exit(1)


def run_part(
    part: str, options: argparse.Namespace, found: dict[str, Any], limit_s: float
) -> dict[str, Any]:
    """The rows of a part and how it ended."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows"
        rows.touch()
        # This process never imports torch: a fork could not use a driver that was started here.
        process = multiprocessing.get_context("fork").Process(
            target=child, args=(part, options, found, rows)
        )
        process.start()
        process.join(limit_s)
        ended = process.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join(10)
        lines = rows.read_text(encoding="utf-8").splitlines()
    if ended is None:
        status = f"out of time after {limit_s:.0f} s"
    else:
        status = "done" if ended == 0 else f"failed (exit status {ended}); see gpu.log"
    return {
        "part": part,
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "rows": [json.loads(line) for line in lines],
    }


def table(results: list[dict[str, Any]]) -> str:
    """A table for each part."""
    lines = []
    for result in results:
        lines += ["", f"## {result['part']}: {result['status']}, {result['seconds']} s", ""]
        rows = result["rows"]
        keys = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
            lines += [
                "| " + " | ".join(cell(row.get(key, "")) for key in keys) + " |" for row in rows
            ]
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    """A value in a table."""
    if isinstance(value, float):
        return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:,.4g}"
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--budget-s", type=float, default=480.0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and rows")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark-gpu")
    options = parser.parse_args()
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["DS_ACCELERATOR"] = options.device
    results: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    raw: dict[str, Any] = {"device": options.device, "tiny": options.tiny}
    for part in ("machine", *options.parts):
        left = options.budget_s - (time.monotonic() - began)
        limit, least = PARTS.get(part, (60, 0))
        if left < least:
            status = f"NOT RUN: {left:.0f} s of the budget were left, it needs {least}"
            result = {"part": part, "status": status, "seconds": 0.0, "rows": []}
        else:
            result = run_part(part, options, found, min(limit, left))
        for row in result["rows"]:
            found |= row.pop("found", {})
        results.append(result)
        print(f"{part}: {result['status']}, {result['seconds']} s", flush=True)
        raw |= {"parts": results, "seconds": time.monotonic() - began}
        (options.out / "results.json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
        (options.out / "results.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    for part in PARTS:
        if part not in options.parts:
            print(f"{part}: NOT RUN (--parts)")


if __name__ == "__main__":
    main()
