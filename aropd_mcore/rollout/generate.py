"""Sampling of responses to a file of prompts, from any checkpoint, for `aropd generate`."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aropd_mcore.data.generation_prompts import PromptCounts, PromptLine, Prompts
from aropd_mcore.data.tokenizer import eos_token_ids, load_tokenizer
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.mcore.rank0 import run_on_rank0
from aropd_mcore.mcore.runtime import Runtime, start
from aropd_mcore.plan.layout import describe
from aropd_mcore.rollout.engine import PromptBatch, RolloutEngine, rollout_seed
from aropd_mcore.rollout.engines import PROBE_TOKENS, generation_engine, load_generation_model
from aropd_mcore.rollout.generation_spec import GenerationSpec
from aropd_mcore.rollout.lines_file import LinesFile, partial_folder
from aropd_mcore.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCHES_AT_ONCE = 8
"""Batches per replica between two writes. At the end of each such group fewer rows decode."""
FIELDS = (
    "sample",
    "text",
    "response_ids",
    "logprobs",
    "finish_reason",
    "weight_version",
    "num_cut_tokens",
)
"""Fields of an output line that are added to those of the prompt."""


def start_generation_runtime(spec: GenerationSpec) -> Runtime:
    """Join the job's processes in the layout of the specification; as `mcore.runtime.start`."""
    sizes = spec.parallel
    return start(
        tensor=sizes.tensor,
        **asdict(sizes.stages),
        expert=sizes.expert,
        expert_tensor=sizes.expert_tensor,
        sequence_parallel=sizes.sequence,
        seed=spec.seed,
    )


@dataclass(frozen=True)
class _Extent:
    """Number of prompts, and how many of them are done."""

    counts: PromptCounts
    num_done: int
    """Number of prompts that earlier calls have finished."""


