"""AR-OPD steps on every layout against the plain-PyTorch oracle of tests/support/step_oracle.py.

A run on one rank comes first. The oracle trains on its rollouts, and the ranks of every other
layout must sample the same rollouts. `make test` runs layouts that cover every pair of sizes.
`make test-rest` runs every other case on one layout, and `make test-matrix` on all its layouts.

Tolerances. The oracle is fp64 and the run fp32, so losses, metrics and gradient norms differ by
fp32 rounding only. REPORTED is their relative tolerance. A weight's update is
lr * m / (sqrt(v) + eps), of the order of lr. eps is raised from 1e-8. Otherwise gradients that
consist of rounding errors would decide the sign of updates. UPDATE bounds the error of every weight
as a share of the largest learning rate.
"""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from aropd_mcore.config import Config
from tests.support import oracles
from tests.support.pairwise import covering_rows
from tests.support.ranks import run_ranks
from tests.support.step_oracle import Method, Oracle, OracleStep, Sample
from tests.support.tiny_adapters import write_adapter
from tests.support.tiny_models import MOE_FAMILIES
from tests.support.tiny_runs import EOS_IDS, tiny_config, write_model, write_rows
from tests.support.tiny_tokenizer import TAGS, VOCAB_SIZE

if TYPE_CHECKING:
    from aropd_mcore.trainer.step import Run

REPORTED = 2e-5
UPDATE = 5e-3
LR = 1e-3
NUM_LOGGED = 3
"""Number of samples whose means are compared. On four data-parallel ranks they belong to two."""


class Layout(NamedTuple):
    """Parallel sizes on 4 ranks. The remaining ranks are data-parallel."""

    tensor: int
    pipeline: int
    sequence: bool = False
    context: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    layers_in_first_stage: int | None = None
    layers_in_last_stage: int | None = None
    pipeline_layout: str | None = None

    @property
    def replica_size(self) -> int:
        return self.tensor * self.pipeline * self.context


def every_layout(*, experts: bool) -> list[Layout]:
    """List every layout of 4 ranks that the model of four layers allows: with and without SP, 1F1B
    and interleaved. Experts on tensor ranks require SP."""
    layouts = []
    for tensor, pipeline, context in product((1, 2, 4), repeat=3):
        if 4 % (tensor * pipeline * context):
            continue
        for sequence, virtual_pipeline, expert in product((False, True), (1, 2), (1, 2, 4)):
            possible = (
                (tensor > 1 or not sequence)
                and (pipeline == 2 or virtual_pipeline == 1)
                and (experts or expert == 1)
                and (sequence or tensor == 1 or not experts)
                and 4 // pipeline % expert == 0
            )
            if possible:
                layouts.append(
                    Layout(tensor, pipeline, sequence, context, virtual_pipeline, expert)
                )
    return layouts


ONE = Layout(1, 1)
UNEVEN = [
    Layout(1, 2, layers_in_first_stage=3),
    Layout(2, 2, sequence=True, layers_in_last_stage=1),
    # Chunks of 2 and 1 layers on the first stage, of 0 and 1 on the second, with a layout that
    # Megatron's other settings cannot express.
    Layout(1, 2, virtual_pipeline=2, pipeline_layout="Ett|t|t|L"),
    # The first stage has the embedding only, the last one the head.
    Layout(1, 4, pipeline_layout="E|t*3|t|L"),
]
LAYOUTS = [Layout(*sizes) for sizes in ((4, 1), (2, 2), (1, 4), (2, 1), (1, 2), (1, 1))]


@dataclass(frozen=True)
class Case:
    """A run, and the number of its steps to compare."""

    name: str
    sections: dict[str, dict[str, Any]]
    family: str = "qwen2"
    tie: bool = False
    thinks: bool = False
    num_steps: int = 1
    num_microbatches: int = 1
    """Number of microbatches per step, on each data-parallel rank."""
    global_batch_size: int = 8
    eos_ids: tuple[int, ...] = tuple(EOS_IDS)
    layouts: list[Layout] = field(default_factory=lambda: LAYOUTS)
    teacher: tuple[str, dict[str, Any]] | None = None
    """Family and settings of a teacher of kind `model`."""
    teachers: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    """Families and settings of several teachers."""
    teacher_layouts: dict[str, Layout] = field(default_factory=dict)
    """Layouts of teachers on the 4 ranks, by name. Others have the student's."""
    model_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the student's model."""
    targets: tuple[str, ...] = ()
    """Targets of the adapter that is trained. Empty: all weights are trained."""
    groups: tuple[tuple[int, ...], ...] = ()
    """Samples of each microbatch, the same in every layout. Only for routers with losses."""

    def config(self, root: Path, layout: Layout, dp_size: int) -> Config:
        """Build the configuration of the run. `root` contains the models and the rows."""
        defaults = {
            "parallel": layout._asdict(),
            "optimizer": {"lr": LR, "eps": 1e-4, "weight_decay": 0.1},
            "logging": {"samples": NUM_LOGGED},
        }
        defaults["training"] = {
            "num_steps": max(4, self.num_steps),
            "global_batch_size": self.global_batch_size,
            "micro_batch_size": self.global_batch_size // (dp_size * self.num_microbatches),
        }
        if self.teacher:
            defaults["teacher"] = {"kind": "model", "path": str(self.teacher_model(root))}
        if self.teachers:
            defaults["teachers"] = {
                name: {"path": str(self.teacher_model(root, name)), "weights": place}
                for name, place in zip(self.teachers, ("host", "device"), strict=True)
            }
        if dp_size * layout.replica_size == 4:
            for name, own in self.teacher_layouts.items():
                settings = {k: v for k, v in own._asdict().items() if k != "context"}
                section = defaults["teachers"][name] if name else defaults["teacher"]
                section["parallel"] = settings
        if self.targets:
            defaults["adapter"] = {
                "rank": 4,
                "alpha": 8.0,
                "targets": list(self.targets),
                "path": str(self.adapter(root)),
            }
        sections = self.sections | {
            name: values | self.sections.get(name, {}) for name, values in defaults.items()
        }
        rows = root / ("rows-of-teachers.jsonl" if self.teachers else "rows.jsonl")
        tree = tiny_config(self.model(root), rows, root / "out", **sections)
        return Config.model_validate(tree)

    def adapter(self, root: Path) -> Path:
        return root / f"adapter-of-{self.name}"

    def teacher_model(self, root: Path, name: str = "") -> Path:
        return root / f"teacher{name}-of-{self.name}"

    def teacher_models(self, root: Path) -> dict[str, Path]:
        names = self.teachers or ([""] if self.teacher else [])
        return {name: self.teacher_model(root, name) for name in names}

    def model(self, root: Path) -> Path:
        kind = ("-tied" if self.tie else "-untied") + "-thinks" * self.thinks
        kind += f"-{self.name}" if self.model_settings else ""
        return root / f"{self.family}{kind}-{len(self.eos_ids)}-eos"

    def write_model(self, root: Path) -> None:
        if not self.model(root).exists():
            write_model(
                self.model(root),
                self.family,
                tie=self.tie,
                thinks=self.thinks,
                eos_token_id=list(self.eos_ids),
                initializer_range=0.15,
                **self.model_settings,
            )
        teachers = {"": self.teacher} if self.teacher else self.teachers
        for seed, (name, (family, sizes)) in enumerate(teachers.items(), start=2):
            folder = self.teacher_model(root, name)
            write_model(folder, family, initializer_range=0.15, seed=seed, **sizes)
        if self.targets:
            write_adapter(self.adapter(root), self.model(root), targets=self.targets)


