"""Rollout actors with real vLLM engines: what they serve is what was published.

One engine start costs about 20 s, so each model gets one actor that several tests share, and
engines are started side by side.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
import ray
import torch
import xxhash
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cohort.actors.config import ActorsConfig
from cohort.actors.engine import EngineSpec
from cohort.actors.records import (
    Failure,
    Group,
    GroupMeta,
    Prompt,
    Request,
    SamplingSpec,
    WeightsInfo,
)
from cohort.actors.rollout import RolloutActor
from cohort.actors.sampling import tokens_at, uniforms
from tests.models import tiny_gpt2, tiny_llama, tiny_qwen2
from tests.system.conftest import is_engine

pytestmark = pytest.mark.system

# Longer than one block of the prefix cache at any block size that vLLM uses on CPUs.
LONG = 200
TIMEOUT = 120


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@dataclass
class Served:
    """A running actor, its model's folder, and the versions published so far."""

    actor: Any
    folder: Path
    shm: Path
    version: int = -1

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def publish(self, model: Any, **changes: Any) -> WeightsInfo:
        """Write a model's weights as the learner would."""
        self.version += 1
        state = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
        tied = model.config.tie_word_embeddings
        if tied:
            state.pop("lm_head.weight", None)
        state = changes.pop("edit", lambda s: s)(state)
        path = self.shm / f"v{self.version}.safetensors"
        save_file(state, path)
        node = ray.get_runtime_context().get_node_id()
        info = WeightsInfo(
            self.version,
            tuple(state),
            xxhash.xxh3_128(path.read_bytes()).hexdigest(),
            1,
            str(path),
            node,
        )
        return replace(info, **changes)

    def sync(self, info: WeightsInfo, probe: list[int] | None = None) -> Any:
        return ray.get(self.actor.sync.remote(info, probe or [5, 6, 7]), timeout=TIMEOUT)

    def generate(self, name: str, ids: list[int], **sampling: Any) -> tuple[GroupMeta, Group]:
        spec = SamplingSpec(**{"max_tokens": 16, "temperature": 1.0, "n": 4, "seed": 7, **sampling})
        request = Request(name, Prompt(name, tuple(ids), "text"), spec)
        refused = ray.get(self.actor.submit.remote([request]), timeout=TIMEOUT)
        assert refused is None, refused
        meta, group = self.actor.collect.options(num_returns=2).remote(name)
        meta = ray.get(meta, timeout=TIMEOUT)
        assert isinstance(meta, GroupMeta), meta
        return meta, ray.get(group)


def start(*folders: Path, quantization: Literal["none", "fp8"] = "none") -> list[Any]:
    """One actor for each model folder, started side by side on cores in turn; a Failure in place
    of one that failed."""
    remote = ray.remote(RolloutActor).options(num_cpus=0.1)
    cores = sorted(os.sched_getaffinity(0))
    waiting = []
    actors = []
    for index, folder in enumerate(folders):
        spec = EngineSpec(
            model_path=str(folder),
            dtype="float32",
            device="cpu",
            max_length=512,
            actors=ActorsConfig(max_concurrent=64, kv_cache_gib=0.25, quantization=quantization),
            seed=0,
        )
        actors.append(remote.remote(f"engine-test-{index}", spec, str(folder.parent / "logs")))
        waiting.append(actors[-1].start.remote((cores[index % len(cores)],)))
    pairs = zip(actors, ray.get(waiting, timeout=TIMEOUT), strict=True)
    return [actor if isinstance(answer, float) else answer for actor, answer in pairs]


MAKERS = {
    "llama-tied": lambda folder: tiny_llama(folder, tied=True),
    "llama-untied": lambda folder: tiny_llama(folder, tied=False),
    "qwen2-tied": lambda folder: tiny_qwen2(folder, tied=True),
    "gpt2": tiny_gpt2,
}


OFTEN = ("llama-tied", "gpt2")


