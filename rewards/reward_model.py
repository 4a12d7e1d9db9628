"""A reward model served by vLLM: `vllm serve MODEL --runner pooling`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cohort.actors.plain import JsonObject
from cohort.rewards.base import completion_texts, per_completion
from cohort.rewards.endpoint import Endpoint, unicode_text


@per_completion
class RewardModel:
    """Scores each completion with a sequence classifier; the score is its logit.

    Prompt and completion become one conversation in the reward model's own chat template. A prompt
    that is a plain text is joined with its completion as it is, as TRL does it, and gets the
    special tokens that the model's tokenizer adds to any text.

    The same text is scored once, and remembered. A server that cannot be reached, an unknown model
    or a text beyond the model's context is an error with its cause, never a score.

    Args:
        base_url: Of the server, as "http://host:8000", without /v1.
        model: Its name there.
        activation: The score is what the model's activation makes of the logit (a probability, for
            most) instead of the logit.
        label: The class that counts; needed where the model has more than one.
        api_key_env: The environment variable with the key; name it in the function's `secrets` too,
            so that it reaches this process.
        concurrency: Requests at a time, of this reward worker.
        retries: By the client, of what may pass: no connection, 408, 409, 429 and 5xx, with growing
            waits.
        timeout_s: Seconds for one request.
        deadline_s: Seconds for a whole group; keep it below rewards.timeout_s.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        activation: bool = False,
        label: int | None = None,
        api_key_env: str | None = None,
        concurrency: int = 32,
        retries: int = 3,
        timeout_s: float = 20.0,
        deadline_s: float = 25.0,
    ) -> None:
        if base_url.rstrip("/").endswith("/v1"):
            raise ValueError(f"base_url must be the server's, without /v1, got {base_url!r}")
        if label is not None and label < 0:
            raise ValueError(f"label must be 0 or more, got {label}")
        self._endpoint = Endpoint(
            self._ask, base_url, api_key_env, concurrency, retries, timeout_s, deadline_s
        )
        self._options = {"model": model, "use_activation": activation}
        self._label = label

    async def __call__(
        self, /, prompts: Sequence[object], completions: Sequence[object], **_: object
    ) -> list[float | Exception | None]:
        pairs = zip(prompts, completion_texts(completions), strict=True)
        return await self._endpoint.answers([_text(prompt, text) for prompt, text in pairs])

    async def _ask(self, client: Any, text: JsonObject) -> float:
        # The client's way to ask for what OpenAI's own API does not have.
        reply = await client.post("/classify", cast_to=object, body=self._options | text)
        try:
            (item,) = reply["data"]
            values = [float(value) for value in item["probs"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"the reward model did not reply with scores: {reply!r:.200}"
            ) from error
        if self._label is None and len(values) != 1:
            raise ValueError(f"the reward model has {len(values)} classes: say which by `label`")
        if self._label is not None and self._label >= len(values):
            raise ValueError(f"label {self._label}: the model has {len(values)} classes, from 0")
        value = values[self._label or 0]
        if not math.isfinite(value):
            raise ValueError(f"the reward model replied with {value}")
        return value


def _text(prompt: Any, completion: str) -> JsonObject:
    """What is to be scored, as the server takes it."""
    text = unicode_text(completion)
    if isinstance(prompt, str):
        return {"input": unicode_text(prompt) + text}
    *before, last = prompt
    if last["role"] == "assistant":  # the beginning of the answer
        return {"messages": [*before, {**last, "content": last["content"] + text}]}
    return {"messages": [*prompt, {"role": "assistant", "content": text}]}