LARGER = {
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "head_dim": 16,
}
"""Sizes of a teacher that differ from those of every student."""
ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")
PACKED = {"packing": True, "max_tokens_per_microbatch": 240}
ROUTERS = {"router_aux_loss_coeff": 0.5, "router_z_loss_coeff": 0.05}
AROPD = {"residual_clip": 0.5, "hindsight_gap": 0.5, "hindsight_floor": 0.2}
CASES = [
    Case(
        # Every part with state: Adam, the schedule with its warm-up, the moving average.
        "ema",
        {"objective": AROPD, "optimizer": {"warmup_ratio": 0.25}},
        num_steps=3,
        num_microbatches=2,
        layouts=every_layout(experts=False),
    ),
    Case(
        # Tied: the embedding is on the first stage and on the last one.
        "uneven",
        {"objective": AROPD, "optimizer": {"warmup_ratio": 0.25}},
        tie=True,
        num_steps=2,
        num_microbatches=2,
        layouts=UNEVEN,
    ),
    Case(
        # Each stage has other experts' layers; packing gives every microbatch another length.
        "uneven-experts",
        {"objective": AROPD, "training": PACKED},
        family="qwen3_moe",
        layouts=[
            Layout(1, 2, expert=2, layers_in_first_stage=1),
            Layout(1, 2, virtual_pipeline=2, expert=2, pipeline_layout="Et|tt|t|L"),
        ],
    ),
    Case(
        "live",
        {
            "objective": AROPD
            | {"residual_scale": 1.4, "reduction": "token_mean", "divergence": "jsd"},
            "teacher": {"kind": "live"},
            "rollout": {"rollouts_per_prompt": 2},
            "training": {"recompute": "full"},
        },
        tie=True,
        num_microbatches=2,
        layouts=[
            *LAYOUTS,
            Layout(2, 2, sequence=True),
            Layout(1, 2, context=2),
            Layout(2, 2, sequence=True, virtual_pipeline=2),
        ],
    ),
    Case(
        "frozen",
        {
            "objective": AROPD | {"divergence": "kl_student_target", "skip_response_tokens": 5},
            "teacher": {"kind": "frozen"},
            "optimizer": {"clip_grad": 0.0},
            "training": {"recompute": "selective"},
        },
        family="qwen3",
        num_microbatches=4,
        global_batch_size=16,
        layouts=[*LAYOUTS, Layout(2, 1, sequence=True), Layout(1, 1, context=2)],
    ),
    Case(
        "sft",
        {"objective": {"name": "sft", "reduction": "token_mean"}},
        family="llama",
        tie=True,
        num_microbatches=4,
        global_batch_size=16,
    ),
    Case(
        "experts",
        {"objective": AROPD, "parallel": {"overlap_grad_reduce": True}},
        family="qwen3_moe",
        num_steps=3,
        num_microbatches=2,
        layouts=[
            Layout(1, 2),
            ONE,
            Layout(2, 1, sequence=True),
            Layout(2, 2, sequence=True),
            Layout(1, 1, context=2),
            Layout(1, 1, expert=4),
            Layout(1, 2, virtual_pipeline=2, expert=2),
            Layout(2, 1, sequence=True, expert=2),
            Layout(2, 1, sequence=True, expert=4),
            Layout(1, 1, context=2, expert=2),
            Layout(2, 1, sequence=True, expert_tensor=2),
            Layout(2, 1, sequence=True, expert=2, expert_tensor=2),
            Layout(4, 1, sequence=True, expert_tensor=2),
            Layout(1, 1, expert=2, expert_tensor=2),
            Layout(1, 2, virtual_pipeline=2, expert_tensor=2),
        ],
    ),
    Case(
        # Overlap starts in the second step. In the first, Megatron records the gradients' order.
        "overlap",
        {
            "objective": AROPD | {"metrics": False},
            "parallel": {"overlap_grad_reduce": True},
            "teacher": {"weights": "host", "hidden_states": "host"},
        },
        tie=True,
        num_steps=2,
        num_microbatches=2,
        layouts=[
            Layout(2, 1, sequence=True),
            Layout(1, 2),
            ONE,
            Layout(1, 2, virtual_pipeline=2),
        ],
    ),
    Case(
        "packed",
        {"objective": AROPD, "training": PACKED | {"recompute": "full"}},
        family="qwen3",
        num_steps=3,
        layouts=[
            ONE,
            Layout(4, 1),
            Layout(1, 4),
            Layout(2, 2, sequence=True),
            Layout(1, 2, virtual_pipeline=2),
            Layout(1, 2, context=2, virtual_pipeline=2),
            Layout(1, 1, context=4),
            Layout(2, 1, sequence=True, context=2),
        ],
    ),
    Case(
        # YaRN, and a window that is shorter than the prompts in all layers but the first.
        "windows",
        {"objective": AROPD, "training": PACKED},
        family="qwen2_yarn",
        num_steps=2,
        layouts=[Layout(2, 2, sequence=True), Layout(1, 2, virtual_pipeline=2), Layout(2, 1)],
    ),
    Case(
        "packed-experts",
        {
            "objective": AROPD | {"reduction": "token_mean"},
            "training": PACKED | {"recompute": "selective"},
        },
        family="mixtral",
        num_steps=3,
        layouts=every_layout(experts=True),
    ),
    Case(
        # Shared experts, a sigmoid router with a bias, a dense layer, partial rotation.
        "glm",
        {"objective": AROPD, "training": PACKED},
        family="glm4_moe",
        num_steps=2,
        layouts=[
            Layout(2, 1, sequence=True, expert=2),
            Layout(1, 2, virtual_pipeline=2, expert=2),
            Layout(1, 2, context=2),
        ],
    ),
    Case(
        # Sinks of attention, windows in every second layer, experts with biases.
        "sinks",
        {"objective": AROPD, "training": PACKED},
        family="gpt_oss",
        num_steps=2,
        layouts=[
            Layout(2, 1, sequence=True, expert=2),
            Layout(1, 2, context=2, expert=2),
            Layout(1, 2, virtual_pipeline=2),
        ],
    ),
    Case(
        # Latent attention, YaRN, groups of experts ranked by two of them.
        "latent",
        {"objective": AROPD, "training": PACKED},
        family="deepseek_v3",
        num_steps=2,
        layouts=[
            Layout(2, 1, sequence=True, expert=2),
            Layout(1, 2, virtual_pipeline=2, expert=2),
            Layout(1, 2, context=2),
            Layout(2, 1, sequence=True, context=2),
        ],
    ),
    Case(
        # Queries from the hidden state, and samples that are padded.
        "latent-keys-only",
        {"objective": AROPD, "training": {"recompute": "selective"}},
        family="deepseek_v2_lite",
        num_microbatches=2,
        layouts=[Layout(2, 2, sequence=True), Layout(1, 1, context=2, expert=2)],
    ),
    Case(
        # Groups of experts ranked by their best one.
        "group-limited",
        {"objective": AROPD, "training": {"recompute": "full"}},
        family="deepseek_v2",
        num_microbatches=2,
        layouts=[Layout(2, 1, sequence=True, expert=2)],
    ),
    Case(
        "glm-latent",
        {"objective": AROPD, "training": PACKED},
        family="glm4_moe_lite",
        layouts=[Layout(2, 1, sequence=True, expert=4)],
    ),
    Case(
        "shared-experts",
        # With the other cases' clip, one token's residual is at the clip within fp32 rounding.
        {
            "objective": AROPD | ROUTERS | {"residual_clip": 0.3},
            "training": {"micro_batch_size": 1},
        },
        family="qwen2_moe",
        num_steps=2,
        groups=tuple((sample,) for sample in range(8)),
        layouts=[Layout(2, 1, sequence=True, expert=2), Layout(1, 2, context=2)],
    ),
    Case(
        # Norms over all heads, which tensor ranks divide.
        "whole-norms",
        {"objective": AROPD},
        family="olmoe",
        num_steps=2,
        num_microbatches=2,
        layouts=[Layout(4, 1, sequence=True, expert=2), Layout(2, 1, sequence=True)],
    ),
    Case(
        # Pairs of samples of different lengths, so there is padding.
        "routers",
        {
            "objective": AROPD | ROUTERS,
            "training": {"micro_batch_size": 2, "recompute": "full"},
        },
        family="qwen3_moe",
        num_steps=2,
        groups=((0, 1), (2, 3), (4, 5), (6, 7)),
        layouts=[
            ONE,
            Layout(2, 1, sequence=True),
            Layout(4, 1, sequence=True, expert=2),
            Layout(2, 2, sequence=True, expert=2),
            Layout(1, 1, context=2, expert=4),
            Layout(1, 2, virtual_pipeline=2, expert=2),
            Layout(2, 1, sequence=True, context=2),
            Layout(1, 2, context=2),
        ],
    ),
    Case(
        # One sample per microbatch, since two do not fit. With interleaving, a rank has three
        # samples and a fourth microbatch with padding only.
        "packed-routers",
        {
            "objective": AROPD | ROUTERS | {"router_z_loss_coeff": 0.0},
            "training": PACKED | {"max_tokens_per_microbatch": 160},
            "views": {"teacher_template": "{question}\n" + 2 * "read this first " + "{trace}"},
        },
        family="mixtral",
        num_steps=2,
        global_batch_size=6,
        groups=((0,), (1,), (2,), (3,), (4,), (5,)),
        layouts=[
            Layout(2, 1, sequence=True, expert=2),
            Layout(1, 2, virtual_pipeline=2),
            Layout(1, 1, context=2, expert=4),
            Layout(2, 1, sequence=True, context=2, expert=2),
        ],
    ),
    Case(
        # All samples are in one microbatch, with padding between them in some layouts.
        "packed-sft-routers",
        {
            "objective": {"name": "sft"} | ROUTERS,
            "training": PACKED | {"max_tokens_per_microbatch": 1000},
        },
        family="qwen3_moe",
        groups=((0, 1, 2, 3, 4, 5, 6, 7),),
        layouts=[
            Layout(4, 1, sequence=True, expert=4),
            Layout(2, 2, sequence=True),
            Layout(1, 2, context=2),
            Layout(1, 1, context=4, expert=2),
            Layout(2, 1, sequence=True, context=2),
        ],
    ),
    Case(
        # Importance weights per sequence, whose tokens are divided over context ranks.
        "importance",
        {
            "objective": AROPD,
            "rollout": {"importance": "sequence", "importance_cap": 1.3},
            "training": PACKED,
        },
        num_steps=2,
        layouts=[
            Layout(1, 2, context=2),
            Layout(2, 1, sequence=True, context=2),
            Layout(1, 4),
            Layout(1, 1, context=4),
        ],
    ),
    Case(
        "importance-of-tokens",
        {
            "objective": AROPD | {"topk_overlap": False, "reduction": "token_mean"},
            "rollout": {"importance": "token"},
        },
        num_microbatches=2,
        layouts=[Layout(2, 2), Layout(1, 1, context=2)],
    ),
    Case(
        # The temperature applies to the loss only. Importance ratios are computed without it.
        "tempered",
        {
            "objective": AROPD
            | {
                "temper_logits": True,
                "reduction": "sequence_mean_all",
                "skip_response_tokens": 5,
                "residual_scale": 1.4,
            },
            "rollout": {"temperature": 1.7, "importance": "sequence", "importance_cap": 1.3},
        },
        tie=True,
        num_steps=2,
        num_microbatches=2,
        layouts=[Layout(2, 2), Layout(1, 2, context=2)],
    ),
    Case(
        "sft-prompt-loss",
        {"objective": {"name": "sft", "reduction": "token_mean", "sft_prompt_loss": True}},
        num_microbatches=2,
        layouts=[Layout(2, 1, context=2), Layout(1, 4)],
    ),
    Case(
        # An adapter of every linear layer, with a moving average of it as the teacher.
        "adapter",
        {"objective": AROPD, "training": {"recompute": "full"}},
        targets=(*ATTENTION_LAYERS, *MLP_LAYERS),
        num_steps=3,
        num_microbatches=2,
        layouts=[
            Layout(2, 2, sequence=True),
            Layout(4, 1),
            Layout(1, 2, context=2, virtual_pipeline=2),
        ],
    ),
    Case(
        # Experts with an adapter each: whole on every tensor rank, or divided over expert ranks.
        "adapter-of-experts",
        {"objective": AROPD, "training": PACKED, "teacher": {"kind": "frozen"}},
        family="qwen3_moe",
        targets=(*ATTENTION_LAYERS, *MLP_LAYERS),
        num_steps=2,
        layouts=[
            Layout(2, 1, sequence=True, expert=2),
            Layout(2, 2, sequence=True),
            Layout(1, 2, context=2, expert=2),
        ],
    ),
    Case(
        "adapter-of-shared-experts",
        {"objective": AROPD},
        family="qwen2_moe",
        targets=(*ATTENTION_LAYERS, *MLP_LAYERS),
        num_steps=2,
        layouts=[Layout(2, 1, sequence=True, expert=2)],
    ),
    Case(
        # Layers that Megatron joins, of which only some have an adapter.
        "adapter-of-some-layers",
        {"objective": AROPD, "teacher": {"kind": "live"}},
        tie=True,
        targets=("k_proj", "up_proj"),
        num_steps=2,
        num_microbatches=2,
        layouts=[Layout(2, 2)],
    ),
    Case(
        # The teacher reads one view.
        "partial-opd",
        {"objective": AROPD | {"residual_scale": 0.0, "metrics": False}},
        num_steps=2,
        num_microbatches=2,
        layouts=[Layout(2, 2), Layout(1, 4), Layout(1, 2, virtual_pipeline=2)],
    ),
    Case(
        "full-opd-one-view",
        {
            "objective": AROPD
            | {
                "residual_scale": 1.0,
                "residual_clip": None,
                "divergence": "jsd",
                "metrics": False,
            },
            "training": PACKED,
        },
        num_steps=2,
        layouts=[
            Layout(2, 1, sequence=True, context=2),
            Layout(1, 2, context=2, virtual_pipeline=2),
        ],
    ),
    Case(
        "thinking-span",
        {"objective": AROPD | {"loss_span": "thinking", "skip_response_tokens": 1}},
        thinks=True,
        num_microbatches=2,
        layouts=[Layout(2, 2), Layout(1, 1, context=2)],
    ),
    Case(
        "answer-span",
        {
            "objective": AROPD
            | {"loss_span": "answer", "skip_response_tokens": 1, "reduction": "token_mean"},
            "training": PACKED,
            "rollout": {"importance": "sequence", "importance_cap": 1.3},
        },
        family="qwen3",
        thinks=True,
        layouts=[Layout(1, 2, context=2), Layout(2, 1, sequence=True)],
    ),
    Case(
        # Another family, another width, depth and number of heads, and more rows of padding. Its
        # six layers need another split than the student's four.
        "teacher-model",
        {"objective": AROPD, "teacher": {"weights": "host", "hidden_states": "host"}},
        teacher=("qwen3", LARGER | {"vocab_size": VOCAB_SIZE + 150}),
        num_steps=2,
        num_microbatches=2,
        layouts=[
            Layout(4, 1, sequence=True),
            Layout(2, 2),
            Layout(1, 4),
            Layout(1, 2, context=2),
            Layout(2, 1, sequence=True, context=2),
            Layout(2, 2, sequence=True, virtual_pipeline=2),
            Layout(1, 2, layers_in_first_stage=3),
        ],
    ),
    Case(
        # A tied teacher with experts, on the expert ranks of a student without experts. The student
        # can sample ids that belong to no token and that the teacher does not embed.
        "teacher-with-experts",
        {"objective": AROPD | {"residual_scale": 1.4}, "training": PACKED | {"recompute": "full"}},
        teacher=("qwen3_moe", LARGER | {"tie": True}),
        model_settings={"vocab_size": VOCAB_SIZE + 60},
        num_steps=2,
        layouts=[
            Layout(2, 2, sequence=True),
            Layout(2, 1, sequence=True, expert=2),
            Layout(1, 2, context=2, expert=2),
        ],
    ),
    Case(
        # A dense teacher leaves the expert ranks of the student unused. Both views are the
        # student's prompt.
        "teacher-without-views",
        {
            "objective": AROPD | {"residual_scale": 0.0},
            "teacher": {"views": "none"},
        },
        family="qwen3_moe",
        teacher=("llama", LARGER),
        num_microbatches=2,
        layouts=[
            Layout(2, 1, sequence=True, expert=2),
            Layout(1, 2, expert=2, context=2),
        ],
    ),
    Case(
        # Two teachers of different sizes and families, which score 2:1 of the rows.
        "teachers",
        {"objective": AROPD},
        teachers={
            "math": ("qwen3", LARGER | {"vocab_size": VOCAB_SIZE + 150}),
            "code": ("llama", {}),
        },
        num_steps=2,
        num_microbatches=2,
        layouts=[
            Layout(2, 2),
            Layout(4, 1, sequence=True),
            Layout(1, 2, virtual_pipeline=2),
            Layout(1, 2, context=2),
        ],
    ),
    Case(
        # Replicas that share experts wait for each other in every pass of each teacher.
        "packed-teachers-with-experts",
        {
            "objective": AROPD | {"reduction": "token_mean"},
            "rollout": {"importance": "sequence", "importance_cap": 1.3},
            "training": PACKED,
        },
        family="qwen3_moe",
        teachers={"math": ("qwen3_moe", {}), "code": ("llama", LARGER)},
        num_steps=2,
        layouts=[
            Layout(1, 1, expert=4),
            Layout(2, 1, sequence=True, expert=2),
            Layout(1, 2, virtual_pipeline=2, expert=2),
        ],
    ),
    Case(
        # A replica of the teacher scores the views of several replicas of the student.
        "teacher-with-tensor-ranks",
        {"objective": AROPD, "teacher": {"weights": "host", "hidden_states": "host"}},
        teacher=("qwen3", LARGER | {"vocab_size": VOCAB_SIZE + 150}),
        teacher_layouts={"": Layout(4, 1, sequence=True)},
        num_steps=2,
        num_microbatches=2,
        layouts=[
            Layout(1, 1),
            Layout(2, 2),
            Layout(1, 2, context=2),
            Layout(1, 2, virtual_pipeline=2),
        ],
    ),
    Case(
        # The stages of the teacher cut across the tensor ranks of the student.
        "teacher-with-stages",
        {"objective": AROPD, "training": PACKED},
        teacher=("qwen3", LARGER | {"tie": True}),
        teacher_layouts={"": Layout(2, 2, layers_in_first_stage=4)},
        num_steps=2,
        layouts=[
            Layout(1, 1, context=4),
            Layout(4, 1, sequence=True),
            Layout(1, 1),
            Layout(1, 4),
        ],
    ),
    Case(
        # The teacher has more replicas than the student, and interleaved stages.
        "teacher-with-replicas",
        {"objective": AROPD, "training": PACKED | {"max_tokens_per_microbatch": 160}},
        teacher=("llama", LARGER | {"num_hidden_layers": 8}),
        teacher_layouts={"": Layout(1, 2, virtual_pipeline=2)},
        num_steps=2,
        layouts=[Layout(4, 1), Layout(2, 1), Layout(2, 1, context=2)],
    ),
    Case(
        # Experts on ranks of several replicas of a dense student.
        "teacher-with-expert-ranks",
        {"objective": AROPD | {"residual_scale": 0.0}, "teacher": {"views": "none"}},
        teacher=("qwen3_moe", LARGER),
        teacher_layouts={"": Layout(2, 1, sequence=True, expert=4)},
        num_microbatches=2,
        layouts=[Layout(1, 2), Layout(1, 1), Layout(1, 4)],
    ),
    Case(
        "teachers-with-layouts",
        {"objective": AROPD},
        family="qwen3_moe",
        teachers={"math": ("qwen3", LARGER), "code": ("qwen3_moe", {})},
        teacher_layouts={
            "math": Layout(2, 2),
            "code": Layout(1, 1, expert=2, expert_tensor=2),
        },
        num_steps=2,
        num_microbatches=2,
        layouts=[Layout(1, 2, expert=2), Layout(2, 1, sequence=True, expert=2)],
    ),
    Case(
        # Both spans, whose metrics are reported separately. With the other cases' clip, one token's
        # residual is at the clip within fp32 rounding.
        "thoughts",
        {"objective": AROPD | {"residual_clip": 0.3}},
        thinks=True,
        num_steps=2,
        num_microbatches=2,
        layouts=[Layout(1, 2, context=2)],
    ),
    Case(
        # The prompt opens no thought. The trace has the tags `<think>` and `</think>`.
        "sft-answer-span",
        {
            "objective": {"name": "sft", "loss_span": "answer", "skip_response_tokens": 1},
            "views": {"trace_template": "<think>{reasoning}</think>{answer}"},
            "rollout": {"max_response_tokens": 64},
        },
        num_microbatches=2,
        layouts=[Layout(2, 1, context=2)],
    ),
    Case(
        "full-opd",
        {
            "objective": AROPD
            | {"residual_scale": 1.0, "residual_clip": None, "topk_overlap": False}
        },
        global_batch_size=4,
        layouts=[Layout(2, 2)],
    ),
    Case(
        # Long enough for a second position bucket.
        "long",
        {"objective": AROPD, "rollout": {"max_response_tokens": 280}},
        global_batch_size=4,
        eos_ids=(EOS_IDS[0],),
        layouts=[ONE],
    ),
]
BY_NAME = {case.name: case for case in CASES}


