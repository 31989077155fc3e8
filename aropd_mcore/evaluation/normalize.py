"""Normalization of answers. References and responses pass through the same functions.

plain_text      converts Unicode minus signs, spaces, digits, fractions and powers to ASCII or LaTeX
normal_answer   removes formatting from one answer: Markdown, currency, degrees, separators
is_words        decides whether an answer is compared as words
"""

import re
import unicodedata

LONGEST_ANSWER = 4_000
"""Length of the longest answer that is normalized. Some patterns take quadratic time."""

_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ"
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉"
_RAISED = re.compile(rf"([{_SUPERSCRIPTS}]+)|([{_SUBSCRIPTS}]+)")
_FRACTION = re.compile("[¼½¾⅐-⅞↉]")
_DIGIT_GROUP = re.compile(r"(?<=\d)[\u00a0\u2007-\u2009\u202f](?=\d{3}(?!\d))")
_CHARACTERS = str.maketrans(
    {"\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2044": "/", "\u2215": "/", "\u2217": "*"}
    | dict.fromkeys("‘’‛′", "'")
    | dict.fromkeys("“”„‟″", '"')
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad")
)
_DASH_AS_MINUS = re.compile(r"(?<![\w)])–(?=[\d.$\\])|(?:^|(?<=[($=]))—(?=[\d.$\\])")

_GREEK_NAMES = (
    "alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi omega Delta Omega"
)
_GREEK = {
    letter: f"\\{name} "
    for letter, name in zip("αβγδεθλμπρστφωΔΩ", _GREEK_NAMES.split(), strict=True)
}
_SYMBOLS = _GREEK | {
    "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "∞": "\\infty ", "±": "\\pm ",
    "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ",
    "∈": "\\in ", "≈": "=", "ℝ": "\\mathbb{R}",
}  # fmt: skip
_SYMBOL_TABLE = str.maketrans(_SYMBOLS)

_TEXT_COMMAND = r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf)|mbox)"
_BRACED = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$(.*)\$\$|\$([^$]*)\$|\\\((.*)\\\)|\\\[(.*)\\\]",
        r"\*\*(.*)\*\*|\*([^*]*)\*|__(.*)__|`+([^`]*)`+",
        r"\"([^\"]*)\"|'([^']*)'",
        rf"(?:{_TEXT_COMMAND}|\\(?:boldsymbol|underline|boxed|fbox))\s*{_BRACED}",
    )
]
_MARKED = re.compile(r"\*\*([^*]+)\*\*|`([^`]+)`")
_END = re.compile(r"(?:\s|[.,;:](?![.])|(?<=[A-Za-z]{2})!|(?<!\\)\\[,;:! ])+$")
_START = re.compile(
    r"^(?:\s|[=:,;]|\\[,;:! ]"
    r"|(?:the\s+)?(?:final\s+)?answer\s*(?:is|:)|it(?:'s|\s+is)\s|\\approx(?![a-z])|(?:about|approximately)\s)+",
    re.IGNORECASE,
)
_SPACES = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s+")
_NO_MEANING = re.compile(
    r"\\(?:text)?color\s*\{[^{}]*\}|(?<=\d)\s*\^\s*(?:\{\s*)?(?:\\(?:text|mathrm|textrm)\s*\{)?"
    r"(?:st|nd|rd|th)(?![A-Za-z])\}{0,2}"
    r"|(?<!\\)\\!\s*|\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])"
    r"|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|\\degree(?![A-Za-z])|°(?:\s*[CF]\b)?"
    r"|(?:\bUS)?\\?[$€£¥₹₩₽]"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\{,\}| )\d{3})+(?![\d])(?!,\d)")
_CONNECTIVE = re.compile(
    r"\s*,?\s*(?:\\(?:text|mathrm|mbox)\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*"
)
_TEXT = re.compile(rf"{_TEXT_COMMAND}\s*\{{([^{{}}]*)\}}")
_POWER_OF_TEN = re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)")
_FUNCTIONS = r"sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|lim|max|min|gcd|lcm|mod"
_BARE_FUNCTION = re.compile(rf"(?<![A-Za-z\\{{])({_FUNCTIONS}|pi|infty)(?![A-Za-z])")
_ROOT = re.compile(
    r"(?:√|(?<![A-Za-z\\])sqrt)\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z])))"
)
_PERCENT = re.compile(r"\s*(?:(?<!\\)%|(?<=\d)\s*\bpercent(?:age)?\b)")
_WORD = re.compile(r"(?:^|\s)[(\"']*[^\W\d_]{2,}(?:[.'-]+[^\W\d_]+)*[.,;:!?)\"']*(?:\s|$)")
_MATHEMATICS = re.compile(r"[=^_<>+&\[{]|\\(?:begin|frac|sqrt)|(?:^|\s)[-*/](?:\s|$)")
# Other two-letter words, such as the `mn` in `5 mn`, and other words without a space before them
# are variables.
_SHORT_UNITS = (
    "[cdkmnμ]?m|[cdkm]?[lL]|[kmM]?g|mi|in|ft|yds?|lbs?|oz|hrs?|ms|min|sec|mph|kph|km/?h|rpm"
    "|[kMG]?Hz|[kMG]?W|[kM]?J|[kM]?Pa|[kMG]?eV|[kM]?N|[kM]?cal|deg|rad|mol|Rs|USD|EUR|GBP|INR|cts?"
    "|pts?|sq|cu|st|nd|rd|th"
)
_UNIT = re.compile(
    rf"""(?<=[\d}})%])
    (?:
        \s*+
        (?:
            {_TEXT_COMMAND}\s*\{{[^{{}}]*\}}  # \text{{ cm}}
            | /
            | (?<=\s)(?:per|of)(?![A-Za-z])
            | (?<=[A-Za-z.]\s)an?(?![A-Za-z])  # dollars a day
            | (?!(?:[A-Za-z]|m\^)(?![A-Za-z]))(?:{_SHORT_UNITS})(?![A-Za-z])\.?
            | [aApP]\.?[mM](?![A-Za-z])\.?
            | (?<=\s)(?=[A-Za-z]{{0,2}}[aeiouAEIOU])[A-Za-z]{{3}}[A-Za-z.]*+  # a word
            | [A-Za-z]{{5}}[A-Za-z.]*+
            | (?<=[\s/])[ACJKLNVWghms](?![A-Za-z])
            | [cdk]?m(?=\s*\^)  # m^2
        )
        (?:\s*\^\s*\{{?\s*-?[1-3]\s*\}}?)?+
    )++$""",
    re.VERBOSE,
)


