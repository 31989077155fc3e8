"""Write the word problems of the study, with worked traces.

    python examples/smollm2/problems.py runs/smollm2/data --seeds 0 1 2 3 4

Two kinds of problem, in plain English:

- `shop`: an amount changes 2 to 6 times. Each step of the trace is one calculation.
- `carry`: two people walk 2 to 6 times, and one of them carries a thing. The trace states where the
  thing is after each move.

Each step needs the result of the step before it, so the first half of a trace does not contain the
second half.

    warm.jsonl          rows for the warm start, by sft
    validation.jsonl    problems for the choice of settings
    seed-N/train.jsonl, seed-N/heldout.jsonl
                        training rows and held-out problems of seed N

No question occurs twice, in one file or in two. The same arguments give the same files.
A row's `id` is KIND-STEPS-NUMBER.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

STEPS = range(2, 7)
NAMES = ("Maya", "Leo", "Anna", "Tom", "Nina", "Sam", "Ella", "Max", "Ruth", "Ivan", "Rosa", "Paul")
ITEMS = ("pens", "marbles", "stamps", "shells", "coins", "cards", "beads", "books", "stickers")
PLACES = ("kitchen", "garden", "office", "bedroom", "garage", "cellar", "hall", "attic", "library")
THINGS = ("ball", "lamp", "hat", "key", "cup", "bag", "clock", "map")
LARGEST = 99
"""Largest amount of a `shop` problem. A number of two digits has two tokens."""


class Row(NamedTuple):
    question: str
    reasoning: str
    answer: str


def shop(rng: random.Random, num_steps: int) -> Row:
    """Return a problem in which an amount changes num_steps times."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    amount = rng.randint(10, 60)
    question = [f"{name} has {amount} {item}."]
    trace = [f"{name} starts with {amount} {item}."]
    for _ in range(num_steps):
        kind, number, after = _change(rng, amount)
        sign = "+" if after > amount else "-"
        question.append(f"{name} {kind.format(number=number, item=item)}.")
        trace.append(f"{amount} {sign} {number} = {after}.")
        amount = after
    question.append(f"How many {item} does {name} have now?")
    return Row(" ".join(question), "\n".join(trace), str(amount))


def _change(rng: random.Random, amount: int) -> tuple[str, int, int]:
    """Return wording, number and the new amount, which is between 1 and LARGEST."""
    changes = []
    if amount > 3:
        number = rng.randint(2, min(30, amount - 1))
        changes += [
            ("gives away {number} {item}", number, amount - number),
            ("loses {number} {item}", number, amount - number),
        ]
    if amount < LARGEST - 2:
        number = rng.randint(2, min(30, LARGEST - amount))
        changes += [
            ("buys {number} more {item}", number, amount + number),
            ("finds {number} {item}", number, amount + number),
        ]
    if 2 * amount <= LARGEST:
        changes.append(("gets as many {item} again", amount, 2 * amount))
    return rng.choice(changes)


def carry(rng: random.Random, num_steps: int) -> Row:
    """Return a problem in which two people carry and put down a thing in num_steps moves."""
    carrier, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    at = {carrier: rng.choice(PLACES), other: rng.choice(PLACES)}
    place, holder = at[carrier], carrier
    question = [
        f"{carrier} is in the {place} and holds the {thing}.",
        f"{other} is in the {at[other]}.",
    ]
    trace = [f"The {thing} starts in the {place}."]
    for _ in range(num_steps):
        mover = rng.choice((carrier, other))
        at[mover] = rng.choice([p for p in PLACES if p != at[mover]])
        if holder == mover and rng.random() < 0.4:
            holder = None
            question.append(f"{mover} puts down the {thing} and goes to the {at[mover]}.")
            trace.append(f"{mover} leaves the {thing} in the {place}.")
        elif holder == mover:
            place = at[mover]
            question.append(f"{mover} goes to the {place}.")
            trace.append(f"{mover} carries the {thing} to the {place}.")
        elif holder is None and rng.random() < 0.6:
            at[mover], holder = place, mover
            question.append(f"{mover} goes to the {place} and picks up the {thing}.")
            trace.append(f"{mover} has the {thing} in the {place}.")
        else:
            question.append(f"{mover} goes to the {at[mover]}.")
            trace.append(f"The {thing} stays in the {place}.")
    question.append(f"Where is the {thing}?")
    return Row(" ".join(question), "\n".join(trace), place)


KINDS: dict[str, Callable[[random.Random, int], Row]] = {"shop": shop, "carry": carry}


def rows(rng: random.Random, seen: set[str]) -> Iterator[dict[str, str]]:
    """Yield rows forever, alternating kinds and numbers of steps. Questions are added to `seen`."""
    number = 0
    while True:
        for num_steps in STEPS:
            for kind, make in KINDS.items():
                row = make(rng, num_steps)
                while row.question in seen:
                    row = make(rng, num_steps)
                seen.add(row.question)
                yield {"id": f"{kind}-{num_steps}-{number}", **row._asdict()}
                number += 1


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--sizes", type=int, nargs=4, default=[400, 100, 400, 200], metavar="N",
        help="numbers of rows of warm, validation, train and heldout (default: 400 100 400 200)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    num_warm, num_validation, num_train, num_heldout = args.sizes
    files = {"warm": num_warm, "validation": num_validation}
    seen: set[str] = set()
    _write(args.out, files, random.Random("all seeds"), seen)
    for seed in range(max(args.seeds) + 1):  # lower seeds too: no question occurs in two seeds
        sizes = {"train": num_train, "heldout": num_heldout}
        _write(args.out / f"seed-{seed}", sizes, random.Random(f"seed {seed}"), seen)


def _write(folder: Path, sizes: dict[str, int], rng: random.Random, seen: set[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        lines = [json.dumps(row) + "\n" for row in islice(rows(rng, seen), size)]
        (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
