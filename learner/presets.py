"""The presets of the `algorithm` section: published algorithms as values of its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Preset = Literal[
    "cohort", "grpo_paper", "r1", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "dppo_tv"
]
# Keys of a section and their values.
Keys = Mapping[str, object]

# A preset only sets keys; every key given in the config wins over it. What is not named keeps the
# default of `AlgorithmConfig`. docs/algorithms.md works each of them out in numbers.
PRESETS: dict[str, Keys] = {
    "cohort": {},
    # DeepSeekMath (arXiv 2402.03300): mean over completions of their token means, KL 0.04 to the
    # reference. The paper prints no clip range; 0.2 is PPO's. Nothing is filtered.
    "grpo_paper": {
        "aggregation": "sequence",
        "clip_high": 0.2,
        "dual_clip": None,
        "kl_coef": 0.04,
        "drop_zero_variance": False,
    },
    # DeepSeek-R1 (Nature s41586-025-09422-z). A clip range of 10 leaves negative advantages without
    # any bound: dual_clip is ours. Groups of 16: see SECTION_PRESETS.
    "r1": {
        "aggregation": "sequence",
        "clip_low": 10.0,
        "clip_high": 10.0,
        "dual_clip": 10.0,
        "kl_coef": 0.001,
        "reference_refresh_steps": 400,
        "drop_zero_variance": False,
    },
    # DAPO (arXiv 2503.14476).
    "dapo": {"dual_clip": None, "overlong_buffer": 0.2, "dynamic_sampling_rounds": 10},
    # Dr. GRPO (arXiv 2503.20783): no division by std, constant length normaliser, symmetric clip.
    "dr_grpo": {"scale": "none", "aggregation": "constant", "clip_high": 0.2, "dual_clip": None},
    # GSPO (arXiv 2507.18071): one ratio a sequence, and a clip range a thousand times narrower. The
    # mean is over all completions, so nothing is filtered. The paper has no weight for the engine's
    # mismatch; one for each token would mix levels.
    "gspo": {
        "ratio": "sequence",
        "aggregation": "sequence",
        "correction": "off",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "dual_clip": None,
        "drop_zero_variance": False,
    },
    # CISPO (arXiv 2506.13585) with the cap of 5 of ScaleRL (arXiv 2510.13786): clip_high = cap - 1.
    "cispo": {"objective": "cispo", "clip_high": 4.0, "dual_clip": None},
    # RLOO (arXiv 2402.14740): leave-one-out baseline, log-probs of whole completions. The constant
    # max_tokens that they are divided by is ours.
    "rloo": {
        "baseline": "leave_one_out",
        "scale": "none",
        "aggregation": "constant",
        "clip_high": 0.2,
        "dual_clip": None,
    },
    # DPPO with a total-variation bound (arXiv 2602.04879) around the engine's own probabilities.
    "dppo_tv": {
        "objective": "dppo_tv",
        "scale": "none",
        "anchor": "engine",
        "correction": "off",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
    },
}

# What a preset sets in other sections.
SECTION_PRESETS: dict[str, dict[str, Keys]] = {
    "r1": {"task": {"group_size": 16}, "learner": {"learning_rate": 3e-6}},
}