def plain_text(text: str) -> str:
    """Convert typographic characters to ASCII or LaTeX. Letters and line breaks stay.

    `x²` becomes `x^{2}`, `½` becomes `\\frac{1}{2}`, and U+2212 becomes a hyphen. Full-width
    digits, special spaces and curly quotes become plain ones. A special space within a number is
    removed.
    """
    if text.isascii():
        return text
    text = _RAISED.sub(_raised, text)
    text = _FRACTION.sub(_vulgar_fraction, text)
    text = _DIGIT_GROUP.sub("", text)
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    return _DASH_AS_MINUS.sub("-", text)


def _raised(match: re.Match[str]) -> str:
    digits = unicodedata.normalize("NFKC", match[0]).replace("\u2212", "-")
    return f"^{{{digits}}}" if match[1] else f"_{{{digits}}}"


def _vulgar_fraction(match: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return f"\\frac{{{above}}}{{{below}}}"


def normal_answer(text: str) -> str:
    """Convert one answer to LaTeX or words without Markdown, currency, degrees and separators.

    A text longer than LONGEST_ANSWER is not an answer: only its characters and spaces change.
    """
    text = re.sub(r"\s+", " ", plain_text(text)).strip()
    if len(text) > LONGEST_ANSWER:
        return text
    text = text.translate(_SYMBOL_TABLE)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}|^\s*\{\s*\}\s*$", r"\\emptyset", text)
    text = _unwrap(text)
    text = _SPACES.sub(" ", _NO_MEANING.sub("", _MARKED.sub(r"\1\2", text)))
    text = _unwrap(text)
    if not text.startswith(("(", "[", "\\{")):  # (1,234) is a pair
        text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", text)
    text = _PERCENT.sub(r"\\%", text)
    text = _POWER_OF_TEN.sub(r"\1 \\times 10^{\2}", text)
    text = re.sub(r"(?<=[\w)}])\*\*(?=[\w({\-])", "^", text)
    text = re.sub(r"\^\s*([-+]?\d+)", r"^{\1}", text)
    text = re.sub(r"\\frac\s*(\w|\\pi)\s*(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<![\w.])(\d+) (\d+)/(\d+)(?!\w)", r"\1\\frac{\2}{\3}", text)
    listed = _CONNECTIVE.sub(", ", re.sub(r"^(?:either|both)\s", "", text, flags=re.IGNORECASE))
    if not is_words(listed):
        text = _BARE_FUNCTION.sub(r"\\\1 ", listed)
    return text.strip()


def _unwrap(text: str) -> str:
    """Remove wrappers around the whole text, and punctuation and introductions at its ends."""
    for _ in range(10):
        before = text
        text = _START.sub("", _END.sub("", text))
        for wrapper in _WRAPPERS:
            if match := wrapper.fullmatch(text):
                inner = next(group for group in match.groups() if group is not None)
                # "$a$ and $b$" is not one formula.
                if not re.search(r"\$|\*\*|\\\)|\\\]", inner):
                    text = inner
        if text == before:
            break
    return text


def without_unit(text: str) -> str:
    """Remove a unit: `18 dollars per day`, `18\\text{ cm}^2` and `18 cm^{2}` become `18`."""
    value = _UNIT.sub("", text).strip()
    return text if not value or is_words(value) else value


def is_words(text: str) -> bool:
    """Return whether an answer consists of words, not of products of variables."""
    plain = without_text_commands(text)
    return not _MATHEMATICS.search(plain) and bool(_WORD.search(_BARE_FUNCTION.sub("", plain)))


def without_text_commands(text: str) -> str:
    """Remove LaTeX text commands: `\\text{B. } 15` becomes `B.  15`."""
    return _TEXT.sub(r"\1", text)


def words_of(text: str) -> list[str]:
    """Split an answer into its casefolded words and numbers, without a leading article."""
    words = re.findall(r"[^\W_]+(?:[.'/-][^\W_]+)*", without_text_commands(text).casefold())
    return words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words
