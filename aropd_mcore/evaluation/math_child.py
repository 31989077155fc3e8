"""Program that compares answers by math-verify, in a process that may be killed.

It prints `true` when it is ready. Then it reads one JSON line `[gold, answer]` per comparison, both
in normal form (evaluation/normalize.py), and prints `true` or `false`. It is a separate process
because an answer can keep sympy busy forever or fill the memory.

This program compares numbers itself, because the tolerances of math-verify are absolute: 1/2^99
would equal 1/2^98. Rules:

    exact numbers       equal if their difference is 0
    decimals            equal if they are equal when rounded to six places (as in math-verify) and
                        their relative difference is at most 1/10000
    irrational numbers  equal if their difference is below 10^-45 of the larger one
    percentages         9% equals 9
"""

import json
import logging
import resource
import sys
from dataclasses import replace
from typing import Any

_MEMORY = 4 << 30
_DIGITS = 50


def main() -> None:
    logging.disable()  # math-verify warns that its time limits are off
    import math_verify.grader as grader
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # math-verify compares elements of sets, tuples, intervals and matrices by this function.
    library_rule = grader.sympy_numeric_eq

    def numeric_eq(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
        same = same_number(a, b)
        if same is None:
            return library_rule(a, b, float_rounding, numeric_precision)
        return same

    grader.sympy_numeric_eq = numeric_eq
    # normalize.py removes units. math-verify would treat the variables of 5t and 4ab as units.
    form = replace(LatexExtractionConfig().normalization_config, units=False)
    latex = LatexExtractionConfig(boxed_match_priority=0, normalization_config=form)
    configs = [latex, ExprExtractionConfig()]

    def same(gold: str, answer: str) -> bool:
        gold_value, answer_value = (
            parse(f"\\boxed{{{text}}}", extraction_config=configs, parsing_timeout=0)
            for text in (gold, answer)
        )
        return verify(gold_value, answer_value, timeout_seconds=0)

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print("true", flush=True)
    for line in sys.stdin:
        try:
            verdict = same(*json.loads(line))
        except Exception:  # sympy or the parser cannot process the answer
            verdict = False
        print(json.dumps(bool(verdict)), flush=True)


def same_number(a: Any, b: Any) -> bool | None:
    """Compare two sympy expressions as numbers. None: one of them is not a number."""
    import sympy

    for value in (a, b):
        if not isinstance(value, sympy.Expr) or value.free_symbols or not value.is_commutative:
            return None
    percents = [_percent(value) for value in (a, b)]
    if all(isinstance(value, sympy.Integer) for value in percents):
        return percents[0] == percents[1]
    has_decimal = bool(a.atoms(sympy.Float) or b.atoms(sympy.Float))
    first, second = (_exact(value) for value in (a, b))
    if not (first.is_finite and second.is_finite and first.is_number and second.is_number):
        return None
    if has_decimal:
        return _close(first, second)
    if first.is_Rational and second.is_Rational:
        return first == second
    difference = abs((first - second).evalf(_DIGITS, maxn=4 * _DIGITS))
    largest = max(abs(first.evalf(_DIGITS)), abs(second.evalf(_DIGITS)))
    return bool(difference <= largest * sympy.Float(10) ** (5 - _DIGITS))


def _exact(value: Any) -> Any:
    """Replace each decimal of an expression with the exact fraction of its digits."""
    import sympy

    decimals = {number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)}
    return value.xreplace(decimals).doit()


def _percent(value: Any) -> Any:
    """Return 9 for 9%, which math-verify represents as an unevaluated product."""
    import sympy

    hundredth = sympy.UnevaluatedExpr(sympy.Rational(1, 100))
    if isinstance(value, sympy.Mul) and len(value.args) == 2 and value.args[1] == hundredth:
        return value.args[0]
    return value


def _close(first: Any, second: Any) -> bool:
    largest = max(abs(first), abs(second))
    return bool(
        first == second
        or (abs(first - second) <= largest / 10_000 and first.round(6) == second.round(6))
    )


if __name__ == "__main__":
    main()
