// A response token by token, coloured by its scores, with the likeliest tokens of each distribution.

const DISTRIBUTIONS = ["student", "partial", "full", "target"];
const COLOURINGS = [
  [
    "residual",
    "Residual",
    "log f − log p",
    "Difference of the full and the partial view. Warm: hindsight makes the token likelier. Cool: hindsight makes it less likely.",
  ],
  [
    "through",
    "Through the anchor",
    "log q − log p",
    "Change of the anchor by the bounded residual. This is the part of hindsight that the target keeps.",
  ],
  [
    "pull",
    "Pull on the student",
    "log q − log s",
    "Warm: training raises the token's probability under the student. Cool: training lowers it.",
  ],
];
const FULL_COLOUR = 5; // nats

const tokenValue = (rollout, mode, at) =>
  mode === "residual"
    ? rollout.residual[at]
    : mode === "through"
      ? rollout.target[at] - rollout.partial[at]
      : rollout.target[at] - rollout.student[at];
/** Returns [tint, strength in %]. The tint shows the sign. Small values remain visible. */
function tint(value) {
  const strength = 85 * Math.min(1, Math.abs(value) / FULL_COLOUR) ** 0.55;
  return [value < 0 ? "var(--cool)" : "var(--warm)", strength < 6 ? 0 : strength];
}
const signed = (value) => (value > 0 ? "+" : "") + format(value, "nats");
/** Returns a token's text with visible signs for white space. */
const visible = (text) =>
  text
    .replaceAll("\n", "↵")
    .replaceAll("\t", "⇥")
    .replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)) || "∅";

function inLoss(one, i) {
  const [first, end] = one.loss_tokens;
  return i >= first && i < end;
}