def choose_first() -> list[tuple[str, Layout]]:
    """Choose the cases and layouts of `make test`: every pair of sizes, experts and packing."""
    runs = [(case, layout) for case in CASES for layout in case.layouts]
    rows = [
        layout._asdict()
        | {
            "experts": case.family in MOE_FAMILIES,
            "packing": case.sections.get("training", {}).get("packing", False),
        }
        for case, layout in runs
    ]
    chosen = covering_rows(rows, costs=[case.num_steps for case, _ in runs])
    return [(runs[i][0].name, runs[i][1]) for i in chosen]


FIRST = choose_first()


def marks(name: str, layout: Layout) -> list[pytest.MarkDecorator]:
    """Return the tier of a case on a layout. `make test-rest` runs every case on one layout."""
    if (name, layout) in FIRST:
        return []
    is_covered = name in dict(FIRST) or layout != BY_NAME[name].layouts[0]
    return [pytest.mark.matrix if is_covered else pytest.mark.rest]


@dataclass(frozen=True)
class RankSteps:
    """Results of a case on one rank."""

    dp_rank: int
    samples: list[list[Sample]]
    """Samples of this data-parallel rank, per step."""
    metrics: list[dict[str, Any]]
    sample_means: list[list[list[float]]]
    """Mean loss and mean residual of the first samples, per step."""
    student: dict[str, Tensor] | None
    """HF tensors after the last step. None except on the first rank of each model replica."""
    teacher: dict[str, Tensor] | None


