"""Extraction of the choice that a response states, by its letter or by its text.

A letter counts only if the response states it as the answer. A letter that is a word (`A ball`,
`I think`) does not count. All functions expect text in plain form (normalize.plain_text).
"""

import re
from collections import deque

from aropd_mcore.data.answer_marks import boxed_answer, tagged_answer
from aropd_mcore.data.multiple_choice import LETTERS
from aropd_mcore.evaluation.normalize import normal_answer, without_text_commands, words_of
from aropd_mcore.evaluation.tasks import Choices

_OPEN = r"(?:[*_`\"'(\[{$]|\\(?:text|math)\w{0,8}\s?\{|\\[(\[]){0,12}+"
_CLOSE = r"[*_`\"')\]}$\\]{0,12}"
_SUBJECT = r"(?:(?:option|choice|letter|answer)\s+)?"
_NAMED = rf"{_SUBJECT}{_OPEN}(?P<letter>[A-Za-z]){_CLOSE}"
_NOT_A_WORD = r"(?![A-Za-z0-9'’-])"
_PHRASES = [
    # the answer is C; answer: (c) green
    re.compile(
        rf"\b(?:answers?|letter|(?:choice|option)(?![*_\s]*:[*_\s]*\n))\b(?:\s+(?:to|for|of)\s[^.:\n]{{1,80}}?)?[*_\s\"']*"
        rf"(?:(?:is|are|was|(?:would|must|should) be)\b[*_\s]*:?|[:=])[*_\s]*"
        rf"(?:(?:therefore|thus|clearly|simply|definitely|for\s+sure)\s+)?{_NAMED}{_NOT_A_WORD}",
        re.IGNORECASE,
    ),
    # the answer C
    re.compile(rf"\b(?i:answer)\s+{_OPEN}(?P<letter>[A-Z]){_CLOSE}{_NOT_A_WORD}"),
    # C is the correct answer; option C is right
    re.compile(
        rf"(?<![A-Za-z0-9'\\]){_NAMED}(?:[.:)]?\s[^.\n]{{0,80}}?)?\s+(?:is|must\s+be|would\s+be)\s+"
        rf"(?:(?:therefore|clearly|indeed|thus)\s+)?"
        rf"(?:(?:the\s+)?(?:\w+\s+)?(?:correct|right|best|true)\b|the\s+answer\b)"
        rf"(?!\s+(?:only|if|when)\b)",
        re.IGNORECASE,
    ),
    # therefore I think it's C
    re.compile(
        rf"\b(?i:therefore|thus|hence|so|think|believe)\b,?\s+(?:(?i:it's|it\s+is|that's)\s+)?"
        rf"{_SUBJECT}{_OPEN}(?P<letter>[A-Z]){_CLOSE}(?=[.,;!]|\s*$)",
        re.MULTILINE,
    ),
    # therefore, C) green
    re.compile(rf"\b(?i:therefore|thus|hence|so),?\s+{_SUBJECT}(?P<letter>[A-Z])\)"),
    # in Chinese: the answer is C, so choose C
    re.compile(
        rf"(?:答案|故选|应选|所以选|选择|选项)(?:应该?)?(?:是|为|选)?[*_\s]*:?[*_\s]*{_OPEN}"
        rf"(?P<letter>[A-Z]){_CLOSE}(?![A-Za-z0-9'’-])"
    ),
    # I pick C
    re.compile(
        rf"\b(?:pick|choose|chose|select|selected|go\s+(?:with|for)|went\s+with)\s+(?:the\s+)?"
        rf"{_NAMED}{_NOT_A_WORD}",
        re.IGNORECASE,
    ),
]
_ANSWER_IS = re.compile(
    r"\banswer\b[*_\s]*(?:(?:is|would be|must be)\b[*_\s]*:?|[:=])[*_\s]*([^\n]{1,400})",
    re.IGNORECASE,
)
_MORE_LETTERS = re.compile(
    r"\s*(?:,|/|\bor\b|\band\b)\s*(?:(?:option|choice)\s+)?[*_`(]*[A-Z](?![A-Za-z'’])"
)
_END_OF_CLAUSE = re.compile(r"\s*(?:[.,:;)!?]|$|\n|because\b|since\b)", re.IGNORECASE)
_PARENTHESES = re.compile(r"\(([A-Z])\)")
_EITHER_OR = re.compile(r"\([A-Z]\)(?:\s*(?:,|/|\bor\b|\band\b)\s*\([A-Z]\))+")
_LETTER_ONLY = re.compile(rf"{_SUBJECT}{_OPEN}([A-Za-z]){_CLOSE}[.)\]:!]?{_CLOSE}", re.IGNORECASE)
_BEFORE_TEXT = re.compile(
    rf"{_SUBJECT}{_OPEN}([A-Z]){_CLOSE}(?:[.):\]]{_CLOSE}|\s[-–])\s+\S", re.IGNORECASE
)
_MAX_PHRASES = 64


