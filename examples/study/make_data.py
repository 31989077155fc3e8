"""Write the study's rows: chains of operations on two digits, with worked traces.

    {"question": "47a#b~c+", "reasoning": "a49# b94~ c97+", "answer": "97"}

A problem is two digits and 3 to 14 operations, labelled `a`, `b` and so on. All arithmetic is
modulo 10 and changes the second digit:

    +  adds 3        *  multiplies by 3      ~  swaps the digits
    -  subtracts 1   #  multiplies by 7      ^  swaps the digits, then adds 1

The operations do not commute. The hundred results are about equally frequent.

The oracle writes each step of the reasoning as letter, result, operation. The base model's style
is letter, operation, result, without spaces: `a#49b~94c+97;97`.

heldout.jsonl    problems for evaluation, equally many of each number of operations
heldout-partial.jsonl, heldout-full.jsonl
                 the same problems as questions in the teacher's user turn
train.jsonl      problems for training
pretrain.jsonl   rows for the base model, all with answers in its own style:
                 - plain rows, which take `#` for `+` with probability MISTAKE_RATE;
                 - shown rows, whose question is the teacher's whole user turn, with the full trace
                   or a part of it, one of PARTIAL_RATIOS. Steps in the shown trace have no
                   mistakes. The other steps have the mistakes of plain rows. Before each step but
                   the first, with probability JUMP_RATE, a later step or the answer is drawn
                   uniformly. If the trace shows it, the answer jumps there. So the base model
                   learns shortcuts under both views, in proportion to what they show.

No problem occurs twice, in one file or in two. The same seed gives the same files.
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
"""Size of pretrain.yaml's microbatches. Rows of equal length need no padding."""


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
        """Values after each operation."""
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
        help="config whose templates render the shown rows (default: %(default)s)",
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
    for view, ratio in (("partial", views.median_ratio), ("full", 1.0)):
        shown = ({**row, "question": teachers_turn(row, views, ratio)} for row in heldout)
        write_rows(args.out / f"heldout-{view}.jsonl", shown)
    train = (oracle_row(next(problems)) for _ in range(args.num_train))
    write_rows(args.out / "train.jsonl", train)
    pretrain = pretraining_rows(args.num_pretrain, problems, views, rng)
    write_rows(args.out / "pretrain.jsonl", pretrain)


def sample_problems(rng: random.Random) -> Iterator[Problem]:
    """Yield different problems. The numbers of operations alternate."""
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
    """Return steps and answer in the base model's style, with its mistakes and shortcuts.

    Args:
        num_shown: number of steps of the trace in the prompt.
    """
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
    """Yield plain and shown rows, in groups of MICROBATCH rows of equal kind and length."""
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