def generate(spec: GenerationSpec, runtime: Runtime) -> None:
    """Sample spec.rollout.rollouts_per_prompt responses to each prompt and write spec.output.

    The file has one line per response, in the order of prompts and samples, for every layout. The
    next call resumes an interrupted one: each response has a seed of its own.

    Raises:
        ValueError, OSError: the prompts or the output cannot be used. It is raised on every rank,
            before anything is sampled.
        RolloutFailed: see RolloutEngine; the next call resumes after the written lines.
    Collectives: the engine's; broadcasts over the job; all-gathers of the responses over the job.
        Every rank must call.
    """
    tokenizer = load_tokenizer(spec.source.hf_folder)
    vocab_size = spec.source.architecture.vocab_size
    view_builder = ViewBuilder(tokenizer, spec.views, vocab_size=vocab_size)
    prompts = Prompts(
        spec.prompts,
        view_builder,
        vocab_size=vocab_size,
        max_tokens=spec.max_prompt_tokens,
        reserved=FIELDS,
    )
    with ExitStack() as stack:
        output: list[LinesFile] = []
        """The output file, on rank 0 only."""

        def begin() -> _Extent:
            counts, samples = prompts.check(), spec.rollout.rollouts_per_prompt
            file = LinesFile(spec.output, spec.identity(), lines_at_once=samples)
            output.append(stack.enter_context(file))
            return _Extent(counts, file.num_lines // samples)

        extent = run_on_rank0(begin, takes_long=True)
        if runtime.rank == 0:
            for note in view_builder.notes:
                print(note, file=sys.stderr)
        probe_ids = (*prompts.ids(next(iter(prompts)))[0], view_builder.end_id)[-PROBE_TOKENS:]
        sampling = generation_engine(
            spec,
            runtime,
            load_generation_model(spec, runtime),
            eos_token_ids=eos_token_ids(spec.source.hf_folder, tokenizer),
            probe_ids=probe_ids,
            longest_prompt=extent.counts.longest,
            scratch=partial_folder(spec.output),
        )
        with _progress(spec, runtime, extent) as advance, sampling as engine:
            for first, piece in _pieces(prompts, extent, _prompts_at_once(spec, runtime)):
                responses = _respond(spec, runtime, engine, prompts, first, piece)
                for file in output:
                    file.write(_records(spec, tokenizer, piece, responses))
                advance(len(piece))
        for file in output:
            file.finish()


def _prompts_at_once(spec: GenerationSpec, runtime: Runtime) -> int:
    responses = _BATCHES_AT_ONCE * spec.rollout.batch_size * runtime.dp_size
    return max(1, responses // spec.rollout.rollouts_per_prompt)


def _pieces(
    prompts: Prompts, extent: _Extent, num_at_once: int
) -> Iterator[tuple[int, list[PromptLine]]]:
    """Yield the remaining prompts in pieces, each after the position of its first prompt."""
    lines = islice(prompts, extent.num_done, extent.counts.num_prompts)
    position = extent.num_done
    while piece := list(islice(lines, num_at_once)):
        yield position, piece
        position += len(piece)


_Response = tuple[Rollout, int]
"""A response, and the number of tokens cut off its prompt's question."""


def _respond(
    spec: GenerationSpec,
    runtime: Runtime,
    engine: RolloutEngine,
    prompts: Prompts,
    position: int,
    piece: Sequence[PromptLine],
) -> list[_Response]:
    """Sample the responses to a piece; return them on every rank, ordered by prompt and sample.

    Responses are dealt out to the model replicas in turn. They do not depend on the number of
    replicas.

    Args:
        position: position of the piece's first prompt in the file.
    """
    samples = spec.rollout.rollouts_per_prompt
    places = [(index, sample) for index in range(len(piece)) for sample in range(samples)]
    share = places[runtime.dp_rank :: runtime.dp_size]
    ids = {index: prompts.ids(piece[index]) for index, _ in share}
    batch = PromptBatch(
        [ids[index][0] for index, _ in share],
        [rollout_seed(spec.seed, position + index, sample) for index, sample in share],
        spec.rollout,
    )
    rollouts = engine.submit(batch).result()
    responses = [
        (place, (rollout, ids[place[0]][1])) for place, rollout in zip(share, rollouts, strict=True)
    ]
    all_responses = dict(runtime.concatenate_over_data(responses))
    return [all_responses[place] for place in places]


def _records(
    spec: GenerationSpec,
    tokenizer: "PreTrainedTokenizerBase",
    piece: Sequence[PromptLine],
    responses: Sequence[_Response],
) -> Iterator[dict[str, Any]]:
    """Yield one output line per response: the fields of the prompt, then FIELDS."""
    samples = spec.rollout.rollouts_per_prompt
    for number, (rollout, num_cut) in enumerate(responses):
        record = dict(piece[number // samples].fields)
        record["sample"] = number % samples
        record["text"] = tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True)
        record["response_ids"] = rollout.response_ids
        if spec.with_logprobs:
            record["logprobs"] = rollout.logprobs
        record["finish_reason"] = "stop" if rollout.finished else "length"
        if spec.weight_version is not None:
            record["weight_version"] = rollout.weight_version
        if num_cut:
            record["num_cut_tokens"] = num_cut
        yield record


@contextmanager
def _progress(
    spec: GenerationSpec, runtime: Runtime, extent: _Extent
) -> Iterator[Callable[[int], None]]:
    """Report progress on stderr of rank 0: as a bar on a terminal, as lines in a log.

    Yields:
        A function to call with the number of prompts finished since the last call.
    """
    if runtime.rank != 0:
        yield lambda num_prompts: None
        return
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(_headline(spec, runtime, extent), markup=False)
    columns = (TextColumn("prompts"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=extent.counts.num_prompts, completed=extent.num_done)
        num_done = extent.num_done

        def advance(num_prompts: int) -> None:
            nonlocal num_done
            num_done += num_prompts
            bar.update(task, completed=num_done)
            if bar.disable:
                console.print(f"prompts {num_done}/{extent.counts.num_prompts}")

        yield advance


def _headline(spec: GenerationSpec, runtime: Runtime, extent: _Extent) -> str:
    dtype = str(runtime.dtype(spec.dtype)).removeprefix("torch.")
    start = f"resuming at prompt {extent.num_done + 1}" if extent.num_done else "starting"
    cut = ""
    if extent.counts.num_cut:
        cut = (
            f"\n{extent.counts.num_cut} prompts exceed views.max_prompt_tokens "
            f"{spec.views.max_prompt_tokens}: views.on_long_prompt {spec.views.on_long_prompt} "
            "cuts them, and their lines have num_cut_tokens"
        )
    return (
        f"{start}: {spec.source.path} ({spec.role}) in {dtype} on {runtime.device.type}, "
        f"{describe(spec.parallel, runtime.dp_size)}\n"
        f"{extent.counts.num_prompts} prompts, {spec.rollout.rollouts_per_prompt} samples each, "
        f"engine {spec.rollout.engine}, seed {spec.seed}{cut}"
    )
