"""`aropd diagnose`: sample responses to rows, score them under three views, write a diagnosis."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from rich.console import Console

from aropd_mcore.config import TeacherConfig, source_name
from aropd_mcore.convert.source import open_source
from aropd_mcore.data.collate import collate
from aropd_mcore.data.packing import Groups, consecutive
from aropd_mcore.data.prepare import write_atomically
from aropd_mcore.data.spans import find_thinking, loss_range
from aropd_mcore.data.tokenizer import eos_token_ids, load_tokenizer
from aropd_mcore.evaluation.diagnose.spec import DiagnosisSpec, ResponseKey
from aropd_mcore.evaluation.diagnose.summary import Scored, summarize
from aropd_mcore.evaluation.figures import describe_diagnosis, plot_diagnosis
from aropd_mcore.evaluation.predictors import predict
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.rank0 import run_on_rank0
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.scoring import Scores, score_responses
from aropd_mcore.mcore.teacher import Teacher
from aropd_mcore.plan.layout import describe
from aropd_mcore.rollout.engine import PromptBatch, RolloutEngine, rollout_seed
from aropd_mcore.rollout.engines import PROBE_TOKENS, generation_engine, load_generation_model
from aropd_mcore.rollout.lines_file import partial_folder
from aropd_mcore.types import Microbatch, Rollout, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_TOP = 5
"""Number of likeliest tokens of each distribution that the reader shows."""
_MICRO_BATCH_SIZE = 8
"""Number of responses that are scored together."""


def diagnose(request: DiagnosisSpec, runtime: Runtime) -> None:
    """Sample and score responses, and write the diagnosis to spec.output with plots next to it.

    Every response has the same seed as in `aropd generate`. The numbers do not depend on the
    layout, except for rounding.

    Raises:
        RolloutFailed: see RolloutEngine.
        ValueError: no response has a loss token. It is raised on every rank.
    Collectives: those of the engine and the models, and gathers over the job. Every rank must call.
    """
    spec = request.spec
    tokenizer = load_tokenizer(spec.source.hf_folder)
    console = Console(stderr=True, soft_wrap=True, highlight=False, quiet=runtime.rank != 0)
    console.print(_headline(request, runtime), markup=False)
    student = load_generation_model(spec, runtime)
    teacher = _teacher(request, runtime, student)
    scratch = partial_folder(spec.output)
    sampling = generation_engine(
        spec,
        runtime,
        student,
        eos_token_ids=eos_token_ids(spec.source.hf_folder, tokenizer),
        probe_ids=request.views[0].full_ids[-PROBE_TOKENS:],
        longest_prompt=max(len(views.student_ids) for views in request.views),
        scratch=scratch,
    )
    scored: list[Scored] = []
    with sampling as engine:
        for keys in _chunks(request, runtime):
            scored += _score_chunk(request, runtime, engine, student, teacher, tokenizer, keys)
            console.print(f"responses {len(scored)}/{len(request.keys)}")

    def write() -> None:
        shutil.rmtree(scratch, ignore_errors=True)  # it has the logs of servers
        diagnosis = {
            "model": _model(request),
            "data": _data(request),
            "settings": _settings(request),
        }
        diagnosis |= summarize(scored, request.views, tokenizer, request.objective)
        diagnosis["predictors"] = predict(scored, request.views, tokenizer)
        write_atomically(spec.output, [json.dumps(diagnosis), "\n"])
        console.print(describe_diagnosis(diagnosis), markup=False)
        plot_diagnosis(diagnosis, spec.output.with_suffix(".png"))

    run_on_rank0(write, takes_long=True)


def _teacher(request: DiagnosisSpec, runtime: Runtime, student: StageModel) -> Teacher:
    if not request.has_own_teacher:
        return Teacher(TeacherConfig(kind="live"), runtime, student=student, model=None)
    spec = request.spec
    source = open_source(spec.source.path, role="teacher", hf=spec.source.hf_folder)
    model = load_generation_model(spec, runtime, source)
    return Teacher(TeacherConfig(kind="frozen"), runtime, student=student, model=model)


def _chunks(request: DiagnosisSpec, runtime: Runtime) -> Iterator[list[ResponseKey]]:
    """Split the responses into chunks. Hidden states exist for one chunk at a time."""
    keys, chunk_size = request.keys, 2 * request.spec.rollout.batch_size * runtime.dp_size
    for first in range(0, len(keys), chunk_size):
        yield keys[first : first + chunk_size]


def _score_chunk(
    request: DiagnosisSpec,
    runtime: Runtime,
    engine: RolloutEngine,
    student: StageModel,
    teacher: Teacher,
    tokenizer: "PreTrainedTokenizerBase",
    keys: Sequence[ResponseKey],
) -> list[Scored]:
    """Sample and score the responses of `keys`, which are dealt out to the model replicas in turn.

    Returns:
        The scored responses in the order of `keys` on rank 0. An empty list on other ranks.
    """
    spec = request.spec
    share = keys[runtime.dp_rank :: runtime.dp_size]
    batch = PromptBatch(
        [request.views[row].student_ids for row, _ in share],
        [rollout_seed(spec.seed, row, sample) for row, sample in share],
        spec.rollout,
    )
    rollouts = engine.submit(batch).result()
    groups = consecutive(len(share), _MICRO_BATCH_SIZE)
    # Pad to the number of groups of the largest share: replicas that share experts must run the
    # same number of microbatches.
    largest_share = -(-len(keys) // runtime.dp_size)
    groups += [[]] * (-(-largest_share // _MICRO_BATCH_SIZE) - len(groups))
    microbatches = _microbatches(request, runtime, share, rollouts, groups)
    is_read = [row * spec.rollout.rollouts_per_prompt + s < request.num_read for row, s in share]
    num_top = min(NUM_TOP, student.vocab_size)
    scores = score_responses(
        student,
        teacher,
        microbatches,
        [num_top if any(is_read[i] for i in group) else 0 for group in groups],
        request.objective,
        runtime,
    )
    local = []
    if runtime.is_last_stage and runtime.tp_rank == 0:
        for group, group_scores in zip(groups, scores, strict=True):
            parts = _split_scores(group, rollouts, is_read, group_scores)
            for index, part in zip(group, parts, strict=True):
                local.append(_scored(request, tokenizer, share[index], rollouts[index], part))
    gathered: list[list[Scored]] = [[] for _ in range(runtime.world_size)]
    dist.gather_object(local, gathered if runtime.rank == 0 else None, dst=0)
    by_key = {(one.row, one.sample): one for part in gathered for one in part}
    return [by_key[key] for key in keys if key in by_key]


def _microbatches(
    request: DiagnosisSpec,
    runtime: Runtime,
    share: Sequence[ResponseKey],
    rollouts: Sequence[Rollout],
    groups: Groups,
) -> list[Microbatch]:
    samples = [
        Sample(v.student_ids, v.partial_ids, v.full_ids, rollout.response_ids, 1.0)
        for v, rollout in zip((request.views[row] for row, _ in share), rollouts, strict=True)
    ]
    microbatches = collate(
        samples,
        groups,
        pad_token_id=request.views[0].student_ids[0],  # attention never reads padding
        length_multiple=runtime.length_multiple,
    )
    return [microbatch.to(runtime.device) for microbatch in microbatches]


def _split_scores(
    group: Sequence[int],
    rollouts: Sequence[Rollout],
    is_read: Sequence[bool],
    scores: Scores,
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield each response's part of a microbatch's scores."""
    lengths = [len(rollouts[index].response_ids) for index in group]
    parts = {name: tensor.cpu().split(lengths) for name, tensor in scores.items() if group}
    for number, index in enumerate(group):
        yield {
            name: tensors[number].numpy()
            for name, tensors in parts.items()
            if is_read[index] or not name.startswith("top_")
        }


