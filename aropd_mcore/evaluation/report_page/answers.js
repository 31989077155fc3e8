// Answers to one question over the steps of a run.

const VERDICTS = { right: ["good", "right"], wrong: ["bad", "wrong"] };
const shortened = (text, length) => (text.length > length ? `${text.slice(0, length)}…` : text);

function answersSection(all) {
  const sources = all.flatMap((run) => run.histories.map((history) => ({ run, history })));
  if (!sources.length) return null;
  const severalRuns = new Set(sources.map(({ run }) => run)).size > 1;
  const name = ({ run, history }) =>
    [severalRuns ? run.name : null, history.task, shortened(history.question, 60)]
      .filter(Boolean)
      .join(": ");
  const question = h("p", { class: "question", tabindex: 0 }),
    facts = h("p", { class: "facts" }),
    list = h("ol", { class: "answers" });
  const picker = select(
    sources.map((source, i) => [String(i), name(source)]),
    "0",
    (value) => open(Number(value)),
  );
  const move = (text, sign, by) =>
    h(
      "button",
      {
        type: "button",
        "aria-label": `${text} question`,
        onclick: () => open(Number(picker.value) + by),
      },
      sign,
    );
  const previous = move("Previous", "←", -1),
    next = move("Next", "→", 1);

  function answer(one, before, isTraining) {
    const [kind, verdict] = VERDICTS[one.verdict] ?? ["", "not graded"];
    const isSame = before && before.response === one.response;
    return h(
      "li",
      {},
      h(
        "p",
        { class: "facts" },
        h(
          "b",
          {},
          isTraining ? `step ${one.step}` : `after ${one.step} update${one.step === 1 ? "" : "s"}`,
        ),
        h("span", { class: `badge ${kind}` }, verdict),
        h("span", { class: "badge" }, `${format(one.num_tokens, "tokens")} tokens`),
        one.finished ? null : h("span", { class: "badge bad" }, "cut off"),
        one.mean_residual === null
          ? null
          : h("span", { class: "badge" }, `mean residual ${signed(one.mean_residual)} nats`),
        isSame ? h("span", {}, "same response as above") : null,
      ),
      isSame ? null : h("pre", { tabindex: 0 }, one.response),
    );
  }
  function open(index) {
    const { history } = sources[index],
      isTraining = history.task === "train";
    picker.value = String(index);
    previous.disabled = index === 0;
    next.disabled = index === sources.length - 1;
    fill(question, history.question);
    fill(
      facts,
      "Reference ",
      h("b", {}, history.answer || "–"),
      history.view === "student"
        ? null
        : h("span", { class: "badge" }, `teacher, ${history.view} view`),
    );
    fill(
      list,
      history.answers.map((one, i) => answer(one, history.answers[i - 1], isTraining)),
    );
  }
  open(0);
  return section(
    "answers",
    "Answers over the run",
    "Responses to one question at several steps of a run.",
    h(
      "div",
      { class: "card" },
      h(
        "div",
        { class: "controls" },
        control("Question", picker),
        h("div", { class: "segments" }, previous, next),
      ),
      question,
      facts,
      list,
    ),
  );
}
