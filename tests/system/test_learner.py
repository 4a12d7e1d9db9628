"""The learner on real Ray actors under DeepSpeed, against a single-process reference."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import shutil
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cohort.actors.process import last_lines
from cohort.actors.records import Completion, ScoredGroup, ScoredRef
from cohort.learner import attention
from cohort.learner.batch import build_micro_batch
from cohort.learner.checkpoint import Checkpoints, load_state
from cohort.learner.config import AlgorithmConfig, LearnerConfig
from cohort.learner.float8 import convert
from cohort.learner.grpo import policy_loss
from cohort.learner.learner import Learner, LearnerError
from cohort.learner.logprobs import PolicyModel
from cohort.learner.presets import Preset
from cohort.learner.spec import LearnerSpec, ModelFacts
from cohort.learner.worker import LearnerWorker
from tests.learner.episodes import SHAPES, episode_group, episode_logprobs
from tests.learner.helpers import (
    metas,
    reference_logprobs,
    reference_loss,
    scored_group,
    tiny_model,
)

pytestmark = pytest.mark.system

TEMPERATURE = 0.8
# With an epsilon this large and a learning rate to match, AdamW's step is minus the gradient.
GRADIENT_PROBE = dict(learning_rate=1e4, adam_eps=1e4, adam_betas=(0.0, 0.99), gradient_clip=1e6)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    # For the reference's tiny tensors; more threads only wait for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama-tied", "qwen2-untied", "gpt2"):
        tiny_model(kind).save_pretrained(folder / kind)
    tiny_model("llama-tied", seed=1).save_pretrained(folder / "llama-other")
    return {path.name: path for path in folder.iterdir()}


def spec_for(model: Path, ranks: int, shm: Path, **options: Any) -> LearnerSpec:
    dtype = options.pop("dtype", "float32")
    return LearnerSpec(
        model_path=str(model),
        dtype=dtype,
        learner=LearnerConfig(workers=ranks, step_timeout_s=90, **options),
        algorithm=AlgorithmConfig(),
        temperature=TEMPERATURE,
        max_tokens=32,
        rank=0,
        world_size=ranks,
        device="cpu",
        threads=1,
        seed=0,
        shm_dir=str(shm),
        log_dir=f"{shm}-logs",  # not below `shm`, which goes with its rank
    )


async def start(spec: LearnerSpec) -> Learner:
    with pytest.MonkeyPatch.context() as patch:
        if spec.dtype == "float16":
            patch.setattr("cohort.learner.learner.LearnerWorker", Float16Anywhere)
        options = [{"num_cpus": 0.5}] * spec.world_size
        try:
            return await Learner.start(spec, options, timeout_s=300)
        except LearnerError:
            for rank in range(spec.world_size):
                print(last_lines(Path(str(spec.log_dir)) / f"learner-{rank}.log", count=200))
            raise


async def removed(folder: Path) -> None:
    """Fail unless what killed ranks had in shared memory goes within ten seconds."""
    for _ in range(100):
        if not folder.exists():
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{folder} is still there")


def put(group: ScoredGroup) -> ScoredRef:
    meta, scores = metas(group)
    return ScoredRef(meta, scores, ray.put(group))


def batch() -> list[ScoredGroup]:
    return [
        scored_group("a", [1.0, 0.0, 0.35, None], [3, 11, 6, 5], prompt_tokens=9, truncated=(1,)),
        scored_group("b", [0.5, 0.5, 0.5], [4, 4, 9]),
        scored_group("c", [0.0, 1.0, 1.0, 0.0, 2.0], [1, 2, 30, 4, 8], prompt_tokens=2),
        scored_group("d", [None, 1.0], [3, 3]),
    ]


def gradients(
    model: Path,
    groups: list[ScoredGroup],
    algorithm: AlgorithmConfig,
    reference: Path | None = None,
    kl: dict[str, float] | None = None,
    of_completion: Callable[..., torch.Tensor] | None = None,
) -> tuple[float, dict, float]:
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    base = None
    if reference is not None:
        base = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    loss = reference_loss(
        policy, groups, temperature=TEMPERATURE, algorithm=algorithm, reference=base, kl=kl,
        of_completion=of_completion,
    )  # fmt: skip
    loss.backward()
    # Tied parameters appear once here; their gradient is the sum over both uses.
    found = {name: p.grad.clone() for name, p in policy.named_parameters()}
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in found.values()))
    return float(loss.detach()), found, norm


def turn_by_turn(
    model: Any, prompt: tuple[int, ...], completion: Completion, temperature: float
) -> torch.Tensor:
    """Log-probs of a completion, of one with turns each sequence by itself."""
    if completion.turns:
        return episode_logprobs(model, prompt, completion, temperature)
    return reference_logprobs(model, prompt, completion.token_ids, temperature)


async def weights(group: Learner) -> dict[str, torch.Tensor]:
    # Copies: the file's memory is used again for a later version.
    file = load_file((await group.publish()).path)
    return {name: tensor.clone() for name, tensor in file.items()}


class Changeable(LearnerWorker):
    """A rank whose algorithm can be changed while it runs, and that computes short rows in parts
    too where attention is `tree`."""

    def __init__(self, spec: LearnerSpec) -> None:
        if spec.learner.attention == "tree":
            attention.MASKED_ROW_LENGTH = 0
        super().__init__(spec)

    def use(self, algorithm: AlgorithmConfig) -> None:
        self.state.spec = replace(self.state.spec, algorithm=algorithm)


async def use(group: Learner, algorithm: AlgorithmConfig, **learner: Any) -> None:
    await asyncio.gather(*(worker.use.remote(algorithm) for worker in group._ranks.handles))
    options = group.spec.learner.model_copy(update=learner)
    group.spec = replace(group.spec, algorithm=algorithm, learner=options)


# Every preset as it is, then what no preset sets; with them, ways to cut the work into
# micro-batches.
ALGORITHMS: list[tuple[dict[str, Any], int, int]] = [
    *(
        ({"preset": preset}, budget, chunk)
        for preset, (budget, chunk) in zip(
            get_args(Preset), itertools.cycle([(60, 7), (16, 3), (8192, 1024), (33, 5)])
        )
    ),
    ({"preset": "cohort", "aggregation": "prompt", "scale": "batch"}, 16, 3),
    ({"preset": "r1", "kl_coef": 0.2, "kl_estimator": "k2"}, 8192, 1024),
    ({"preset": "dapo", "mask_truncated": True}, 40, 5),
    ({"preset": "dr_grpo", "correction": "mask"}, 24, 9),
    ({"preset": "gspo", "anchor": "engine", "correction": "off"}, 60, 2),
    ({"preset": "gspo", "clip_low": 5.0, "sequence_mask": (0.3, 3.0)}, 16, 1024),
    ({"preset": "cispo", "anchor": "engine", "correction": "off"}, 100, 4),
    ({"preset": "rloo", "negative_mask": 0.1, "kl_coef": 0.2}, 33, 6),
    ({"preset": "dppo_tv", "baseline": "none", "drop_zero_variance": False}, 50, 8),
]

EVERY_SHAPE = [
    pytest.param(ranks, stage, kind, marks=[] if often else [pytest.mark.exhaustive])
    for ranks, stage, kind, often in [
        (1, 0, "qwen2-untied", False),
        (1, 1, "gpt2", False),
        (1, 2, "qwen2-untied", False),
        (1, 3, "gpt2", False),
        (2, 0, "gpt2", False),
        (2, 1, "llama-tied", False),
        (2, 2, "gpt2", False),
        (2, 3, "llama-tied", True),
        (3, 0, "llama-tied", False),
        (3, 1, "llama-tied", False),
        (3, 2, "qwen2-untied", False),
        (3, 3, "gpt2", False),
    ]
]


@pytest.mark.parametrize(("ranks", "stage", "kind"), EVERY_SHAPE)
def test_step_equals_reference(
    run: Any,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    stage: int,
    kind: str,
) -> None:
    """Loss, gradient norm and every gradient, whatever the algorithm and the split of the work.

    Group b has equal rewards, a has a completion that was cut, c one at nearly full length. The
    policy has left its reference by one step before.
    """
    monkeypatch.setattr("cohort.learner.learner.LearnerWorker", Changeable)

    async def check() -> None:
        options = dict(zero_stage=stage, gradient_checkpointing=stage == 3, **GRADIENT_PROBE)
        options["attention"] = "tree" if stage in (1, 3) else "auto"
        if stage == 2:
            options["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 1000}}
        spec = spec_for(models[kind], ranks, tmp_path, **options)
        group = await start(replace(spec, algorithm=AlgorithmConfig(preset="grpo_paper")))
        try:
            groups = batch()
            assert (await group.step([put(g) for g in groups])).applied
            start_folder = tmp_path / "start"
            start_folder.mkdir()
            await group.save(start_folder)
            before = await weights(group)
            for keys, budget, chunk in ALGORITHMS:
                algorithm = AlgorithmConfig(**keys)
                assert algorithm.contradictions() == []
                await use(group, algorithm, micro_batch_tokens=budget, logit_chunk_tokens=chunk)
                loss, expected, norm = gradients(
                    start_folder / "hf", groups, algorithm, models[kind]
                )
                result = await group.step([put(g) for g in groups])
                assert result.applied, keys
                samples = result.trained + result.filtered + result.failed
                assert (samples, result.failed) == (14, 3), keys
                assert result.loss == pytest.approx(loss, rel=2e-5, abs=2e-6), keys
                assert result.grad_norm == pytest.approx(norm, rel=1e-4), keys
                after = await weights(group)
                for name, gradient in expected.items():
                    moved = before[name] - after[name]
                    torch.testing.assert_close(moved, gradient, atol=2e-5 * norm, rtol=2e-3)
                await group.load(start_folder)
            # One kept group in one row: a rank without any work still takes part.
            alone = [g for g in groups if g.group.id != "c"]
            await use(group, AlgorithmConfig())
            loss, expected, norm = gradients(start_folder / "hf", alone, AlgorithmConfig())
            result = await group.step([put(g) for g in alone])
            assert result.loss == pytest.approx(loss, rel=2e-5, abs=2e-6)
            assert result.grad_norm == pytest.approx(norm, rel=1e-4)
            # Episodes whose histories fork, beside plain completions.
            await group.load(start_folder)
            forked = [episode_group("episodes", SHAPES, [1.0, 0.0, 0.5, 0.2]), groups[1], groups[2]]
            loss, expected, norm = gradients(
                start_folder / "hf", forked, AlgorithmConfig(), of_completion=turn_by_turn
            )
            result = await group.step([put(g) for g in forked])
            assert result.loss == pytest.approx(loss, rel=2e-5, abs=2e-6)
            assert result.grad_norm == pytest.approx(norm, rel=1e-4)
            after = await weights(group)
            for name, gradient in expected.items():
                moved = before[name] - after[name]
                torch.testing.assert_close(moved, gradient, atol=2e-5 * norm, rtol=2e-3)
        finally:
            group.kill()

    run(check())


@pytest.mark.parametrize(
    ("update_on", "ranks", "stage"),
    [
        ("all", 1, 1),
        ("share", 2, 2),
        pytest.param("all", 3, 3, marks=pytest.mark.exhaustive),
        pytest.param("share", 3, 3, marks=pytest.mark.exhaustive),
    ],
)
def test_several_updates_of_one_step(
    run: Any, models: dict[str, Path], tmp_path: Path, update_on: Any, ranks: int, stage: int
) -> None:
    """Ratios are against the policy at the start of the step, not of the update.

    With three ranks some have nothing to do, and must keep the others company all the same.
    """
    # A coefficient so small that it does nothing but make the reference take part.
    algorithm = AlgorithmConfig(
        updates_per_step=2, update_on=update_on, clip_high=1.0, kl_coef=1e-9
    )

    async def check() -> None:
        spec = spec_for(
            models["llama-tied"], ranks, tmp_path, zero_stage=stage, micro_batch_tokens=40,
            warmup_steps=4, **GRADIENT_PROBE,
        )  # fmt: skip
        group = await start(replace(spec, algorithm=algorithm))
        try:
            groups = batch()
            before = await weights(group)
            result = await group.step([put(g) for g in groups])
            after = await weights(group)
            assert (result.updates, result.version, result.trained) == (2, 1, 8)
            assert result.learning_rate == pytest.approx(1e4 * 2 / 4)
            policy, old = (
                AutoModelForCausalLM.from_pretrained(models["llama-tied"], dtype=torch.float32)
                for _ in range(2)
            )
            shares = [groups, groups] if update_on == "all" else [[groups[0]], [groups[2]]]
            losses = []
            for number, share in enumerate(shares, 1):
                policy.zero_grad()
                loss = reference_loss(
                    policy.eval(), share, temperature=TEMPERATURE, algorithm=algorithm,
                    old=old.eval(),
                )  # fmt: skip
                loss.backward()
                losses.append(float(loss))
                with torch.no_grad():
                    for parameter in policy.parameters():
                        parameter -= parameter.grad * number / 4
            assert result.loss == pytest.approx(sum(losses) / 2, rel=1e-4, abs=1e-5)
            for name, parameter in policy.named_parameters():
                moved = before[name] - parameter.detach()
                torch.testing.assert_close(
                    before[name] - after[name], moved, atol=1e-4 * float(moved.norm()), rtol=5e-3
                )
        finally:
            group.kill()

    run(check())


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [0, 3])
def test_reference_is_the_original_or_its_last_refresh(
    run: Any, models: dict[str, Path], tmp_path: Path, stage: int
) -> None:
    """Over a resume too, where the policy has long moved on; another model is refused."""
    learner = dict(zero_stage=stage, learning_rate=3e-3)

    async def check() -> None:
        spec = replace(
            spec_for(models["llama-tied"], 2 if stage else 1, tmp_path / "a", **learner),
            algorithm=AlgorithmConfig(kl_coef=0.1, reference_refresh_steps=3),
        )
        groups = [put(g) for g in batch()]
        group = await start(spec)
        kl = []
        try:
            for _ in range(5):
                kl.append((await group.step(groups)).reference_kl)
                if len(kl) in (2, 4):
                    (tmp_path / str(len(kl))).mkdir()
                    await group.save(tmp_path / str(len(kl)))
        finally:
            group.kill()
        # The policy leaves its reference, and begins anew after the third step.
        assert kl[0] == pytest.approx(0.0, abs=1e-9)
        assert kl[3] == pytest.approx(0.0, abs=1e-9)
        assert kl[2] > kl[1] > 1e-6
        assert kl[4] > 1e-6
        again = await start(replace(spec, shm_dir=str(tmp_path / "b")))
        try:
            for done in (2, 4):
                await again.load(tmp_path / str(done))
                assert (await again.step(groups)).reference_kl == kl[done]
        finally:
            again.kill()
        other = await start(
            replace(spec, model_path=str(models["llama-other"]), shm_dir=str(tmp_path / "c"))
        )
        try:
            with pytest.raises(LearnerError, match=r"another reference .* model\.path"):
                await other.load(tmp_path / "2")
        finally:
            other.kill()

    run(check())


@pytest.mark.exhaustive
@pytest.mark.parametrize("keys", [{}, {"preset": "rloo"}, {"drop_zero_variance": False}], ids=str)
def test_kl_in_the_reward(
    run: Any, models: dict[str, Path], tmp_path: Path, keys: dict[str, Any]
) -> None:
    """k1 of the engine's log-probs, summed over a completion, comes off its reward.

    Group b has equal rewards: no KL makes it worth training. Where such groups are kept, the KL
    pulls on them by its own size.
    """
    algorithm = AlgorithmConfig(**keys, kl_coef=0.3, kl_in="reward", kl_estimator="k1")
    assert algorithm.contradictions() == []

    async def check() -> None:
        spec = spec_for(models["llama-tied"], 2, tmp_path, zero_stage=1, **GRADIENT_PROBE)
        group = await start(replace(spec, algorithm=algorithm))
        try:
            groups = batch()
            result = await group.step([put(g) for g in groups])
        finally:
            group.kill()
        model = AutoModelForCausalLM.from_pretrained(models["llama-tied"]).eval()
        kl = {}
        for scored in groups:
            for completion in scored.group.completions:
                with torch.no_grad():
                    base = reference_logprobs(
                        model, scored.group.prompt.token_ids, completion.token_ids, TEMPERATURE
                    )
                kl[completion.id] = float((torch.from_numpy(completion.logprobs) - base).sum())
        loss, _, norm = gradients(models["llama-tied"], groups, algorithm, kl=kl)
        assert result.loss == pytest.approx(loss, rel=1e-4, abs=1e-5)
        assert result.grad_norm == pytest.approx(norm, rel=1e-3)
        assert result.filtered == (0 if keys.get("drop_zero_variance") is False else 3)
        tokens = sum(len(c.token_ids) for g in groups for c in g.group.completions)
        assert result.reference_kl == pytest.approx(sum(kl.values()) / tokens, rel=1e-3)

    run(check())


@pytest.fixture(
    scope="module",
    params=[
        (1, 0, "float32", "qwen2-untied"),
        (2, 1, "bfloat16", "llama-tied"),
        *(
            pytest.param(shape, marks=pytest.mark.exhaustive)
            for shape in [
                (1, 0, "bfloat16", "llama-tied"),
                (1, 1, "float16", "llama-tied"),
                (2, 2, "float32", "gpt2"),
                (2, 3, "bfloat16", "llama-tied"),
                (2, 3, "float16", "llama-tied"),
            ]
        ),
    ],
    ids=lambda p: f"{p[0]}rank-zero{p[1]}-{p[2]}-{p[3]}",
)
def learner(
    request: Any, run: Any, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Learner]:
    """A learner at work; `at_start` brings it back to its first state."""
    ranks, stage, dtype, kind = request.param
    shm = tmp_path_factory.mktemp("shm")
    spec = spec_for(models[kind], ranks, shm, zero_stage=stage, dtype=dtype, **SMALL)
    group = run(start(spec))
    folder = shm / "start"
    folder.mkdir()
    run(group.save(folder))
    yield group
    group.kill()


class Float16Anywhere(Changeable):
    """A rank that trains in float16 on CPUs without float16 instructions too: right, but slow."""

    def setup(self, address: str, port: int, timeout_s: float) -> ModelFacts:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
        return super().setup(address, port, timeout_s)


SMALL = dict(learning_rate=3e-5, warmup_steps=4, gradient_clip=0.5, micro_batch_tokens=64)


async def at_start(group: Learner) -> dict[str, torch.Tensor]:
    await group.load(Path(group.spec.shm_dir) / "start")
    return await weights(group)


def published(model: Any) -> dict[str, torch.Tensor]:
    """What is published of a model: all its tensors, a tied output layer only once."""
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: t.view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def test_publish_holds_the_model(run: Any, learner: Learner) -> None:
    found = run(at_start(learner))
    dtype = getattr(torch, learner.spec.dtype)
    model = AutoModelForCausalLM.from_pretrained(learner.spec.model_path, dtype=dtype)
    expected = published(model)
    assert bits(found) == bits(expected)
    first = run(learner.publish())
    assert first.version == 0
    assert first.names == tuple(expected)


def test_probe_equals_transformers(run: Any, learner: Learner) -> None:
    run(at_start(learner))
    dtype = getattr(torch, learner.spec.dtype)
    model = AutoModelForCausalLM.from_pretrained(learner.spec.model_path, dtype=dtype).eval()
    ids = np.random.default_rng(0).integers(0, 60, 40)
    expected = reference_logprobs(model, (int(ids[0]),), ids[1:], 1.0)
    found = torch.tensor(run(learner.logprobs([int(i) for i in ids])))
    atol = 1e-4 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_versions_and_learning_rate(run: Any, learner: Learner) -> None:
    """The version counts applied steps; the last two published files stay."""
    run(at_start(learner))
    groups = [put(g) for g in batch()]
    for number in (1, 2, 3):
        result = run(learner.step(groups))
        assert result.version == number
        assert result.learning_rate == pytest.approx(3e-5 * number / 4)
        assert run(learner.publish()).version == number
    kept = sorted(path.name for path in Path(learner.spec.shm_dir).glob("*.safetensors"))
    assert kept == ["v2.safetensors", "v3.safetensors"]
    assert result.k3_kl >= 0
    assert 0 < result.entropy < math.log(67)


def test_precision_of_a_step(run: Any, learner: Learner) -> None:
    """bfloat16 keeps the gradient to a few percent, float16 to one, float32 to rounding."""
    run(at_start(learner))
    groups = batch()
    dtype = getattr(torch, learner.spec.dtype)
    model = AutoModelForCausalLM.from_pretrained(learner.spec.model_path, dtype=dtype).float()
    loss = reference_loss(model.eval(), groups, temperature=TEMPERATURE)
    loss.backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
    result = run(learner.step([put(g) for g in groups]))
    tolerance = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.1}[dtype]
    assert result.grad_norm == pytest.approx(norm, rel=tolerance)
    assert result.loss == pytest.approx(loss.item(), abs=tolerance)


def test_a_loss_scale_that_is_too_large_loses_no_step(run: Any, learner: Learner) -> None:
    """Gradients that overflow float16 are computed again at half the scale, until they fit."""
    if learner.spec.dtype != "float16":
        pytest.skip("only float16 scales its loss")

    async def check() -> None:
        await at_start(learner)
        first = await learner.step([put(g) for g in batch()])
        assert (first.applied, first.nonfinite_in_a_row) == (True, 0)
        large = [
            replace(g, totals=tuple(None if t is None else t * 1e3 for t in g.totals))
            for g in batch()
        ]
        await use(learner, AlgorithmConfig(scale="none"))
        result = await learner.step([put(g) for g in large])
        await use(learner, AlgorithmConfig())
        assert (result.applied, result.version) == (True, 2)
        assert result.loss_scale < first.loss_scale
        assert 100 < result.grad_norm < math.inf

    run(check())


def test_no_group_left_is_not_a_step(run: Any, learner: Learner) -> None:
    before = run(at_start(learner))
    result = run(learner.step([put(scored_group("b", [0.1] * 8, [4] * 8))]))
    assert (result.applied, result.version, result.filtered, result.tokens) == (False, 0, 8, 0)
    assert bits(run(weights(learner))) == bits(before)


def test_resume_is_exact(run: Any, learner: Learner, tmp_path: Path) -> None:
    """Two steps in a row equal one step, a checkpoint, new actors, and one more."""

    async def check() -> None:
        await at_start(learner)
        groups = [put(g) for g in batch()]
        checkpoints = Checkpoints(tmp_path, keep=1)
        await learner.step(groups)
        middle = await weights(learner)
        await learner.save(checkpoints.begin(1))
        saved = checkpoints.commit(1, {"step": 1})
        second = await learner.step(groups)
        straight = await weights(learner)
        assert bits(straight) != bits(middle)

        assert checkpoints.latest() == saved
        assert load_state(saved) == {"step": 1}
        model = AutoModelForCausalLM.from_pretrained(saved / "hf", dtype="auto")
        assert bits(published(model)) == bits(middle)

        shm = tmp_path / "shm"
        other = await start(replace(learner.spec, shm_dir=str(shm)))
        try:
            assert await other.load(saved) == 1
            assert bits(await weights(other)) == bits(middle)
            again = await other.step(groups)
            assert bits(await weights(other)) == bits(straight)
            assert replace(again, seconds=0) == replace(second, seconds=0)
        finally:
            other.kill()

    run(check())


def test_a_checkpoint_with_a_program_is_refused(run: Any, learner: Learner, tmp_path: Path) -> None:
    """A pickle that makes a file, in place of DeepSpeed's own: refused, and not run."""
    run(at_start(learner))
    shutil.copytree(Path(learner.spec.shm_dir) / "start", tmp_path / "start")
    for file in (tmp_path / "start").rglob("*.pt"):
        torch.save({"module": Planted(tmp_path / "ran")}, file)
    with pytest.raises(LearnerError, match=r"more than tensors and plain values \(posix\.system\)"):
        run(learner.load(tmp_path / "start"))
    assert not (tmp_path / "ran").exists()


