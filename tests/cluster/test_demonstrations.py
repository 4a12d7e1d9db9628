"""Demonstrations of episodes: played with the real environment, scored token by token."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohort.actors.records import Completion, Group, Prompt
from cohort.actors.turns import EpisodeEnd, Turn, TurnShape
from cohort.cluster.commands.demonstrations import (
    as_group,
    demonstration,
    demonstrations,
    scored_tokens,
)
from cohort.cluster.commands.warmup import WarmUp, warmup_config
from cohort.cluster.config_file import load_config
from cohort.cluster.lengths import Lengths
from cohort.cluster.prepare import Prepared
from cohort.rewards.config import EnvironmentsConfig, TaskConfig
from cohort.rewards.environments.specs import environment_spec
from cohort.rewards.environments.worker import EnvironmentWorker
from cohort.rewards.tasks import AdditionTask, PromptRenderer, Row, TaskError
from tests.models import tiny_tokenizer

ADDITION = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "addition.yaml"
TOKENIZER = tiny_tokenizer()
LONGEST = 400
GAME = '''
class Game:
    """Says higher or lower until the answer is right."""

    def reset(self, row, seed):
        self.answer = row["answer"]

    def step(self, reply):
        from cohort.rewards.environments.base import Step

        if not reply.text.isdecimal():
            raise ValueError("no number")
        if int(reply.text) == self.answer:
            return Step("Right.", reward=1.0, done=True)
        return Step("Higher." if int(reply.text) < self.answer else "Lower.")
'''


class Shows(AdditionTask):
    """Shows the replies that `make` returns for a row's answer."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__(0)
        self._make = make

    def demonstration(self, row: Row, epoch: int) -> Any:  # noqa: ARG002
        return self._make(int(row.columns["answer"]))


def prepared(make: Callable[[int], Any], *overrides: str) -> Prepared:
    keys = ["model.path=m", "task.environment=game.py:Game", "actors.max_tokens=16", *overrides]
    config = warmup_config(load_config(ADDITION, keys), WarmUp(1, 1, 1e-4))
    renderer = PromptRenderer(TOKENIZER, LONGEST)
    return Prepared(config, "m", 1, Shows(make), [], renderer, Lengths(0, LONGEST, 0))


class Host:
    """What the worker's handle does, without Ray."""

    def __init__(self, worker: EnvironmentWorker) -> None:
        self.begin, self.step = worker.begin, worker.step
        self._forget = worker.forget

    def forget(self, episode_id: str) -> None:
        asyncio.get_running_loop().create_task(self._forget(episode_id))


@pytest.fixture
def play(tiny_model: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs a coroutine function with a host of the game."""
    (tmp_path / "game.py").write_text(GAME)
    spec = environment_spec(
        TaskConfig(environment=f"{tmp_path}/game.py:Game"),
        EnvironmentsConfig(step_timeout_s=5),
        model_path=str(tiny_model),
        template_arguments={},
        max_length=LONGEST,
    )

    def run(body: Callable[[Host], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            worker = EnvironmentWorker(spec)
            try:
                return await body(Host(worker))
            finally:
                if worker._process is not None:
                    worker._process.kill()

        return asyncio.run(main())

    return run


def first(given: Prepared) -> Any:
    return next(demonstrations(given, 0))


@pytest.mark.slow
def test_an_episode_is_what_the_model_would_generate(play: Any) -> None:
    """Prompt, replies and answers together are the conversation as the chat template writes it."""
    shown = first(prepared(lambda answer: [str(answer - 1), str(answer)]))
    ref = play(lambda host: as_group(shown, host, LONGEST))
    group = ref.ref.group
    [completion] = group.completions
    answer = int(group.prompt.columns["answer"])
    assert completion.end.stop_reason == "done"
    assert [turn.shape.sampled for turn in completion.turns] == [len(r) for r in shown.replies]
    assert completion.token_ids.tolist() == [t for reply in shown.replies for t in reply]
    assert all(math.isnan(x) for x in completion.logprobs)
    [(ids, spans)] = scored_tokens(group)
    messages = [
        *group.prompt.content,
        {"role": "assistant", "content": str(answer - 1)},
        {"role": "user", "content": "Higher."},
        {"role": "assistant", "content": str(answer)},
    ]
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == TOKENIZER.decode(ids) + "\n"
    assert [ids[at] for span in spans for at in span] == completion.token_ids.tolist()
    # The learner sees an episode of two turns, all of it trained.
    assert ref.meta.completion_tokens == (len(completion.token_ids),)
    assert ref.scores.totals == (1.0,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "longest", "words"),
    [
        (lambda a: [str(a - 1)], LONGEST, "goes on after the last of 1 replies"),
        (lambda a: [str(a), "x"], LONGEST, r"ended \(done\) before the last 1 of 2 replies"),
        (lambda _: ["x"], LONGEST, "failed: .*no number"),
        (lambda a: [str(a)], 20, "is longer than 20 tokens: raise model.max_length"),
    ],
)
def test_an_episode_that_does_not_end_with_its_last_reply_is_an_error(
    play: Any, make: Any, longest: int, words: str
) -> None:
    shown = first(prepared(make))
    with pytest.raises(
        TaskError, match=f"(?s)row {re.escape(shown.row_id)}: the episode .*{words}"
    ):
        play(lambda host: as_group(shown, host, longest))


@pytest.mark.parametrize("found", [[], ["1", 2], 3, ("1",)])
def test_replies_that_are_no_texts(found: Any) -> None:
    with pytest.raises(TaskError, match="must be a text, a list of texts or None"):
        first(prepared(lambda _: found))


def test_several_replies_need_an_environment() -> None:
    with pytest.raises(TaskError, match=r"several replies, and task\.environment is not set"):
        first(prepared(lambda _: ["1", "2"], "task.environment=null"))


def test_every_reply_has_to_fit() -> None:
    given = prepared(lambda _: ["1", "2" * 40], "actors.max_tokens=8")
    with pytest.raises(TaskError, match=r"a reply of its demonstration has \d+ tokens"):
        first(given)
    dropped = prepared(lambda _: ["1", "2" * 40], "actors.max_tokens=8", "task.overlong=drop")
    assert demonstration(dropped, dropped.task.train_row(0), 0) is None


def test_tokens_of_a_rewritten_history_are_scored_once_each() -> None:
    """The third turn goes on from a part of the first one, the fourth extends the third."""
    shapes = [
        TurnShape(None, 3, 0, 2),
        TurnShape(0, 5, 1, 2),
        TurnShape(0, 4, 2, 1),
        TurnShape(2, 7, 1, 1),
    ]
    inserted = iter([[], [50], [60, 61], [70]])
    turns = [
        Turn(shape, np.array(next(inserted), dtype=np.int64), (0, 0), "stop") for shape in shapes
    ]
    token_ids = np.array([10, 11, 20, 21, 30, 40])
    completion = Completion(
        "c", "p", token_ids, np.zeros(6, np.float32), "stop", 0, (0, 0), "",
        turns=tuple(turns), end=EpisodeEnd("done", (None,) * 4),
    )  # fmt: skip
    prompt = Prompt("p", (1, 2, 3), "x", {})
    found = list(scored_tokens(Group("g", prompt, (completion,))))
    assert found == [
        ([1, 2, 3, 10, 11, 50, 20, 21], [range(3, 5), range(6, 8)]),
        ([1, 2, 3, 10, 60, 61, 30, 70, 40], [range(6, 7), range(8, 9)]),
    ]
    scored = [ids[at] for ids, spans in found for span in spans for at in span]
    assert sorted(scored) == sorted(token_ids.tolist())
