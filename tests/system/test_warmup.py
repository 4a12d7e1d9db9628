"""`cohort warmup` as a user runs it: the real learner on a tiny model."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.system.conftest import COHORT, CONFIG, Cohort

pytestmark = [pytest.mark.system, pytest.mark.slow]


def start(cohort: Cohort, out: Path, *flags: str) -> subprocess.Popen[str]:
    keys = [f"model.path={cohort.model}", "model.dtype=float32"]
    with (cohort.folder / f"{out.name}.log").open("w") as log:
        process = subprocess.Popen(
            [COHORT, "warmup", CONFIG, str(out), *flags, *keys],
            cwd=cohort.folder, env=cohort.environment(), stdout=log, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
    cohort.started.append(process)
    return process


@pytest.mark.exhaustive
@pytest.mark.usefixtures("all_cores")
def test_warmup(cohort: Cohort, nothing_left: Callable[[], None]) -> None:
    """Twice the same weights. A run on two ranks that is stopped writes nothing."""
    flags = ("--steps", "60", "--batch-size", "16", "--learning-rate", "3e-3")
    outs = [cohort.folder / "warm-a", cohort.folder / "warm-b"]
    stopped = cohort.folder / "stopped"
    runs = [start(cohort, out, *flags) for out in outs]
    long = start(cohort, stopped, "--steps", "100000", "learner.workers=2", "learner.zero_stage=3")
    logs = [cohort.folder / f"{out.name}.log" for out in (*outs, stopped)]
    # Four ranks start at once, beside another test: minutes on two cores.
    deadline = time.monotonic() + 400
    while "step      2/" not in logs[2].read_text():
        assert long.poll() is None, logs[2].read_text()
        assert time.monotonic() < deadline, logs[2].read_text()
        time.sleep(0.1)
    long.send_signal(signal.SIGTERM)
    assert [run.wait(120) for run in runs] == [0, 0], logs[0].read_text()
    assert long.wait(60) == 143, logs[2].read_text()
    assert "nothing was written" in logs[2].read_text()
    # Neither the folder nor a temporary one beside it.
    assert not [path for path in cohort.folder.iterdir() if "stopped" in path.name][1:]

    first, second = (load_file(out / "model.safetensors") for out in outs)
    before = load_file(cohort.model / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], before[name]) for name in first)
    text = logs[0].read_text()
    found = re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", text)
    assert found is not None, text
    assert float(found[2]) < 0.7 * float(found[1])
    # What was learned is in the folder: the likelihood it reports is that of the written model.
    model = AutoModelForCausalLM.from_pretrained(outs[0], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(outs[0])
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(cohort.model).chat_template
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 1 + 1? Reply with the number only."}],
        add_generation_prompt=True, return_tensors="pt", return_dict=False,
    )  # fmt: skip
    said = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    # It answers in the demonstrations' form: digits, and then it stops.
    assert re.fullmatch(r"\d{1,3}", tokenizer.decode(said, skip_special_tokens=True))
    assert said[-1] == tokenizer.eos_token_id
    nothing_left()