def _scored(
    request: DiagnosisSpec,
    tokenizer: "PreTrainedTokenizerBase",
    key: ResponseKey,
    rollout: Rollout,
    scores: Mapping[str, np.ndarray],
) -> Scored:
    objective, ids = request.objective, rollout.response_ids
    thinking = find_thinking(tokenizer, request.views[key[0]].student_ids, ids)
    tokens = loss_range(len(ids), thinking, objective.loss_span, objective.skip_response_tokens)
    return Scored(*key, rollout, scores, tokens, thinking.end)


def _model(request: DiagnosisSpec) -> dict[str, Any]:
    spec = request.spec
    return {
        "path": str(spec.source.path),
        "weights": spec.role,
        "step": spec.weight_version,
        "teacher": "own" if request.has_own_teacher else "the model itself",
        "dtype": spec.dtype,
    }


def _data(request: DiagnosisSpec) -> dict[str, Any]:
    samples = request.spec.rollout.rollouts_per_prompt
    return {
        "path": source_name(request.spec.prompts),
        "rows": len(request.views),
        "samples": samples,
    }


def _settings(request: DiagnosisSpec) -> dict[str, Any]:
    objective, rollout, views = request.objective, request.spec.rollout, request.spec.views
    return {
        "residual_scale": objective.residual_scale,
        "residual_clip": objective.residual_clip,
        "hindsight_gap": objective.hindsight_gap,
        "hindsight_floor": objective.hindsight_floor,
        "skip_response_tokens": objective.skip_response_tokens,
        "loss_span": objective.loss_span,
        "partial_view": views.partial_view,
        "partial_ratio": views.median_ratio,
        "engine": rollout.engine,
        "max_response_tokens": rollout.max_response_tokens,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "seed": request.spec.seed,
    }


def _headline(request: DiagnosisSpec, runtime: Runtime) -> str:
    spec = request.spec
    dtype = str(runtime.dtype(spec.dtype)).removeprefix("torch.")
    teacher = "its own teacher" if request.has_own_teacher else "itself as the teacher"
    return (
        f"{spec.source.path} ({spec.role}) with {teacher}, in {dtype} on {runtime.device.type}, "
        f"{describe(spec.parallel, runtime.dp_size)}\n"
        f"{len(request.views)} rows, {spec.rollout.rollouts_per_prompt} samples each, engine "
        f"{spec.rollout.engine}, seed {spec.seed}"
    )
