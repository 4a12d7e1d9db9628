"""Rewards, and the script that asks for a trip, against real vLLM servers with tiny models.

A server takes about 20 s to start, so each of the two is shared by its tests.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cohort.rewards.child import die_with_parent
from cohort.rewards.judge import LLMJudge
from cohort.rewards.reward_model import RewardModel
from tests.models import tiny_reward_model
from tests.scripts import ask_for_a_trip
from tests.serving import free_ports

pytestmark = [pytest.mark.system, pytest.mark.exhaustive]

START_S = 180
# Compact JSON: a random model would spend all its tokens on white space between the parts.
COMPACT = '{"backend": "xgrammar", "disable_any_whitespace": true}'

# The travel prompt is longer than what the tiny model says of itself.
CONTEXT = 8192


@contextmanager
def serving(model: Path, log: Path, *options: str) -> Iterator[str]:
    """The URL of a vLLM server; afterwards none of its processes is left."""
    [port] = free_ports()
    # The CPU wheel's `vllm` command cannot start: it looks for a package named vllm.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += ["--model", str(model), "--served-model-name", "tiny", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", "64M", *options]
    environment = {
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        # As in actors/engine.py: seconds less to start.
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "2",
    }
    with log.open("w") as out:
        server = subprocess.Popen(
            command,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
            # Also when the tests are killed.
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_S
        while not healthy(url):
            assert server.poll() is None, f"the server ended: {log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"no server: {log.read_text()[-3000:]}"
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                server.wait(20)
        finally:
            # Its session: the server and the engine that it started.
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait(10)


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def requests_so_far(url: str, path: str) -> int:
    """Requests that the server has answered on a path, by its own count."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    mine = [line for line in lines if line.startswith("http_requests_total{")]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in mine if f'handler="{path}"' in line))


# The judge ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[str]:
    log = tmp_path_factory.mktemp("chat") / "server.log"
    options = ("--structured-outputs-config", COMPACT, "--max-model-len", str(CONTEXT))
    with serving(tiny_model, log, *options) as url:
        yield url


def judge(url: str, **options: Any) -> LLMJudge:
    known = {"model": "tiny", "criteria": "Is it polite?", "low": 1, "high": 6, "max_reason": 40}
    return LLMJudge(base_url=f"{url}/v1", **{**known, **options})


def ask(function: Any, *texts: str, prompt: Any = "Say hello.") -> list[Any]:
    return asyncio.run(function([prompt] * len(texts), list(texts)))


def test_a_judge_grades_within_its_schema_and_remembers(chat: str) -> None:
    function = judge(chat, concurrency=2)
    before = requests_so_far(chat, "/v1/chat/completions")
    texts = ["hello", "go away", "1 + 1", "hello", 'He said: {"score": 6}', "x" * 300, ""]
    grades = ask(function, *texts)
    for item in grades[:-1]:
        assert isinstance(item, dict), item
        assert item["grade"] in range(1, 7)
        assert item["score"] == (item["grade"] - 1) / 5
        assert len(item["reason"]) <= 40
    assert grades[-1] == {"score": 0.0, "grade": 1, "reason": "empty"}
    assert grades[0] == grades[3]
    # One for each text that is not empty and not a repetition; none for what is remembered.
    assert requests_so_far(chat, "/v1/chat/completions") - before == 5
    assert ask(function, *texts) == grades
    assert requests_so_far(chat, "/v1/chat/completions") - before == 5


def test_a_judge_that_does_not_come_to_an_end_gives_no_score(chat: str) -> None:
    (error,) = ask(judge(chat, max_tokens=4), "hello")
    assert isinstance(error, ValueError)
    assert "truncated at max_tokens=4" in str(error)


def test_what_the_server_refuses_is_an_error_with_its_words(chat: str) -> None:
    (error,) = ask(judge(chat, model="other"), "hello")
    assert isinstance(error, Exception)
    assert "`other` does not exist" in str(error)
    (error,) = ask(judge(chat), "long " * 4000)
    assert isinstance(error, Exception)
    assert "maximum context length" in str(error)


def test_a_random_model_plans_no_trip(chat: str) -> None:
    done = ask_for_a_trip("--url", f"{chat}/v1", "--samples", "3", "--max-tokens", "32")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("Plan a 5-day trip to Japan, including Kyoto and Tokyo, ")
    assert done.stdout.count("no itinerary: ") == 3
    assert "No answer holds an itinerary" in done.stdout
    done = ask_for_a_trip("--url", f"{chat}/v1", "--model", "other")
    assert done.returncode == 2
    assert "`other` does not exist" in done.stderr


# The reward model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_model(tmp_path_factory.mktemp("models") / "reward")


@pytest.fixture(scope="module")
def pooling(tmp_path_factory: pytest.TempPathFactory, reward_folder: Path) -> Iterator[str]:
    log = tmp_path_factory.mktemp("pooling") / "server.log"
    with serving(reward_folder, log, "--runner", "pooling") as url:
        yield url


def test_a_reward_model_scores_as_transformers_does(pooling: str, reward_folder: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    texts = ["4", "It is 5, I think.", "", "4 " * 100]
    logits = ask(RewardModel(pooling, "tiny"), *texts, prompt=prompt)
    chances = ask(RewardModel(pooling, "tiny", activation=True), *texts, prompt=prompt)
    plain = ask(RewardModel(pooling, "tiny"), *texts, prompt="2 + 2? ")
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()

    def expected(rendered: str) -> float:
        ids = tokenizer(rendered, return_tensors="pt")
        with torch.no_grad():
            return float(model(**ids).logits)

    for text, logit, chance, joined in zip(texts, logits, chances, plain, strict=True):
        conversation = [*prompt, {"role": "assistant", "content": text}]
        value = expected(tokenizer.apply_chat_template(conversation, tokenize=False))
        assert logit == pytest.approx(value, abs=1e-3)
        assert chance == pytest.approx(1 / (1 + 2.718281828**-value), abs=1e-3)
        assert joined == pytest.approx(expected("2 + 2? " + text), abs=1e-3)
    assert len({round(value, 2) for value in logits}) == len(texts)


def test_a_reward_model_is_asked_once_and_its_refusals_are_errors(pooling: str) -> None:
    function = RewardModel(pooling, "tiny", concurrency=2)
    before = requests_so_far(pooling, "/classify")
    first = ask(function, "a", "b", "a")
    assert ask(function, "b", "a", "a") == [first[1], first[0], first[0]]
    assert requests_so_far(pooling, "/classify") - before == 2
    (error, good) = ask(function, "long " * 4000, "a")
    assert isinstance(error, Exception)
    assert "maximum context length" in str(error)
    assert good == first[0]
    (error,) = ask(RewardModel(pooling, "other"), "a")
    assert "`other` does not exist" in str(error)


def test_a_server_that_dies_is_an_error_and_never_a_score(
    pooling: str, reward_folder: Path
) -> None:
    function = RewardModel(pooling, "tiny", retries=1)
    known = ask(function, "known")
    (server,) = [
        process
        for process in psutil.process_iter(["ppid", "cmdline"])
        if process.info["ppid"] == os.getpid()
        and str(reward_folder) in (process.info["cmdline"] or ())
    ]
    server.kill()
    server.wait(10)
    error, same = ask(function, "new", "known")
    assert isinstance(error, ConnectionError)
    assert pooling.removeprefix("http://") in str(error)
    assert [same] == known
    (error,) = ask(judge(pooling, retries=1), "hello")
    assert isinstance(error, ConnectionError)
