"""Write the demo's three files of rows: three-digit additions by column, with worked traces.

    {"question": "457+386=", "reasoning": "7+6+0=13 5+8+1=14 4+3+1=08", "answer": "843"}

A column is `digit+digit+carry=sum`, from the right.

heldout.jsonl    problems for evaluation
train.jsonl      other problems, for AR-OPD, worked without mistakes
sft.jsonl        rows for the base model, of two kinds:
                 - plain rows, in which a carry is forgotten with probability 70 %. A model trained
                   on them knows how to carry, but usually does not. With greedy decoding it is
                   right where no carry is needed, on 30 % of all problems.
                 - shown rows, whose question is the teacher's whole user turn: the partial or the
                   full trace, then the question. Their answers have no mistakes, so the model
                   learns to follow an example in the prompt.

No problem occurs twice, in one file or in two. The same seed gives the same files.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from aropd_mcore.config import ViewsConfig
from aropd_mcore.config_file import load_config
from aropd_mcore.data.templates import fill, partial_trace, write_trace

NUM_DIGITS = 3
PLAIN_SHARE, PARTIAL_SHARE, FULL_SHARE = 0.5, 0.15, 0.35
FORGET_RATE = 0.7

Problem = tuple[int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write sft.jsonl, train.jsonl and heldout.jsonl.")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(__file__).with_name("aropd.yaml"),
        help="config whose templates render the shown rows (default: %(default)s)",
    )
    parser.add_argument("--num-sft", type=int, default=20000)
    parser.add_argument("--num-train", type=int, default=5000)
    parser.add_argument("--num-heldout", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    sizes = [args.num_heldout, args.num_train, args.num_sft]
    problems = iter(sample_problems(sum(sizes), rng))
    heldout, train, sft = ([next(problems) for _ in range(size)] for size in sizes)
    views = load_config(args.config).views
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows(args.out / "heldout.jsonl", map(worked_row, heldout))
    write_rows(args.out / "train.jsonl", map(worked_row, train))
    write_rows(args.out / "sft.jsonl", (sft_row(problem, views, rng) for problem in sft))


def sample_problems(num: int, rng: random.Random) -> list[Problem]:
    """Sample `num` different pairs of summands, uniformly."""
    first, num_summands = 10 ** (NUM_DIGITS - 1), 9 * 10 ** (NUM_DIGITS - 1)
    pairs = rng.sample(range(num_summands**2), num)
    return [(first + pair // num_summands, first + pair % num_summands) for pair in pairs]


def worked_row(problem: Problem, forgets: Callable[[], bool] = lambda: False) -> dict[str, str]:
    """Add column by column. `forgets` is called at every carry of 1, and drops it if true."""
    a, b = problem
    columns, answer, carry = [], 0, 0
    for place in range(NUM_DIGITS):
        unit = 10**place
        x, y = a // unit % 10, b // unit % 10
        total = x + y + carry
        columns.append(f"{x}+{y}+{carry}={total:02d}")
        is_leftmost = place == NUM_DIGITS - 1
        answer += unit * (total if is_leftmost else total % 10)
        carry = total // 10
        if carry and not is_leftmost and forgets():
            carry = 0
    return {"question": f"{a}+{b}=", "reasoning": " ".join(columns), "answer": str(answer)}


def sft_row(problem: Problem, views: ViewsConfig, rng: random.Random) -> dict[str, str]:
    """Return a plain row with forgotten carries, or a shown row without mistakes."""
    kinds, shares = ("plain", "partial", "full"), (PLAIN_SHARE, PARTIAL_SHARE, FULL_SHARE)
    [kind] = rng.choices(kinds, shares)
    if kind == "plain":
        return worked_row(problem, forgets=lambda: rng.random() < FORGET_RATE)
    row = worked_row(problem)
    reasoning = row["reasoning"]
    if kind == "partial":
        reasoning = partial_trace(reasoning, views.median_ratio)
    trace = write_trace(views.trace_template, reasoning, row["answer"])
    return row | {"question": fill(views.teacher_template, question=row["question"], trace=trace)}


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