function readerSection(all) {
  const sources = all.flatMap((run) =>
    run.diagnoses.filter((one) => one.rollouts.length).map((one) => ({ run, one })),
  );
  if (!sources.length) return null;
  let source = sources[0],
    number = 0,
    mode = "residual",
    at = 0,
    pinned = 0;
  const rollout = () => source.one.rollouts[number];
  const text = (id) => source.one.vocabulary[id] ?? `#${id}`;

  const facts = h("p", { class: "facts" }),
    prompt = h("details", {}),
    scale = h("div", { class: "scale" });
  const tokens = h("div", {
    class: "tokens",
    role: "listbox",
    "aria-label": "Tokens of the response",
    "aria-orientation": "horizontal",
  });
  const strip = h("div", { class: "strip" }),
    side = h("div", {
      class: "card side",
      role: "region",
      "aria-live": "polite",
      "aria-label": "The token and its alternatives",
    });
  const rolloutPicker = h("select", { onchange: () => open(Number(rolloutPicker.value)) });
  const step = (name, by) =>
    h(
      "button",
      { type: "button", "aria-label": `${name} response`, onclick: () => open(number + by) },
      by < 0 ? "←" : "→",
    );
  const [previous, next] = [step("Previous", -1), step("Next", 1)];
  const modes = h(
    "div",
    { class: "segments", role: "group", "aria-label": "Colour by" },
    COLOURINGS.map(([id, name]) =>
      h(
        "button",
        { type: "button", "aria-pressed": String(id === mode), onclick: () => recolour(id) },
        name,
      ),
    ),
  );

  function open(index) {
    number = index;
    const one = rollout(),
      strongest = one.residual.reduce(
        (best, value, i) => (Math.abs(value) > Math.abs(one.residual[best]) ? i : best),
        0,
      );
    rolloutPicker.value = String(number);
    previous.disabled = number === 0;
    next.disabled = number === source.one.rollouts.length - 1;
    const count = one.hindsight.filter(Boolean).length;
    fill(
      facts,
      "Question ",
      h("b", {}, one.question.length > 160 ? `${one.question.slice(0, 160)}…` : one.question),
      " answer ",
      h("b", {}, one.answer || "–"),
      h(
        "span",
        { class: `badge ${one.ends_with_answer ? "good" : "bad"}` },
        one.ends_with_answer ? "ends with the answer" : "does not end with the answer",
      ),
      one.premature ? h("span", { class: "badge bad" }, "states the answer early") : null,
      one.finished ? null : h("span", { class: "badge bad" }, "cut off"),
      h("span", { class: "badge" }, `${one.ids.length} tokens, ${count} hindsight`),
    );
    prompt.replaceChildren(
      h("summary", {}, "The student's prompt"),
      h("pre", { tabindex: 0 }, one.prompt),
    );
    tokens.replaceChildren(...one.ids.map((id, i) => token(one, id, i)));
    recolour(mode);
    choose(strongest, false);
  }
  function token(one, id, i) {
    const classes = ["token", inLoss(one, i) ? "" : "left-out", one.hindsight[i] ? "hindsight" : ""]
      .join(" ")
      .trim();
    const node = h("span", {
      class: classes,
      role: "option",
      tabindex: -1,
      "aria-selected": "false",
      "aria-label": `${visible(text(id))}, residual ${signed(one.residual[i])}${one.hindsight[i] ? ", hindsight" : ""}`,
      onpointerenter: (event) => event.pointerType === "touch" || look(i),
      onclick: () => choose(i, true),
      onfocus: () => look(i),
    });
    const written = text(id);
    node.append(
      ...(written.includes("\n") ? [h("span", { class: "mark" }, "↵"), written] : [written]),
    );
    return node;
  }
  function recolour(id) {
    mode = id;
    [...modes.children].forEach((button, i) =>
      button.setAttribute("aria-pressed", String(COLOURINGS[i][0] === mode)),
    );
    const one = rollout(),
      [, name, formula, meaning] = COLOURINGS.find(([known]) => known === mode);
    [...tokens.children].forEach((node, i) => {
      const [colour, strength] = tint(tokenValue(one, mode, i));
      node.style.setProperty("--tint", colour);
      node.style.setProperty("--strength", `${strength.toFixed(1)}%`);
    });
    const stops = [-5, -4, -3, -2, -1, -0.5, -0.15, 0, 0.15, 0.5, 1, 2, 3, 4, 5].map((value) => {
      const [colour, strength] = tint(value);
      return `color-mix(in srgb, ${colour} ${strength.toFixed(0)}%, transparent) ${50 + 10 * value}%`;
    });
    scale.replaceChildren(
      h(
        "div",
        {
          class: "ramp",
          role: "img",
          "aria-label": `Colours: cool below zero, warm above, full at ${FULL_COLOUR} nats`,
        },
        h("i", { style: `background:linear-gradient(to right, ${stops.join(", ")})` }),
        h(
          "div",
          {},
          ["−5", "−2.5", "0", "+2.5", "+5 nats"].map((label) => h("span", {}, label)),
        ),
      ),
      h("span", {}, h("b", {}, `${name}: ${formula}. `), meaning),
    );
    drawStrip();
  }
  function drawStrip() {
    const one = rollout(),
      count = one.ids.length,
      wide = 1000,
      tall = 56;
    const root = svg("svg", {
      class: "bars",
      viewBox: `0 0 ${wide} ${tall}`,
      preserveAspectRatio: "none",
      height: tall,
      width: "100%",
      role: "img",
      "aria-label": "Values over the whole response",
    });
    root.append(
      svg("line", {
        x1: 0,
        x2: wide,
        y1: tall / 2,
        y2: tall / 2,
        style: "stroke:var(--line)",
        "vector-effect": "non-scaling-stroke",
      }),
    );
    one.ids.forEach((_, i) => {
      const value = tokenValue(one, mode, i),
        size = (tall / 2 - 2) * Math.min(1, Math.abs(value) / FULL_COLOUR) ** 0.55;
      const bar = { x: (wide * i) / count, width: Math.max((wide / count) * 0.86, 0.6) };
      root.append(
        svg("rect", {
          ...bar,
          y: value > 0 ? tall / 2 - size : tall / 2,
          height: Math.max(size, 0.5),
          style: `fill:var(--${value > 0 ? "full" : "partial"})`,
        }),
        svg("rect", {
          class: "place",
          ...bar,
          y: 0,
          height: tall,
          onclick: () => choose(i, true),
          onpointerenter: () => look(i),
        }),
      );
    });
    strip.replaceChildren(h("p", { class: "note" }, "The whole response, token by token"), root);
    mark();
  }
  function mark() {
    strip.querySelectorAll(".place").forEach((node, i) => node.classList.toggle("here", i === at));
  }
  /** Shows a token's details until another token is shown. */
  function look(i) {
    if (i !== at || !side.childElementCount) {
      at = i;
      describe();
    }
  }
  function choose(i, focus) {
    tokens.children[pinned]?.setAttribute("tabindex", "-1");
    tokens.children[pinned]?.setAttribute("aria-selected", "false");
    pinned = Math.max(0, Math.min(rollout().ids.length - 1, i));
    at = pinned;
    const node = tokens.children[pinned];
    node.setAttribute("tabindex", "0");
    node.setAttribute("aria-selected", "true");
    if (focus) node.focus();
    describe();
  }
  function describe() {
    const one = rollout(),
      id = one.ids[at];
    mark();
    const rows = one.top[at].map(([candidate, ...probabilities]) =>
      h(
        "tr",
        { class: candidate === id ? "sampled" : null },
        h("th", { scope: "row", title: text(candidate) }, visible(text(candidate))),
        probabilities.map(cell),
      ),
    );
    if (!one.top[at].some(([candidate]) => candidate === id))
      rows.push(
        h(
          "tr",
          { class: "sampled" },
          h("th", { scope: "row" }, visible(text(id))),
          DISTRIBUTIONS.map((name) => cell(Math.exp(one[name][at]))),
        ),
      );
    const sum = (name, formula, value) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, signed(value)), h("dt", {}, formula));
    side.replaceChildren(
      h(
        "h3",
        {},
        h("code", {}, visible(text(id))),
        h(
          "span",
          {},
          `token ${at + 1} of ${one.ids.length}${at < one.num_thinking_tokens ? ", thinking" : ""}${inLoss(one, at) ? "" : ", not in the loss"}${one.hindsight[at] ? ", hindsight" : ""}`,
        ),
      ),
      h(
        "dl",
        { class: "sums" },
        sum("residual", "log f − log p", one.residual[at]),
        sum("kept", "log q − log p", one.target[at] - one.partial[at]),
        sum("pull", "log q − log s", one.target[at] - one.student[at]),
      ),
      h(
        "table",
        { class: "probs" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            h("th", { scope: "col" }, "next token"),
            DISTRIBUTIONS.map((name) =>
              h("th", { scope: "col", style: `border-top-color:var(--${name})` }, name),
            ),
          ),
        ),
        h("tbody", {}, rows),
      ),
    );
    function cell(probability, column) {
      return h(
        "td",
        {},
        h(
          "div",
          { class: "bar-cell" },
          probability >= 0.9995
            ? "100 %"
            : probability < 0.0005
              ? "0"
              : `${(100 * probability).toFixed(1)} %`,
          probability < 0.0005
            ? null
            : h("i", {
                style: `width:${(100 * probability).toFixed(1)}%;background:var(--${DISTRIBUTIONS[column]})`,
              }),
        ),
      );
    }
  }
  /** Returns the index of the nearest token in the line above (-1) or below (1). */
  function vertical(by) {
    const here = tokens.children[pinned].getClientRects()[0];
    let best = pinned,
      least = Infinity;
    [...tokens.children].forEach((node, i) => {
      const box = node.getClientRects()[0],
        lines = ((box.top - here.top) * by) / here.height;
      if (lines < 0.5) return;
      const distance = 1000 * Math.round(lines * 4) + Math.abs(box.left - here.left);
      if (distance < least) [best, least] = [i, distance];
    });
    return best;
  }
  /** Returns the index of the next token in a direction beyond ±1 nat. */
  function salient(by) {
    const one = rollout();
    for (let i = pinned + by; i >= 0 && i < one.ids.length; i += by)
      if (Math.abs(tokenValue(one, mode, i)) >= 1) return i;
    return pinned;
  }
  tokens.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = {
      ArrowRight: () => pinned + 1,
      ArrowLeft: () => pinned - 1,
      ArrowDown: () => vertical(1),
      ArrowUp: () => vertical(-1),
      Home: () => 0,
      End: () => rollout().ids.length - 1,
      n: () => salient(1),
      p: () => salient(-1),
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    choose(moves[event.key](), true);
  });
  tokens.addEventListener("pointerleave", () => look(pinned));

  function openSource(index) {
    source = sources[index];
    rolloutPicker.replaceChildren(
      ...source.one.rollouts.map((one, i) =>
        h(
          "option",
          { value: String(i) },
          `${i + 1}. ${one.ends_with_answer ? "✓" : "✕"} ${one.question.slice(0, 48)}${one.question.length > 48 ? "…" : ""}`,
        ),
      ),
    );
    // Open the response with the largest residual.
    const moved = source.one.rollouts.map((one) => Math.max(...one.residual.map(Math.abs)));
    open(moved.indexOf(Math.max(...moved)));
  }
  const node = section(
    "reader",
    "Reader",
    "The student's own responses, with the scores of each token under the two privileged views. They show where hindsight leaks in, and where the anchor holds it back.",
    h(
      "div",
      { class: "controls" },
      control(
        "Diagnosis",
        select(
          sources.map(({ run, one }, i) => [String(i), `${run.name}: ${one.name}`]),
          "0",
          (value) => openSource(Number(value)),
        ),
      ),
      control("Response", rolloutPicker),
      h("div", { class: "segments" }, previous, next),
      h("div", { class: "field" }, "Colour by", modes),
    ),
    h(
      "div",
      { class: "reader" },
      h(
        "div",
        { class: "card" },
        facts,
        prompt,
        scale,
        tokens,
        strip,
        h(
          "p",
          { class: "hint" },
          h("kbd", {}, "←"),
          " ",
          h("kbd", {}, "→"),
          " ",
          h("kbd", {}, "↑"),
          " ",
          h("kbd", {}, "↓"),
          " move, ",
          h("kbd", {}, "n"),
          " ",
          h("kbd", {}, "p"),
          " next and previous token beyond ±1 nat. Wavy: a hindsight token. Faint: not in the loss.",
        ),
      ),
      side,
    ),
  );
  openSource(0);
  return node;
}