Results = dict[tuple[str, Layout], RankSteps]


def take_steps(root: Path, cases: list[Case], layouts: list[Layout] | None) -> Results:
    """Run each case on each of its layouts, or on the given layouts. Called on every rank."""
    from aropd_mcore.mcore import runtime
    from aropd_mcore.trainer.build import start_runtime

    results = {}
    for case in cases:
        for layout in layouts or case.layouts:
            config = case.config(root, layout, dist.get_world_size() // layout.replica_size)
            results[case.name, layout] = run_steps(config, case, start_runtime(config))
            runtime.stop()
            gc.collect()  # models are in cycles and hold process groups with their threads
    return results


def run_steps(config: Config, case: Case, rt) -> RankSteps:
    from aropd_mcore.trainer.build import build_run

    run = build_run(config, rt)
    settings = run.student.model.config
    assert (settings.recompute_granularity or "none") == config.training.recompute
    overlaps = run.student.optimizer.ddp_chunks[0].ddp_config.overlap_grad_reduce
    assert overlaps == config.parallel.overlap_grad_reduce
    chunks = config.parallel.stages.chunk_layers(settings.num_layers)[rt.pp_rank :: rt.pp_size]
    assert [len(chunk.decoder.layers) for chunk in run.student.model] == list(chunks)
    if run.teacher:
        run.teacher.score = check_views(run.teacher.score, case)
    if config.rollout.importance_level:
        run.source.take = change_logprobs(run.source.take)
    return take(run, range(case.num_steps))


def take(run: "Run", steps: range) -> RankSteps:
    from aropd_mcore.numerics.sample_sums import sample_means
    from aropd_mcore.trainer.metrics import step_metrics
    from aropd_mcore.trainer.step import train_step

    rt = run.runtime
    samples, metrics, means = [], [], []
    for step in steps:
        result = train_step(run, step)
        assert result.update.applied
        samples.append(
            [
                Sample(
                    views.student_ids,
                    views.partial_ids,
                    views.full_ids,
                    rollout.response_ids,
                    views.row.sample_weight,
                    rollout.logprobs,
                    rollout.finished,
                    num_thinking_tokens(rollout.response_ids, run),
                    views.row.teacher,
                    views.row.domain,
                )
                for views, rollout in zip(result.views, result.rollouts, strict=True)
            ]
        )
        metrics.append(step_metrics(step, result, run.view_builder.tokenizer, rt))
        means.append(sample_means(result.sample_sums).tolist())
    return RankSteps(
        rt.dp_rank,
        samples,
        metrics,
        means,
        hf_tensors(run.student.model, rt),
        # A teacher in another layout has no head. Its weights do not change.
        hf_tensors_of_teacher(run) if run.teacher and not run.config.teacher.parallel else None,
    )


def hf_tensors_of_teacher(run: "Run") -> dict[str, Tensor] | None:
    assert run.teacher is not None
    with run.teacher.weights_on_device():
        return hf_tensors(run.teacher.model, run.runtime)


def num_thinking_tokens(ids: tuple[int, ...], run: "Run") -> int:
    """Return the number of tokens of the thinking span: all up to the first closing tag.

    A closing tag is one token of the models that think. Of the others, only traces have a tag.
    """
    if run.view_builder.tokenizer.get_added_vocab().keys() >= set(TAGS):
        return next((k + 1 for k, id in enumerate(ids) if id > VOCAB_SIZE), len(ids))
    opening, closing = (run.view_builder.text_ids(tag) for tag in ("<think>", "</think>"))
    if ids[: len(opening)] != opening:
        return 0
    ends = range(len(closing), len(ids) + 1)
    return next((end for end in ends if ids[end - len(closing) : end] == closing), len(ids))


def change_logprobs(take):
    """Wrap `take`: change the log-probs, as if another engine had sampled."""

    def take_with_other_logprobs(step, **options):
        taken = take(step, **options)
        rollouts = [
            replace(r, logprobs=tuple(p + 0.3 + math.sin(k) for k, p in enumerate(r.logprobs)))
            for r in taken.rollouts
        ]
        return replace(taken, rollouts=rollouts)

    return take_with_other_logprobs


def check_views(score, case: Case):
    """Wrap `score`: check that only views of the target or the metrics are rendered and scored."""
    read = {"partial-opd": {"partial"}, "full-opd-one-view": {"full"}}.get(
        case.name, {"partial", "full"}
    )

    def score_and_check(microbatches):
        outputs = score(microbatches)
        if case.name == "teacher-without-views":
            assert all(m.partial.tokens_BS.equal(m.student.tokens_BS) for m in microbatches)
        for microbatch, output in zip(microbatches, outputs, strict=True):
            for view in ("partial", "full"):
                assert (getattr(microbatch, view) is not None) == (view in read)
            if case.name == "teacher-without-views" and output is not None:
                assert output.partial_hidden_TH is output.full_hidden_TH, "the view is scored twice"
                if output is not None:
                    assert (getattr(output, f"{view}_hidden_TH") is not None) == (view in read)
        return outputs

    return score_and_check


def hf_tensors(model, rt) -> dict[str, Tensor] | None:
    from tests.support.gathered import iter_hf_tensors

    tensors = {
        name: tensor.clone() for name, tensor in iter_hf_tensors(model, rt) if tensor is not None
    }
    return tensors or None


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "rows-of-teachers.jsonl", ["math", "code"])
    for case in CASES:
        case.write_model(folder)
    return folder


