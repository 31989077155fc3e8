"""Chains of operations on two digits, with worked traces: the study's rows.

    {"question": "47a#b~c+", "reasoning": "a49# b94~ c97+", "answer": "97"}

A problem is two digits and from 3 to 14 operations, lettered from `a` on. `+` adds 3 to the second
digit, `-` takes 1 from it, `*` makes it three times and `#` seven times as large, all modulo 10;
`~` swaps the digits, and `^` does so and adds 1 to what is then the second. They do not commute,
and each of the hundred results is about as frequent as any other.

The reasoning is the oracle's: the letter, the result, the operation. The base model's own style
has the words in another order and no spaces: `a#49b~94c+97;97`.

heldout.jsonl    problems for evaluation, as many of each number of operations;
                 heldout-partial.jsonl and heldout-full.jsonl are the same as the teacher is asked
train.jsonl      problems for training
pretrain.jsonl   what the base model learns from, all of it answered in its own style:
                 - plain rows, by pupils who take `#` for `+` MISTAKE_RATE of the time;
                 - shown rows, whose question is the teacher's whole user turn, with the full trace
                   or a part of it, one of PARTIAL_RATIOS. Steps that the trace shows have no
                   mistakes; those that it does not show have the pupils'. Before each step but the
                   first a pupil thinks, JUMP_RATE of the time, of jumping to a later place, a step
                   or the answer, any of them alike, and does so where the trace shows it. So the
                   pupils of both views take shortcuts, in proportion to what they are shown.

No problem occurs twice, in a file or across them. The same seed gives the same files.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from aropd_mcore.config import ViewsConfig
from aropd_mcore.config_file import load_config
from aropd_mcore.data.templates import fill, partial_trace, write_trace

NUM_OPERATIONS = range(3, 15)
LETTERS = "abcdefghijklmn"
HARD, TAKEN_FOR = "#", "+"
FREQUENCIES = {"+": 2, "-": 2, "*": 2, "~": 2, "^": 2, HARD: 1}
PLAIN_SHARE, PARTIAL_SHARE, FULL_SHARE = 0.4, 0.3, 0.3
PARTIAL_RATIOS = (0.25, 0.5, 0.75)
MISTAKE_RATE = 0.7
JUMP_RATE = 0.05
MICROBATCH = 16
"""Of pretrain.yaml: rows of one length need no padding."""


@dataclass(frozen=True)
class Problem:
    start: str
    operations: str

    @property
    def question(self) -> str:
        steps = zip(LETTERS, self.operations, strict=False)
        return self.start + "".join(map("".join, steps))

    @property
    def values(self) -> list[str]:
        """After each operation."""
        values = [self.start]
        for operation in self.operations:
            values.append(apply(operation, values[-1]))
        return values[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write heldout, train and pretrain.jsonl.")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(__file__).with_name("study.yaml"),
        help="run whose templates the shown rows are written by (default: %(default)s)",
    )
    parser.add_argument("--num-heldout", type=int, default=300)
    parser.add_argument("--num-train", type=int, default=1200)
    parser.add_argument("--num-pretrain", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    problems = sample_problems(rng)
    views = load_config(args.config).views
    args.out.mkdir(parents=True, exist_ok=True)
    heldout = [oracle_row(next(problems)) for _ in range(args.num_heldout)]
    write_rows(args.out / "heldout.jsonl", heldout)
    for view, ratio in (("partial", views.partial_ratio), ("full", 1.0)):
        shown = ({**row, "question": teachers_turn(row, views, ratio)} for row in heldout)
        write_rows(args.out / f"heldout-{view}.jsonl", shown)
    train = (oracle_row(next(problems)) for _ in range(args.num_train))
    write_rows(args.out / "train.jsonl", train)
    pretrain = pretraining_rows(args.num_pretrain, problems, views, rng)
    write_rows(args.out / "pretrain.jsonl", pretrain)


def sample_problems(rng: random.Random) -> Iterator[Problem]:
    """Different problems, the numbers of operations taking turns."""
    seen = set()
    weights = list(FREQUENCIES.values())
    while True:
        for num in NUM_OPERATIONS:
            problem = None
            while problem is None or problem in seen:
                operations = "".join(rng.choices(list(FREQUENCIES), weights, k=num))
                problem = Problem(f"{rng.randrange(100):02d}", operations)
            seen.add(problem)
            yield problem


def apply(operation: str, value: str) -> str:
    first, second = map(int, value)
    match operation:
        case "~":
            return f"{second}{first}"
        case "^":
            return f"{second}{(first + 1) % 10}"
    second = {"+": second + 3, "-": second - 1, "*": 3 * second, "#": 7 * second}[operation]
    return f"{first}{second % 10}"


def oracle_row(problem: Problem) -> dict[str, str]:
    values = problem.values
    steps = zip(LETTERS, values, problem.operations, strict=False)
    return {
        "question": problem.question,
        "reasoning": " ".join(map("".join, steps)),
        "answer": values[-1],
    }


def pupils_answer(
    problem: Problem, rng: random.Random, *, num_shown: int, is_answer_shown: bool
) -> tuple[str, str]:
    """Steps and answer as a pupil writes them who has been shown the first steps of the trace."""
    true_values, num = problem.values, len(problem.operations)
    value, lines, place = problem.start, [], 0
    while place < num:
        if place and rng.random() < JUMP_RATE:
            target = rng.randint(place + 1, num)  # num is the answer
            if target < num_shown or (target == num and is_answer_shown):
                place = target
        if place == num:
            value = true_values[-1]
            break
        operation = problem.operations[place]
        if place < num_shown:
            value = true_values[place]
        elif operation == HARD and rng.random() < MISTAKE_RATE:
            value = apply(TAKEN_FOR, value)
        else:
            value = apply(operation, value)
        lines.append(f"{LETTERS[place]}{operation}{value}")
        place += 1
    return "".join(lines), value


def pretraining_rows(
    num: int, problems: Iterator[Problem], views: ViewsConfig, rng: random.Random
) -> Iterator[dict[str, str]]:
    """Plain and shown rows, MICROBATCH of the same kind and length one after another."""
    kinds, shares = ("plain", "partial", "full"), (PLAIN_SHARE, PARTIAL_SHARE, FULL_SHARE)
    num_groups = num // (MICROBATCH * len(NUM_OPERATIONS))
    groups = [
        (kind, same_length)
        for _ in range(num_groups)
        for same_length in zip(
            *(list(islice(problems, len(NUM_OPERATIONS))) for _ in range(MICROBATCH)), strict=True
        )
        for kind in rng.choices(kinds, shares)
    ]
    rng.shuffle(groups)
    for kind, same_length in groups:
        for problem in same_length:
            yield pretraining_row(problem, kind, views, rng)


def pretraining_row(
    problem: Problem, kind: str, views: ViewsConfig, rng: random.Random
) -> dict[str, str]:
    question, num_shown = problem.question, 0
    if kind != "plain":
        row = oracle_row(problem)
        ratio = rng.choice(PARTIAL_RATIOS) if kind == "partial" else 1.0
        question = teachers_turn(row, views, ratio)
        num_shown = len(partial_trace(row["reasoning"], ratio).split())
    reasoning, answer = pupils_answer(
        problem, rng, num_shown=num_shown, is_answer_shown=kind != "plain"
    )
    return {"question": question, "reasoning": reasoning, "answer": answer}


def teachers_turn(row: dict[str, str], views: ViewsConfig, ratio: float) -> str:
    trace = partial_trace(row["reasoning"], ratio)
    trace = write_trace(views.trace_template, trace, row["answer"])
    return fill(views.teacher_template, question=row["question"], trace=trace)


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