@pytest.fixture(scope="module")
def often(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """An engine for each of the models that are always tested."""
    folders = [MAKERS[kind](tmp_path_factory.mktemp(kind) / "model") for kind in OFTEN]
    actors = start(*folders)
    assert not any(isinstance(actor, Failure) for actor in actors), actors
    yield {
        kind: Served(actor, folder, folder.parent)
        for kind, actor, folder in zip(OFTEN, actors, folders, strict=True)
    }
    for actor in actors:
        ray.kill(actor)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=[] if kind in OFTEN else [pytest.mark.exhaustive])
        for kind in MAKERS
    ],
)
def served(
    request: Any, often: dict[str, Served], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    if request.param in often:
        yield often[request.param]
        return
    tmp = tmp_path_factory.mktemp(request.param)
    folder = MAKERS[request.param](tmp / "model")
    [actor] = start(folder)
    assert not isinstance(actor, Failure), actor
    yield Served(actor, folder, tmp)
    ray.kill(actor)


def engine_processes(actor: Any) -> list[psutil.Process]:
    """vLLM's processes below an actor that compute."""
    here = psutil.Process(ray.get(actor.place.remote()).pid)
    # A process that writes its title meanwhile is seen without one.
    for _ in range(20):
        below = here.children(recursive=True)
        found = [p for p in below if is_engine(" ".join(p.cmdline()))]
        if found:
            break
        time.sleep(0.1)
    return found


def perturbed(model: Any, seed: int) -> Any:
    """Every weight moved by 30 % of its own spread: no training step would hide in this."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            spread = weight.std() if weight.numel() > 1 and weight.std() > 0 else 0.1
            weight.add_(torch.randn_like(weight) * 0.3 * spread)
    return model


def logprobs(model: Any, ids: list[int], temperature: float = 1.0) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float() / temperature
    chosen = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None])
    return chosen[:, 0].numpy()


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(10, 250, count).tolist()


def test_nothing_is_generated_before_weights_were_pulled(served: Served) -> None:
    if served.version >= 0:
        pytest.skip("the shared actor has been synced already")
    request = Request("early", Prompt("p", (5, 6), "t"), SamplingSpec(4, 1.0, 2, 0))
    answer = ray.get(served.actor.submit.remote([request]), timeout=TIMEOUT)
    assert isinstance(answer, Failure)
    assert "not pulled weights" in answer.message


def test_engine_equals_model_after_every_strong_change_of_all_weights(served: Served) -> None:
    """Log-probs of a long prompt and of sampled tokens, with the prefix cache warm before."""
    ids = tokens(LONG, 1)
    model = served.model()
    for change in range(3):
        if change:
            perturbed(model, change)
        answer = served.sync(served.publish(model), ids)
        assert not isinstance(answer, Failure), answer
        np.testing.assert_allclose(answer, logprobs(model, ids), atol=2e-4)
        # The same prompt each time: a stale prefix cache would answer with the old weights.
        for temperature in (0.5, 1.5):
            meta, group = served.generate(f"s{change}-{temperature}", ids, temperature=temperature)
            assert meta.weight_versions == (served.version, served.version)
            for completion in group.completions:
                full = ids + completion.token_ids.tolist()
                expected = logprobs(model, full, temperature)[LONG - 1 :]
                np.testing.assert_allclose(completion.logprobs, expected, atol=5e-4)
                assert len(completion.token_ids) == len(completion.logprobs)


def test_same_seed_same_group_other_seed_other_group(served: Served) -> None:
    served.sync(served.publish(served.model()))
    ids = tokens(20, 2)
    groups = [
        [c.token_ids.tolist() for c in served.generate(f"d{i}", ids, seed=seed)[1].completions]
        for i, seed in enumerate((100, 100, 500))
    ]
    assert groups[0] == groups[1]
    assert groups[0] != groups[2]
    # Samples of one group are not copies of each other either.
    assert len({tuple(c) for c in groups[0]}) > 1


def test_tokens_are_those_that_their_seed_draws_from_the_model(served: Served) -> None:
    model = served.model()
    served.sync(served.publish(model))
    ids = tokens(20, 4)
    _, group = served.generate("drawn", ids, temperature=0.8, seed=31, max_tokens=24)
    for index, completion in enumerate(group.completions):
        sampled = completion.token_ids.tolist()
        with torch.no_grad():
            logits = model(torch.tensor([ids + sampled])).logits[0, len(ids) - 1 : -1] / 0.8
        generator = torch.Generator().manual_seed(31 + index)
        drawn = torch.cat([uniforms(1, {0: generator}) for _ in sampled])
        assert tokens_at(logits.softmax(-1), drawn).tolist() == sampled


@pytest.mark.parametrize("damage", ["withheld", "misnamed", "wrong shape", "torn"])
def test_a_damaged_update_is_an_error_and_a_full_one_repairs_it(
    served: Served, damage: str
) -> None:
    def edit(state: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in state if "layers.1" in name or "h.1." in name)
        tensor = state.pop(name)
        if damage == "misnamed":
            state[name + "x"] = tensor
        if damage == "wrong shape":
            state[name] = tensor.flatten()[:-1].clone()
        if damage == "torn":
            state[name] = tensor
        return state

    model = perturbed(served.model(), 9)
    changes = {"fingerprint": "0" * 32} if damage == "torn" else {"fingerprint": ""}
    # The sender's own list of names agrees with the file: the engine has to notice by itself.
    answer = served.sync(served.publish(model, edit=edit, **changes))
    assert isinstance(answer, Failure)
    request = Request("broken", Prompt("p", (5, 6), "t"), SamplingSpec(4, 1.0, 2, 0))
    refused = ray.get(served.actor.submit.remote([request]), timeout=TIMEOUT)
    assert isinstance(refused, Failure), "an engine with a failed update must not generate"

    ids = tokens(40, 3)
    repaired = served.sync(served.publish(model), ids)
    assert not isinstance(repaired, Failure), repaired
    np.testing.assert_allclose(repaired, logprobs(model, ids), atol=2e-4)


def test_more_prompts_than_one_batch_holds(served: Served) -> None:
    """Seeded requests whose prompts together exceed what the engine computes in one step."""
    served.sync(served.publish(served.model()))
    requests = [
        Request(
            f"m{i}", Prompt(f"m{i}", tuple(tokens(450, i)), "t"), SamplingSpec(4, 1.0, 4, 10 * i)
        )
        for i in range(12)
    ]
    assert ray.get(served.actor.submit.remote(requests), timeout=TIMEOUT) is None
    waiting = [served.actor.collect.options(num_returns=2).remote(r.group_id) for r in requests]
    metas = ray.get([meta for meta, _ in waiting], timeout=TIMEOUT)
    assert all(isinstance(meta, GroupMeta) for meta in metas), metas


def test_older_weights_are_refused(served: Served) -> None:
    first = served.publish(served.model())
    second = served.publish(served.model())
    assert not isinstance(served.sync(second), Failure)
    answer = served.sync(first)
    assert isinstance(answer, Failure)
    assert "older" in answer.message


def test_requests_in_flight_survive_updates(served: Served) -> None:
    model = served.model()
    served.sync(served.publish(model))
    requests = [
        Request(f"f{i}", Prompt(f"f{i}", tuple(tokens(20, i)), "t"), SamplingSpec(200, 1.0, 4, i))
        for i in range(6)
    ]
    before = served.version
    assert ray.get(served.actor.submit.remote(requests), timeout=TIMEOUT) is None
    waiting = [served.actor.collect.options(num_returns=2).remote(r.group_id) for r in requests]
    for change in range(2):
        assert not isinstance(served.sync(served.publish(perturbed(model, change))), Failure)
    metas = ray.get([meta for meta, _ in waiting], timeout=TIMEOUT)
    groups = ray.get([group for _, group in waiting])
    assert all(len(group.completions) == 4 for group in groups)
    assert all(meta.weight_versions[0] == before for meta in metas)
    assert all(before <= meta.weight_versions[1] <= served.version for meta in metas)


def test_completions_are_there_before_their_group(served: Served) -> None:
    """A random model ends one in some hundred tokens, so some of these end early."""
    served.sync(served.publish(served.model()))
    spec = SamplingSpec(200, 1.0, 48, 3)
    request = Request("e0", Prompt("e0", tuple(tokens(20, 1)), "t"), spec)
    assert ray.get(served.actor.submit.remote([request]), timeout=TIMEOUT) is None
    call = served.actor.completion.options(num_returns=2)
    early = [call.remote("e0", index) for index in range(48)]
    meta, group = served.actor.collect.options(num_returns=2).remote("e0")
    waiting = {failure: part for failure, part in early}
    [first], _ = ray.wait([meta, *waiting], timeout=TIMEOUT)
    assert ray.wait([meta], timeout=0)[0] == []
    assert ray.get(first) is None
    [ended] = ray.get(waiting[first]).completions
    assert ended.finish_reason == "stop"
    assert len(ended.token_ids) < 200

    assert isinstance(ray.get(meta, timeout=TIMEOUT), GroupMeta)
    whole = ray.get(group)
    parts = [ray.get(part).completions for _, part in early]
    assert [part[0].id for part in parts] == [c.id for c in whole.completions]
    for [part], completion in zip(parts, whole.completions, strict=True):
        np.testing.assert_array_equal(part.token_ids, completion.token_ids)
        assert part.text == completion.text
    late, _ = served.actor.completion.options(num_returns=2).remote("e0", 0)
    assert ray.get(late, timeout=TIMEOUT).kind == "infra"


def test_an_engine_computes_on_the_cores_it_was_given(served: Served) -> None:
    served.sync(served.publish(served.model()))
    served.generate("cores", tokens(8, 1))
    engines = engine_processes(served.actor)
    assert engines
    for engine in engines:
        # `start` gives one core; without binding it would be every core of the machine.
        assert len(engine.cpu_affinity()) == 1


@pytest.mark.exhaustive
def test_two_engines_side_by_side_never_give_copies(tmp_path: Path) -> None:
    """Different prompts' seeds differ, whichever engine; one prompt is the same on both. A third
    one beside them cannot start."""
    folder = tiny_llama(tmp_path / "model")
    broken = tiny_llama(tmp_path / "broken" / "model")
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"] = torch.ones(7)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    *actors, failure = start(folder, folder, broken)
    # An engine that cannot start carries the last words of its process, below the actor.
    assert isinstance(failure, Failure)
    assert "Attempted to load weight" in failure.message, failure.message
    assert "64" in failure.message

    first, second = (Served(actor, folder, tmp_path) for actor in actors)
    info = first.publish(first.model())
    assert not isinstance(first.sync(info), Failure)
    assert not isinstance(second.sync(info), Failure)
    ids = tokens(20, 4)

    def sample(served: Served, name: str, seed: int) -> list[list[int]]:
        return [c.token_ids.tolist() for c in served.generate(name, ids, seed=seed)[1].completions]

    assert sample(first, "a", 1000) == sample(second, "a", 1000)
    assert sample(first, "b", 1000) != sample(second, "b", 2000)

    # The engine's process dies while it is asked for something: the actor says so, soon.
    [engine] = engine_processes(actors[1])
    engine.suspend()
    update = actors[1].sync.remote(second.publish(second.model()), [5, 6, 7])
    assert not ray.wait([update], timeout=1)[0]
    engine.kill()
    answer = ray.get(update, timeout=20)
    assert isinstance(answer, Failure)
    assert "died" in answer.message

    # SIGKILL of an actor: its engine's processes go with it.
    victim = psutil.Process(ray.get(actors[0].place.remote()).pid)
    family = victim.children(recursive=True)
    assert len(family) >= 2, "the engine runs in processes of its own"
    victim.kill()
    deadline = time.monotonic() + 10
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family):
        assert time.monotonic() < deadline, f"left behind: {family}"
        time.sleep(0.1)


def e4m3(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """x at the precision of float8, with one scale, or one along `dim`."""
    peak = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    return (x * (448 / peak)).to(torch.float8_e4m3fn).to(x.dtype) * (peak / 448)


def in_float8(model: Any) -> Any:
    """A tiny Llama as a float8 engine computes it: layers that it fuses share a scale."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for fused in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        ):
            weights = e4m3(torch.cat([linear.weight.data for linear in fused]))
            for linear, weight in zip(
                fused, weights.split([linear.out_features for linear in fused]), strict=True
            ):
                linear.weight.data.copy_(weight)
                linear.register_forward_pre_hook(lambda _, args: (e4m3(args[0], dim=-1),))
    return model


@pytest.mark.exhaustive
def test_float8_rollouts_are_rounded_again_at_every_update(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    [actor] = start(folder, quantization="fp8")
    assert not isinstance(actor, Failure), actor
    served = Served(actor, folder, tmp_path)
    ids = tokens(40, 3)
    for seed in (1, 2):
        model = perturbed(served.model(), seed)
        served.sync(served.publish(model))
        _, group = served.generate(f"float8-{seed}", ids)
        plain, rough = [], []
        for completion in group.completions:
            n = len(completion.token_ids)
            sequence = ids + completion.token_ids.tolist()
            plain.append(np.abs(logprobs(model, sequence)[-n:] - completion.logprobs))
        model = in_float8(model)
        for completion in group.completions:
            n = len(completion.token_ids)
            sequence = ids + completion.token_ids.tolist()
            rough.append(np.abs(logprobs(model, sequence)[-n:] - completion.logprobs))
        far, near = np.concatenate(plain).mean(), np.concatenate(rough).mean()
        # What is left are activations on the edge between two values of float8.
        assert near < far / 5, (near, far)


def test_a_stop_ends_a_completion_and_stays_in_it(served: Served) -> None:
    """The text that an agent's request stops at was sampled, and is a part of the tokens."""
    served.sync(served.publish(served.model()))
    tokenizer = AutoTokenizer.from_pretrained(served.folder)
    _, group = served.generate("whole", [5, 6, 7], n=1, max_tokens=48)
    (whole,) = group.completions
    # Letters that a token writes for the first time: most of this model's tokens are odd bytes.
    texts = [tokenizer.decode([token]) for token in whole.token_ids]
    stop = next(
        text for at, text in enumerate(texts) if at > 3 and text.isascii() and text.isprintable()
        and not any(text in before for before in texts[:at])
    )  # fmt: skip
    _, group = served.generate("stopped", [5, 6, 7], n=1, max_tokens=48, stop=(stop,))
    (stopped,) = group.completions
    length = len(stopped.token_ids)
    assert 3 < length < len(whole.token_ids)
    assert stopped.token_ids.tolist() == whole.token_ids[:length].tolist()
    assert np.allclose(stopped.logprobs, whole.logprobs[:length], atol=1e-5)
    assert stopped.finish_reason == "stop"
    text = tokenizer.decode(stopped.token_ids, skip_special_tokens=False)
    assert stop in text
    assert stop not in tokenizer.decode(stopped.token_ids[:-1], skip_special_tokens=False)


def test_overlong_prompts_fail_as_data(served: Served) -> None:
    served.sync(served.publish(served.model()))
    prompt = Prompt("p", tuple(tokens(600, 0)), "t")
    request = Request("long", prompt, SamplingSpec(8, 1.0, 2, 0))
    answer = ray.get(served.actor.submit.remote([request]), timeout=TIMEOUT)
    assert isinstance(answer, Failure)
    assert answer.kind == "data"