@pytest.fixture(scope="module")
def selected(request) -> list[tuple[str, Layout]]:
    """Cases and layouts of the selected tests. No others are trained."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return [(call["name"], call["layout"]) for call in calls if {"name", "layout"} <= call.keys()]


class Lazy(dict):
    """Values by name, computed on first use."""

    def __init__(self, compute: Callable[[str], Any]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, name: str) -> Any:
        self[name] = self._compute(name)
        return self[name]


@pytest.fixture(scope="module")
def on_one_rank(root) -> dict[str, RankSteps]:
    def run(name: str) -> RankSteps:
        return run_ranks(take_steps, 1, root, [BY_NAME[name]], [ONE])[0][name, ONE]

    return Lazy(run)


@pytest.fixture(scope="module")
def oracle(root, on_one_rank) -> dict[str, list[OracleStep]]:
    return Lazy(lambda name: oracle_steps(root, BY_NAME[name], on_one_rank[name].samples))


def oracle_steps(root: Path, case: Case, samples: list[list[Sample]]) -> list[OracleStep]:
    """Run the oracle on the samples of each step; return its state after each step."""
    config = case.config(root, ONE, 1)
    objective, optimizer = config.objective, config.optimizer
    assert config.training.num_steps
    method = Method(
        num_steps=config.training.num_steps,
        sft=objective.name == "sft",
        scale=objective.residual_scale,
        clip=objective.residual_clip,
        divergence=objective.divergence,
        jsd_weight=objective.jsd_weight,
        reduction=objective.reduction,
        skip=objective.skip_response_tokens,
        span=objective.loss_span,
        gap=objective.hindsight_gap,
        floor=objective.hindsight_floor,
        teacher="model" if case.teachers else config.teacher.kind,
        ema_rate=config.teacher.ema_rate,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        warmup_ratio=optimizer.warmup_ratio,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.clip_grad,
        importance=config.rollout.importance_level,
        cap=config.rollout.importance_cap,
        router_aux=objective.router_aux_loss_coeff,
        router_z=objective.router_z_loss_coeff,
        temperature=config.rollout.temperature if objective.temper_logits else 1.0,
        sft_prompt_loss=objective.sft_prompt_loss,
        vocab_size=VOCAB_SIZE if case.teacher_models(root) else None,
        domains=("level 0", "level 1") if case.teachers else (),
    )
    adapter = case.adapter(root) if case.targets else None
    plain = Oracle(case.model(root), method, case.teacher_models(root), adapter)
    return [plain.step(step_samples, case.groups) for step_samples in samples]


@pytest.fixture(scope="module")
def on_four_ranks(root, selected) -> Callable[[str], list[Results]]:
    """Results of a case on its selected layouts, by rank. Computed on first use."""

    def run(name: str) -> list[Results]:
        layouts = [layout for case, layout in selected if case == name]
        return run_ranks(take_steps, 4, root, [BY_NAME[name]], layouts, timeout=400.0)

    return cache(run)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in dict(FIRST) else pytest.mark.rest) for name in BY_NAME],
)
def test_one_rank_equals_the_oracle(on_one_rank, oracle, name):
    check(name, on_one_rank[name], oracle[name])


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(case.name, layout, marks=marks(case.name, layout))
        for case in CASES
        for layout in case.layouts
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_four_ranks_equal_the_oracle(on_four_ranks, on_one_rank, oracle, name, layout):
    ranks = [results[name, layout] for results in on_four_ranks(name)]
    for rank in ranks:
        check(name, rank, oracle[name])
        share = len(on_one_rank[name].samples[0]) * layout.replica_size // 4
        own_samples = slice(rank.dp_rank * share, (rank.dp_rank + 1) * share)
        expected_samples = [step[own_samples] for step in on_one_rank[name].samples]
        assert without_logprobs(rank.samples) == without_logprobs(expected_samples)
    replicas = [rank for rank in ranks if rank.student is not None]
    # Each context rank has all weights. Tensor ranks, or ranks that share experts, split them.
    num_sharing = layout.expert * layout.expert_tensor
    num_holders = layout.pipeline * math.lcm(layout.tensor, num_sharing)
    assert len(replicas) == 4 // num_holders
    for replica in replicas[1:]:
        for name, tensor in replicas[0].student.items():
            assert torch.equal(replica.student[name], tensor), f"{name}: replicas drift apart"


def without_logprobs(steps: list[list[Sample]]) -> list[list[Sample]]:
    """Remove the log-probs, which are equal only up to rounding."""
    return [[replace(sample, engine_logprobs=()) for sample in step] for step in steps]


def check(case: str, rank: RankSteps, expected: list[OracleStep]) -> None:
    switched_off = NOT_REPORTED.get(case, ())
    for found, step in zip(rank.metrics, expected, strict=True):
        metrics = {
            name: value for name, value in step.metrics.items() if not name.startswith(switched_off)
        }
        for name, value in metrics.items():
            # The difference of two KLs, which can be near 0, and its ratio to a third.
            bound = 1e-6 if name in ("residual_uptake", "residual_capture_ratio") else 1e-7
            assert found.get(name) == pytest.approx(value, rel=REPORTED, abs=bound), name
        for name in found.keys() - metrics.keys():
            prefixes = ("response_", "thinking_", "answer_", "truncation_rate/", "seconds/")
            assert name.startswith(prefixes) or name in TESTED_ELSEWHERE, name
    for means, step in zip(rank.sample_means, expected, strict=True):
        for (loss, residual), (sample_loss, sample_residual) in zip(
            means, step.samples[:NUM_LOGGED], strict=True
        ):
            assert loss == pytest.approx(sample_loss, rel=REPORTED, abs=1e-7, nan_ok=True)
            if case in ONE_VIEW:
                sample_residual = math.nan
            assert residual == pytest.approx(sample_residual, abs=1e-5, nan_ok=True)
    check_weights(rank, expected[-1])


def check_weights(rank: RankSteps, expected: OracleStep | RankSteps) -> None:
    for found, weights in ((rank.student, expected.student), (rank.teacher, expected.teacher)):
        if found is None:
            continue
        assert weights is not None and found.keys() == weights.keys()
        for name, weight in weights.items():
            # The vocabulary of a teacher of kind `model` is cut or padded to the student's.
            rows = min(len(found[name]), len(weight))
            error = float((found[name][:rows] - weight[:rows]).abs().max())
            assert error <= UPDATE * LR, f"{name}: off by {error / LR:.2g} learning rates"


METRICS = ("kl_", "entropy_", "residual_", "clip_fraction", "topk_overlap")
ONE_VIEW = ("partial-opd", "full-opd-one-view")
TWO_VIEW_METRICS = ("hindsight_", "eos_prob_", "num_response_ends")
NOT_REPORTED = {
    "overlap": METRICS,
    "importance-of-tokens": ("topk_overlap",),
    "partial-opd": (*METRICS, *TWO_VIEW_METRICS),
    "full-opd-one-view": (*METRICS, *TWO_VIEW_METRICS),
    "full-opd": ("topk_overlap",),
    "packed-routers": ("router_z_loss",),
}
TESTED_ELSEWHERE = {
    "step",
    "step_skipped",
    "grad_norm_zscore",
    "length_ratio",
    "loss_zscore",
    "no_loss_tokens_rate",
    "num_cut_tokens",
    "num_length_collapses",
    "num_truncation_rises",
    "num_loss_spikes",
    "num_non_finite_steps",
    "num_steps_without_loss_tokens",
    "num_response_tokens",
    "padding_fraction",
    "premature_answer_rate",
    "rollout_staleness",
    "rollout_tokens_per_second",
    "tokens_per_second",
    "truncation_rate",
    "truncation_rise",
}


@pytest.mark.rest
def test_cases_cover_varied_lengths_metrics_and_updates(root, on_one_rank, oracle):
    """Responses have many lengths, some without loss tokens. Metrics and weights change."""
    lengths = {len(sample.response) for sample in on_one_rank["live"].samples[0]}
    assert len(lengths) > 3
    shortest = min(len(sample.response) for sample in on_one_rank["frozen"].samples[0])
    assert shortest <= BY_NAME["frozen"].sections["objective"]["skip_response_tokens"]
    assert len({sample.weight for sample in on_one_rank["live"].samples[0]}) > 2
    assert on_one_rank["routers"].metrics[0]["padding_fraction"] > 0.05
    first = oracle["ema"][0].metrics
    assert 0 < first["num_response_ends"] < len(on_one_rank["ema"].samples[0])
    assert len({first[f"eos_prob_{name}"] for name in oracles.DISTRIBUTIONS}) == 4
    for name in ("clip_fraction", "hindsight_token_rate", "topk_overlap"):
        assert 0.01 < first[name] < 0.99, name
    assert "hindsight_token_rate/256-511" in oracle["long"][0].metrics
    assert oracle["full-opd"][0].metrics["clip_fraction"] == 0
    assert {f"kl_full_partial/{span}" for span in ("thinking", "answer")} <= oracle["thoughts"][
        0
    ].metrics.keys()
    for name in ("thinking-span", "answer-span"):
        (samples,) = on_one_rank[name].samples
        assert len({len(s.response) - s.num_thinking for s in samples}) > 1
    start = load_file(BY_NAME["ema"].model(root) / "model.safetensors")
    for name, weight in oracle["ema"][-1].student.items():
        assert float((weight - start[name]).abs().max()) > 20 * UPDATE * LR, name
        moved = float((oracle["ema"][-1].teacher[name] - start[name]).abs().max())
        assert moved > 5 * UPDATE * LR, name