class Planted:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_another_precision_is_refused_before_loading(run: Any, learner: Learner) -> None:
    spec = learner.spec
    learner.spec = replace(spec, dtype="bfloat16" if spec.dtype == "float32" else "float32")
    try:
        with pytest.raises(LearnerError, match=r"model\.dtype"):
            run(learner.load(Path(spec.shm_dir) / "start"))
    finally:
        learner.spec = spec


def test_steps_below_bfloat16_resolution_add_up(run: Any, learner: Learner) -> None:
    """Weights of 0.3 are 0.002 apart in bfloat16; 60 steps of 3e-5 must still move them."""
    before = run(at_start(learner))
    groups = [put(g) for g in batch()]

    async def train() -> dict[str, torch.Tensor]:
        for _ in range(60):
            await learner.step(groups)
        return await weights(learner)

    after = run(train())
    large = torch.cat([t[(t.abs() > 0.25) & (t.abs() < 0.5)].flatten() for t in before.values()])
    changed = torch.cat(
        [(after[n] != t)[(t.abs() > 0.25) & (t.abs() < 0.5)].flatten() for n, t in before.items()]
    )
    assert len(large) > 1000
    assert float(changed.float().mean()) > 0.3


def test_non_finite_step_is_left_out(run: Any, learner: Learner, tmp_path: Path) -> None:
    async def check() -> None:
        await at_start(learner)
        good = [put(g) for g in batch()]
        await learner.step(good)
        before = await weights(learner)
        broken = batch()
        # In one completion, so that with two ranks only one of them sees it.
        broken[0].group.completions[0].logprobs[1] = float("nan")
        bad = [put(g) for g in broken]
        for count in (1, 2):
            result = await learner.step(bad)
            assert (result.applied, result.version) == (False, 1)
            assert result.nonfinite_in_a_row == count
            assert not math.isfinite(result.loss)
            assert bits(await weights(learner)) == bits(before)
        with pytest.raises(LearnerError, match="not finite"):
            await learner.save(tmp_path)
        # Nothing of the broken steps is left in gradients, optimizer or schedule.
        result = await learner.step(good)
        after = await weights(learner)
        await at_start(learner)
        await learner.step(good)
        clean = await learner.step(good)
        never_broken = await weights(learner)
        # A broken step halves float16's loss scale, and its smallest gradients round otherwise.
        scaled = learner.spec.dtype == "float16"
        assert result.grad_norm == pytest.approx(clean.grad_norm, rel=1e-5 if scaled else 0, abs=0)
        unlike = {"seconds": 0, "loss_scale": 1, "grad_norm": 0}
        assert replace(result, **unlike) == replace(clean, **unlike)
        if scaled:
            torch.testing.assert_close(never_broken, after, rtol=1e-3, atol=1e-5)
        else:
            assert bits(never_broken) == bits(after)
        for _ in range(2):
            await learner.step(bad)
        with pytest.raises(LearnerError, match="3 optimizer updates in a row"):
            await learner.step(bad)

    run(check())


