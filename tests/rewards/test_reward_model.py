"""The reward model against a local server that speaks the protocol, well and badly."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
from model_server import Reply, Server

from cohort.actors.records import Completion, Group, Prompt
from cohort.rewards.base import RewardLoadError
from cohort.rewards.reward_model import RewardModel
from cohort.rewards.specs import RewardSpec
from cohort.rewards.worker import RewardWorker

KEY = "sk-very-secret"


def scores(*values: Any) -> Reply:
    item = {"index": 0, "label": "LABEL_0", "probs": list(values), "num_classes": len(values)}
    return 200, {"id": "x", "object": "list", "created": 1, "model": "m", "data": [item]}


@pytest.fixture(autouse=True)
def scored(server: Server) -> None:
    server.reply = lambda *_: scores(-1.5)


def make(server: Server, **options: Any) -> RewardModel:
    return RewardModel(base_url=server.url, model="m", **options)


def ask(model: RewardModel, *texts: str, prompt: Any = "Q: ") -> list[Any]:
    return asyncio.run(model([prompt] * len(texts), list(texts)))


def test_a_conversation_and_a_text(server: Server) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    reply = {"role": "assistant", "content": "Hello!"}
    model = make(server)
    assert asyncio.run(model([prompt], [[reply]])) == [-1.5]
    assert ask(model, "yes") == [-1.5]
    assert server.paths == {"/classify"}
    common = {"model": "m", "use_activation": False}
    assert server.requests == [
        common | {"messages": [*prompt, reply]},
        common | {"input": "Q: yes"},
    ]
    ask(make(server, activation=True), "yes")
    assert server.requests[2]["use_activation"] is True


def test_one_of_several_classes(server: Server) -> None:
    server.reply = lambda *_: scores(0.1, 0.2, 0.7)
    assert ask(make(server, label=2), "a") == [0.7]
    assert ask(make(server, label=0), "a") == [0.1]
    for options, words in (({}, "3 classes"), ({"label": 3}, "label 3")):
        (error,) = ask(make(server, **options), "a")
        assert isinstance(error, ValueError)
        assert words in str(error)


def test_the_same_text_is_scored_once_and_failures_again(server: Server) -> None:
    model = make(server)
    server.reply = lambda request, _: (400, {}) if "bad" in request["input"] else scores(2)
    first, *others = ask(model, "bad", "a", "a", "")
    assert isinstance(first, Exception)
    assert others == [2.0, 2.0, 2.0]
    assert len(server.requests) == 3
    server.reply = lambda *_: scores(1)
    assert ask(model, "bad", "a") == [1.0, 2.0]
    assert len(server.requests) == 4


def test_concurrency_is_bounded(server: Server) -> None:
    def slow(*_: Any) -> Reply:
        time.sleep(0.05)
        return scores(1)

    server.reply = slow
    ask(make(server, concurrency=3), *(f"text {n}" for n in range(12)))
    assert len(server.requests) == 12
    assert server.most <= 3


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 503])
def test_transient_errors_are_tried_again(server: Server, status: int) -> None:
    server.reply = lambda _, count: (status, {"error": "busy"}) if count < 3 else scores(3)
    assert ask(make(server), "a") == [3.0]


@pytest.mark.parametrize("status", [400, 401, 404])
def test_other_errors_are_not(server: Server, status: int) -> None:
    server.reply = lambda *_: (status, {"error": {"message": "no such model"}})
    (error,) = ask(make(server), "a")
    assert "no such model" in str(error)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        "7",
        None,
        {"data": []},
        {"data": [{}]},
        {"data": None},
        {"data": [{"probs": None}]},
        {"data": [{"probs": ["high"]}]},
        {"data": [{"probs": []}]},
        scores(float("nan"))[1],
        scores(float("inf"))[1],
        {"data": [scores(1)[1]["data"][0]] * 2},
    ],
)
def test_a_reply_without_a_score_is_an_error(server: Server, body: Any) -> None:
    server.reply = lambda *_: (200, body)
    (error,) = ask(make(server), "a")
    assert isinstance(error, ValueError)
    assert "reward model" in str(error)
    assert len(server.requests) == 1


def test_a_server_that_hangs_or_is_gone(server: Server) -> None:
    def hang(request: dict[str, Any], _: int) -> Reply:
        time.sleep(0 if "quick" in request["input"] else 3)
        return scores(1)

    server.reply = hang
    started = time.monotonic()
    slow, quick = ask(make(server, deadline_s=0.6), "slow", "quick")
    assert isinstance(slow, TimeoutError)
    assert "deadline_s" in str(slow)
    (slow,) = ask(make(server, timeout_s=0.3, retries=0), "slow")
    assert time.monotonic() - started < 2.5
    assert isinstance(slow, TimeoutError)
    assert "timeout_s" in str(slow)
    assert quick == 1.0
    gone = RewardModel(base_url="http://user:pass@127.0.0.1:9", model="m", retries=0)
    (error,) = ask(gone, "a")
    assert isinstance(error, ConnectionError)
    assert "127.0.0.1:9" in str(error)
    assert "pass" not in str(error)


def test_hostile_texts_reach_the_server(server: Server) -> None:
    assert ask(make(server), "", "\x00 \ud800 ٣²", "x" * 10**6, "Q: ") == [-1.5] * 4
    lengths = sorted(len(request["input"]) for request in server.requests)
    assert lengths == [3, 6, 9, 10**6 + 3]


@pytest.mark.slow
def test_the_key_travels_to_the_child_and_nowhere_else(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_API_KEY", KEY)
    server.reply = lambda request, _: (401, {}) if "bad" in request["input"] else scores(4)
    completions = tuple(
        Completion(f"c{i}", "p", np.arange(2), np.zeros(2, np.float32), "stop", i, (0, 0), text)
        for i, text in enumerate(["good", "bad"])
    )
    group = Group("g", Prompt("p", (1,), "Q"), completions)
    options = {"base_url": server.url, "model": "m", "api_key_env": "MODEL_API_KEY"}
    path = "cohort.rewards.reward_model:RewardModel"
    actor = RewardWorker([RewardSpec("rm", path, options=options, secrets=("MODEL_API_KEY",))], 30)
    _, scored = actor.score(group)
    actor.close()
    assert scored is not None
    assert scored.totals == (4.0, None)
    assert [error.completion_id for error in scored.errors] == ["c1"]
    assert set(server.headers) == {f"Bearer {KEY}"}
    assert KEY not in str(scored)
    with pytest.raises(RewardLoadError, match=r"(?s)MODEL_API_KEY.*secrets: \[MODEL_API_KEY\]"):
        RewardWorker([RewardSpec("rm", path, options=options)], 30)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base_url": "http://host:8000/v1"}, "without /v1"),
        ({"base_url": "host:8000"}, "http://"),
        ({"concurrency": 0}, "concurrency"),
        ({"label": -1}, "label"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RewardModel(**{"base_url": "http://host", "model": "m", **options})
