"""Section `views`: the prompts of student and teacher."""

from typing import Annotated, Literal

from aropd_mcore.config.section import Positive, Ratio, Ratios, Section, by_type

PrivilegedView = Literal["partial", "full"]
View = Literal["student", PrivilegedView]


class ViewsConfig(Section):
    """Prompts of the three views: the student's, and the teacher's partial and full view."""

    system_prompt: str | None = (
        "Solve the problem. Think step by step between <reasoning> and </reasoning>, then give "
        "only the final answer between <answer> and </answer>."
    )
    """System turn of all three views. A row's own `system` replaces it. null: no system turn."""
    student_template: str = "{question}"
    """User turn of the student view. Field: {question}."""
    teacher_template: str = (
        "{question}\n\nHere is a worked example of a response to this problem:\n\n{trace}\n\n"
        "Now solve the problem yourself, in your own words, in the format asked for."
    )
    """User turn of the partial and full views. Fields: {question}, {trace}."""
    trace_template: str = "<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"
    """Text of the oracle trace, in the teacher's views and as the response that `sft` trains on.
    Fields: {reasoning}, {answer}."""
    partial_view: Literal["prefix_with_answer", "prefix_without_answer", "answer_only"] = (
        "prefix_with_answer"
    )
    """Part of the oracle trace that the partial view shows: the start of the reasoning with or
    without the answer, or the answer only."""
    partial_ratio: Annotated[Ratio | Ratios, by_type(list, Ratios, Ratio)] = 0.5
    """Share of the reasoning that the partial view shows. A list: each rollout of a training step
    draws one of its ratios at random, all with the same probability. Validation and `aropd
    diagnose` then use the median, for an even number of ratios the lower one."""
    partial_cut: Literal["words", "sentences", "lines", "tokens", "reference"] = "words"
    """Rule for cutting the reasoning at partial_ratio. `words`: at the end of a word, a run without
    white space. `sentences`: at the end of a sentence or paragraph. `lines`: at the end of a line.
    `tokens`: at the end of a token. `reference`: the rule of the authors' release. The first three
    count characters, rounded down, and move the cut forward. `tokens` counts tokens, rounded down.
    `reference` rounds characters up. There a word is a run of letters, digits, underscores and
    backslashes, and a reasoning of one or two words is shown whole."""
    chat_template_kwargs: dict[str, bool | int | float | str] = {}
    """Arguments of the model's chat template, such as enable_thinking or reasoning_effort. The
    template must read each of them. They apply to all three views."""
    teacher_chat_template_kwargs: dict[str, bool | int | float | str] = {}
    """Arguments for the partial and the full view, in addition to chat_template_kwargs and with
    precedence over them."""
    max_prompt_tokens: Positive = 1024
    """Largest number of tokens in each view's prompt."""
    on_long_prompt: Literal["cut", "cut_chat", "drop"] = "cut"
    """Action on a prompt that is longer than max_prompt_tokens. `cut`: cut the question on its left
    until the prompt fits. `cut_chat`: keep the last max_prompt_tokens tokens of each view's
    rendered chat, as the authors' release does. The system prompt is lost first. `drop`: drop the
    row. Shortened and dropped rows are counted."""

    @property
    def partial_ratios(self) -> tuple[float, ...]:
        """Ratios that a training step may draw, in the order of partial_ratio."""
        ratios = self.partial_ratio
        return tuple(ratios) if isinstance(ratios, list) else (ratios,)

    @property
    def median_ratio(self) -> float:
        """The ratio where none is drawn. The lower median of an even number."""
        return sorted(self.partial_ratios)[(len(self.partial_ratios) - 1) // 2]