@pytest.mark.parametrize(
    ("ranks", "stage", "recipe"),
    [(1, 1, "rowwise"), pytest.param(2, 3, "tensorwise", marks=pytest.mark.exhaustive)],
)
def test_float8_gradients_equal_those_of_one_process(
    run: Any, models: dict[str, Path], tmp_path: Path, ranks: int, stage: int, recipe: Any
) -> None:
    async def check() -> None:
        spec = spec_for(
            models["llama-tied"], ranks, tmp_path, zero_stage=stage, float8=recipe,
            micro_batch_tokens=60, **GRADIENT_PROBE,
        )  # fmt: skip
        group = await start(spec)
        try:
            groups = batch()
            refs = [put(g) for g in groups]
            before = await weights(group)
            shards = group.plan(refs).updates[0]
            result = await group.step(refs)
            after = await weights(group)
        finally:
            group.kill()
        model = AutoModelForCausalLM.from_pretrained(models["llama-tied"], dtype=torch.float32)
        convert(model, recipe, torch.device("cpu"))
        policy = PolicyModel(model)
        # Scales are those of a micro-batch, so these are the ranks' own.
        for micro_batch in (micro_batch for shard in shards for micro_batch in shard):
            tensors = build_micro_batch(micro_batch, {g.group.id: g for g in groups})
            now, _ = policy(tensors, TEMPERATURE)
            loss, _ = policy_loss(tensors.loss_inputs(now), AlgorithmConfig())
            loss.backward()
        _, plain, norm = gradients(models["llama-tied"], groups, AlgorithmConfig())
        assert result.applied
        off = far = 0.0
        for name, parameter in model.named_parameters():
            moved = before[name] - after[name]
            off += float((moved - parameter.grad).square().sum())
            far += float((moved - plain[name]).square().sum())
        # Threads add in another order, which now and then rounds to another float8.
        assert off**0.5 < 0.02 * norm
        assert far**0.5 > 0.05 * norm

    run(check())


def test_failure_names_rank_and_cause(run: Any, models: dict[str, Path], tmp_path: Path) -> None:
    missing = spec_for(tmp_path / "nowhere", 1, tmp_path)
    with pytest.raises(LearnerError, match=r"rank 0 failed loading the model.*nowhere"):
        run(start(missing))

    async def check() -> None:
        group = await start(spec_for(models["llama-tied"], 2, tmp_path))
        try:
            groups = batch()
            refs = [put(g) for g in groups]
            # The driver believes in more tokens than the group has.
            other = scored_group("c", list(groups[2].totals), [1, 2, 30, 4, 9], prompt_tokens=2)
            refs[2] = replace(refs[2], ref=ray.put(other))
            with pytest.raises(LearnerError, match=r"rank \d failed .* c/4: 9 tokens, 8 were"):
                await group.step(refs)
        finally:
            group.kill()

    run(check())