def stated_choice(text: str, choices: Choices) -> tuple[str | None, str]:
    """Find the choice that a response states by the first rule that applies.

        answer  the last <answer>...</answer>, if it is a letter or the text of one choice
        boxed   the last box, if it is a letter or the text of one choice
        phrase  the last "answer is C", "C is correct" or "I pick C"
        letter  lines that name a single letter, or the last "(C)"
        text    the last line, if it is the text of one choice

    Returns:
        The letter and the name of the rule. None and `none` if no rule applies.
    """
    letters = LETTERS[: len(choices.texts)]
    tagged = tagged_answer(text)
    for rule, answer in (("answer", tagged[1] if tagged else None), ("boxed", boxed_answer(text))):
        letter = _find_letter(answer, choices, letters) if answer else None
        if letter:
            return letter, rule
    for rule, letter in (
        ("phrase", _search_phrases(text, choices, letters)),
        ("letter", _search_lines(text, letters)),
        ("text", _match_last_line(text, choices)),
    ):
        if letter:
            return letter, rule
    return None, "none"


def _find_letter(answer: str, choices: Choices, letters: str) -> str | None:
    """Return the letter that an answer names, or the letter of the choice with the same text."""
    plain = without_text_commands(normal_answer(boxed_answer(answer) or answer))
    if len(plain) > 1 and (letter := _match_text(plain, choices)):
        return letter
    if match := _LETTER_ONLY.fullmatch(plain):
        return _valid_letter(match[1], letters)
    if match := re.match(rf"{_SUBJECT}\(?([A-Z])(?:[).:]|\s|$)", plain, re.IGNORECASE):
        rest = plain[match.end() :].strip()
        is_letter = match[1].isupper() or match[0].rstrip().endswith((")", ".", ":"))
        if is_letter and not _MORE_LETTERS.match(plain[match.end(1) :]):
            same = _match_text(rest, choices)
            if plain[match.end(1) : match.end()].strip() or same in (None, match[1].upper()):
                return _valid_letter(match[1], letters)
    return _match_text(plain, choices)


def _match_text(text: str, choices: Choices) -> str | None:
    """Return the letter of the choice that has this text. None unless exactly one has it."""
    if not text:
        return None
    wanted, wanted_words = normal_answer(text), words_of(normal_answer(text))
    same = []
    for letter, choice in zip(LETTERS, choices.texts, strict=False):
        form = normal_answer(choice)
        if form.casefold() == wanted.casefold() or (
            form.isascii() and re.search(r"[A-Za-z]{2}", form) and words_of(form) == wanted_words
        ):
            same.append(letter)
    return same[0] if len(same) == 1 else None


def _valid_letter(letter: str, letters: str) -> str | None:
    return letter.upper() if letter.upper() in letters else None


def _search_phrases(text: str, choices: Choices, letters: str) -> str | None:
    """Return the letter of the last phrase that names a choice."""
    candidates: list[tuple[int, str]] = []
    for pattern in _PHRASES:
        for match in deque(pattern.finditer(text), maxlen=_MAX_PHRASES):
            letter = _valid_letter(match["letter"], letters)
            rest = text[match.end() : match.end() + 80]
            if not letter or _MORE_LETTERS.match(rest):
                continue
            is_marked = text[match.start("letter") - 1] in "([*`$\"'{" or text[
                match.end("letter") : match.end("letter") + 1
            ] in set(")].:*`$}")
            if match["letter"].isupper() or is_marked or _END_OF_CLAUSE.match(rest):
                candidates.append((match.start("letter"), letter))
    for match in deque(_ANSWER_IS.finditer(text), maxlen=_MAX_PHRASES):
        sentence = re.split(r"[.!?](?=\s|$|\*)", match[1], maxsplit=1)[0]
        if len(normal_answer(sentence)) > 1 and (letter := _match_text(sentence, choices)):
            # +1: the text "A only" takes precedence over its letter.
            candidates.append((match.start(1) + 1, letter))
    return max(candidates)[1] if candidates else None


def _search_lines(text: str, letters: str) -> str | None:
    """Search lines for a letter.

    Returns:
        The last line that is a letter. Otherwise the only letter that starts lines. Otherwise the
        letter of the last "(C)".
    """
    lines = [line.strip("# \t") for line in text.splitlines() if line.strip()]
    only = [match[1] for line in lines if (match := _LETTER_ONLY.fullmatch(line))]
    only = [letter for name in only if (letter := _valid_letter(name, letters))]
    if only:
        return only[-1]
    starts = [match[1] for line in lines if (match := _BEFORE_TEXT.match(line))]
    starts = {letter for name in starts if (letter := _valid_letter(name, letters))}
    if len(starts) == 1:
        return starts.pop()
    named = [name for name in _PARENTHESES.findall(_EITHER_OR.sub("", text)) if name in letters]
    return named[-1] if named else None


def _match_last_line(text: str, choices: Choices) -> str | None:
    lines = text.strip().splitlines()
    return _match_text(lines[-1], choices) if lines else None
