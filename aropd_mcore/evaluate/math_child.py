"""Whether two answers are the same, by math-verify; a process of its own, which may be killed.

Run as a program: it says `true` when it is ready, then answers a line of JSON, [gold, answer], with
`true` or `false`. What it is given may keep sympy busy for ever, or fill the memory.
"""

import json
import logging
import re
import resource
import sys

_MEMORY = 4 << 30


def main() -> None:
    logging.disable()  # math-verify's warnings that no time limit of its own is on
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def parsed(text: str) -> list:
        return parse(text, extraction_config=configs, parsing_timeout=0)

    def same(gold: str, answer: str) -> bool:
        gold, answer = clean(gold), clean(answer)
        if gold == answer:
            return True
        truth = parsed(f"\\boxed{{{gold}}}")
        forms = [f"\\boxed{{{answer}}}", *([answer] if is_prose(answer) else [])]
        return any(verify(truth, parsed(form), timeout_seconds=0) for form in forms)

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print("true", flush=True)
    for line in sys.stdin:
        try:
            verdict = same(*json.loads(line))
        except Exception:  # of sympy's or the parser's, about an answer that means nothing to them
            verdict = False
        print(json.dumps(bool(verdict)), flush=True)


def clean(text: str) -> str:
    """Without what is only form: white space, Markdown's stars, a full stop; 4.5e33 as LaTeX."""
    text = " ".join(text.split()).strip("*").strip()
    text = re.sub(r"(?<=[0-9])\.$", "", text)
    if inner := re.fullmatch(r"\\(?:mathbf|textbf|text|mathrm)\{([^{}]*)\}", text):
        text = inner[1].strip()
    return re.sub(r"(?<![\w.])(-?\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)", r"\1 \\times 10^{\2}", text)


def is_prose(text: str) -> bool:
    """Words, whose letters are no product of variables: math-verify looks for the last expression
    in it."""
    plain = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{[^{}]*\}|\\[A-Za-z]+", " ", text)
    return bool(re.search(r"[A-Za-z]{2,}", plain))


if __name__ == "__main__":
    main()
