"""Words that CONTRIBUTING.md excludes, in docstrings, comments, messages, Markdown and YAML."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator

from tests.conftest import REPO

_UNITS = "step|rank|token|row|response|microbatch|GPU|layer|parameter|replica|prompt|sample|expert"
_UNITS += "|sequence|problem|node|server|stage|minute|second|tensor|file|run"
_COUNTED = "lines?|bytes|tokens|process|processes|seconds|numbers?|times|responses|FLOPs?"
_COUNTED += "|entry|entries|threads?|rows|GPUs|prompts|microbatches"
WORDS = {
    rf"\b({_COUNTED}) an? ({_UNITS})\b": "write `per`: one line per step",
    r"\balone\b": "write `only`",
    r"\b(go|goes|going|gone|went) on\b": "write `resume` or `continue`",
    r"(?<!`)\b(nobody|somebody|anybody|whoever|whom)\b": "name the rank, process or caller",
    r"\b(says|said|told|tells|speaks? for)\b": "write `states`, `reports`, `prints` or `specifies`",
    r"\b(mend|mends|mended)\b": "write `fix`",
    r"\bOf them\b|\bthat is none\b|\bthose that are\b": "name the noun",
}
"""Pattern -> advice. The Unix user is written as `nobody`, in backticks."""
OPENINGS = re.compile(r"(What|Whose|Who|Whom|That|Those|Of|And|Which)\b")
"""Words that a docstring must not begin with: it begins with a noun, or a verb that commands."""


def test_text_uses_no_excluded_word():
    problems = []
    for path in tracked_files():
        for line, text in texts(path):
            for pattern, advice in WORDS.items():
                for match in re.finditer(pattern, text):
                    number = line + text.count("\n", 0, match.start())
                    problems.append(f"{path}:{number}: {match[0]!r}: {advice}")
    assert not problems, f"{len(problems)} excluded words\n" + "\n".join(problems)


def test_docstring_begins_with_a_noun_or_a_verb():
    problems = [
        f"{path}:{line}: {text.splitlines()[0]!r}"
        for path in tracked_files()
        if path.endswith(".py")
        for line, text in docstrings(ast.parse((REPO / path).read_text()))
        if OPENINGS.match(text)
    ]
    assert not problems, f"{len(problems)} docstrings\n" + "\n".join(problems)


def tracked_files() -> list[str]:
    """Paths of the files with text of this project, relative to the repository."""
    words = ["git", "ls-files", "*.py", "*.md", "*.yaml", "*.yml", "*.toml", "*.sh", "*.sbatch"]
    words += ["*.js", "*.html", "Makefile"]
    listed = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=True).stdout
    return [path for path in listed.splitlines() if path != "tests/test_language.py"]


def texts(path: str) -> Iterator[tuple[int, str]]:
    """Yield the texts of a file, each after the number of its first line.

    Those of Python are comments and strings. Strings in tests are data, except for docstrings.
    """
    content = (REPO / path).read_text()
    if not path.endswith(".py"):
        yield 1, content
        return
    is_test = path.startswith("tests/")
    if is_test:
        yield from docstrings(ast.parse(content))
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT or (token.type in MESSAGES and not is_test):
            yield token.start[0], token.string


MESSAGES = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
"""Tokens of string literals; Python 3.12 has other ones for f-strings."""


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield each docstring with its first line, those behind attributes and constants included."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                text = child.value.value
                if isinstance(text, str):
                    yield child.lineno, text.strip()


def test_excluded_words_are_found():
    for text in ("a line a step", "on rank 0 alone", "it goes on", "nobody waits", "is told of"):
        assert any(re.search(pattern, text) for pattern in WORDS), text
    assert not any(re.search(pattern, "one line per step on a rank") for pattern in WORDS)
    assert OPENINGS.match("What a run needs.") and not OPENINGS.match("Offsets of rows.")
