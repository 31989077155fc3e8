// All sections except the reader: methods, curves, step time, drift, accuracy and diagnoses.

const section = (id, title, lead, ...content) =>
  h(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    h("h2", { id: `${id}-title` }, title),
    lead ? h("p", { class: "lead" }, lead) : null,
    ...content,
  );
const select = (options, chosen, change) => {
  const node = h(
    "select",
    { onchange: () => change(node.value) },
    options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)),
  );
  return node;
};
const control = (text, input) => h("label", {}, text, input);
const mean = (values) => {
  const known = values.filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
};
/** Mean of a run's metric over the last tenth of its steps. */
const late = (run, name) =>
  run.metrics[name]
    ? mean(run.metrics[name].slice(-Math.max(1, Math.ceil(run.steps.length / 10))))
    : null;

function methodsSection(runs) {
  const tasks = [
    ...new Set(runs.flatMap((run) => run.evaluations.flatMap((one) => Object.keys(one.tasks)))),
  ];
  const metrics = [
    "kl_full_student",
    "residual_uptake",
    "hindsight_token_rate",
    "response_length_mean",
  ].filter((name) => runs.some((run) => late(run, name) !== null));
  const diagnosed = runs.some((run) => run.diagnoses.length);
  const heads = [
    "run",
    "method",
    "λ",
    "clip",
    "teacher",
    "steps",
    ...tasks.map((task) => [`${task} `, h("small", {}, "accuracy, 95 % interval")]),
    ...(diagnosed ? [["ends with the answer", h("small", {}, "diagnosed, %")]] : []),
    ...metrics.map((name) => [
      label(name)[0],
      h("small", {}, { nats: "nats", share: "%" }[label(name)[1]] || ""),
    ]),
  ];
  const rows = runs.map((run) => [
    [key(run.color, run.dash), " ", run.name],
    run.method.name ?? "–",
    run.method.residual_scale === null || run.method.residual_scale === undefined
      ? "–"
      : String(run.method.residual_scale),
    run.method.name === "SFT" || run.method.name === undefined
      ? "–"
      : run.method.residual_clip === null
        ? "none"
        : String(run.method.residual_clip),
    run.method.teacher ?? "–",
    run.num_steps ? format(run.num_steps, "tokens") : "–",
    ...tasks.map((task) => {
      const result = run.evaluations
        .map((one) => one.tasks[task])
        .filter(Boolean)
        .at(-1);
      return result
        ? [
            format(result.accuracy, "share"),
            " ",
            h(
              "span",
              { class: "pm" },
              `${format(result.interval_95[0], "share").replace(" %", "")}–${format(result.interval_95[1], "share")}`,
            ),
          ]
        : "–";
    }),
    ...(diagnosed
      ? [format(run.diagnoses.at(-1)?.metrics.ends_with_answer_rate, "share").replace(" %", "")]
      : []),
    ...metrics.map((name) => format(late(run, name), label(name)[1]).replace(" %", "")),
  ]);
  return section(
    "methods",
    "Methods",
    "Training metrics are means over the last tenth of a run's steps.",
    h("div", { class: "card" }, table(heads, rows, { label: "Methods" })),
  );
}

/** Exponentially weighted mean of each value and its predecessors. Weight 0 does not smooth. */
function smoothed(points, weight) {
  let sum = 0,
    total = 0;
  return points.map((p) => {
    if (p.y === null) return p;
    sum = weight * sum + p.y;
    total = weight * total + 1;
    return { x: p.x, y: sum / total };
  });
}
const pointsOf = (run, name) => run.steps.map((x, i) => ({ x, y: run.metrics[name][i] ?? null }));

function curvesSection(all, shown) {
  const names = [...new Set(all.flatMap((run) => Object.keys(run.metrics)))].sort((a, b) =>
    label(a)[0].localeCompare(label(b)[0]),
  );
  if (!names.length) return null;
  let name = names.includes("kl_full_student") ? "kl_full_student" : names[0],
    weight = 0.8;
  const runs = () => shown().filter((run) => run.metrics[name]);
  const spec = () => {
    const [title, unit] = label(name);
    return {
      title,
      unit,
      yLabel: axisLabel(name),
      xLabel: "step",
      xName: "step",
      height: 340,
      series: runs().map((run) => {
        const points = pointsOf(run, name);
        return {
          name: run.name,
          color: run.color,
          dash: run.dash,
          points: smoothed(points, weight),
          faint: weight ? points : null,
        };
      }),
    };
  };
  const host = h("div", {}),
    cards = h("div", { class: "cards" });
  const picker = select(
    names.map((one) => [one, label(one)[0]]),
    name,
    (value) => choose(value),
  );
  const range = h("input", {
    type: "range",
    min: 0,
    max: 0.98,
    step: 0.02,
    value: weight,
    "aria-label": "Smoothing",
    oninput: () => {
      weight = Number(range.value);
      chart.update(spec());
    },
  });
  const favourites = [
    "loss",
    "kl_full_student",
    "kl_target_student",
    "residual_uptake",
    "hindsight_token_rate",
    "entropy_student",
    "response_length_mean",
    "grad_norm",
  ].filter((one) => names.includes(one));
  const drawCards = () =>
    cards.replaceChildren(
      ...favourites.map((one) => {
        const series = shown()
          .filter((run) => run.metrics[one])
          .map((run) => ({
            color: run.color,
            dash: run.dash,
            points: smoothed(pointsOf(run, one), 0.8),
          }));
        return h(
          "button",
          { type: "button", "aria-pressed": String(one === name), onclick: () => choose(one) },
          h("span", {}, label(one)[0]),
          series.length ? sparkline(series) : null,
        );
      }),
    );
  function choose(value) {
    name = value;
    picker.value = value;
    chart.update(spec());
    favourites.forEach((one, i) =>
      cards.children[i].setAttribute("aria-pressed", String(one === name)),
    );
  }
  const node = section(
    "curves",
    "Curves",
    null,
    h(
      "div",
      { class: "card" },
      h("div", { class: "controls" }, control("Metric", picker), control("Smoothing", range)),
      host,
    ),
    cards,
  );
  const chart = lineChart(host, spec());
  drawCards();
  node.refresh = () => {
    chart.update(spec());
    drawCards();
  };
  return node;
}

function timeSection(shown, all) {
  const order = [
      "rollout",
      "batch",
      "teacher",
      "student",
      "optimizer",
      "sync",
      "other",
      "checkpoint",
    ],
    rank = (phase) => (order.indexOf(phase) + 99) % 99;
  const phases = [...new Set(all.flatMap((run) => Object.keys(run.metrics)))]
    .filter((name) => name.startsWith("seconds/"))
    .map((name) => name.slice(8))
    .sort((a, b) => rank(a) - rank(b));
  if (!phases.length) return null;
  const color = (phase) => seriesColor(phases.indexOf(phase));
  const host = h("div", { class: "times" });
  const draw = () => {
    const totals = shown()
      .map((run) => [run, phases.map((phase) => mean(run.metrics[`seconds/${phase}`] || []) || 0)])
      .filter(([, parts]) => parts.some(Boolean));
    const most = Math.max(...totals.map(([, parts]) => parts.reduce((a, b) => a + b, 0)));
    host.replaceChildren(
      ...totals.map(([run, parts]) => {
        const sum = parts.reduce((a, b) => a + b, 0);
        const text = parts.map((part, i) => `${phases[i]} ${format(part, "seconds")} s`).join(", ");
        return h(
          "div",
          {},
          h(
            "div",
            { class: "head" },
            h("span", {}, run.name),
            h("span", {}, `${format(sum, "seconds")} s per step`),
          ),
          h(
            "div",
            {
              class: "meter",
              role: "img",
              "aria-label": `${run.name}: ${text}`,
              style: `width:${(100 * sum) / most}%`,
            },
            parts.map((part, i) =>
              h("i", {
                style: `width:${(100 * part) / sum}%;background:${color(phases[i])}`,
                title: `${phases[i]}: ${format(part, "seconds")} s`,
              }),
            ),
          ),
        );
      }),
    );
    const rows = totals.map(([run, parts]) => [
      run.name,
      ...parts.map((part) => format(part, "seconds")),
    ]);
    host.append(
      table(
        [
          "seconds per step",
          ...phases.map((phase) => [key(color(phase), "", "block"), ` ${phase}`]),
        ],
        rows,
        { label: "Step time by phase" },
      ),
    );
  };
  draw();
  const node = section(
    "time",
    "Step time",
    "Means over all steps. The time of checkpoints is a mean over the steps that wait for one.",
    h("div", { class: "card" }, host),
  );
  node.refresh = draw;
  return node;
}

const BUCKETS = ["0-255", "256-511", "512-767", "768-1023", "1024-"];
const DRIFTS = [
  "kl_full_student",
  "kl_partial_student",
  "kl_full_partial",
  "kl_target_student",
  "hindsight_token_rate",
];

function driftSection(all, shown) {
  const trained = (run, name) => BUCKETS.map((bucket) => late(run, `${name}/${bucket}`));
  const names = DRIFTS.filter((name) =>
    all.some((run) => trained(run, name).some((v) => v !== null) || run.diagnoses.length),
  );
  if (!names.length) return null;
  const diagnosed = all.some((run) => run.diagnoses.length);
  let name = names[0];
  const byBucket = h("div", {}),
    byTenth = h("div", {});
  const specs = () => {
    const [title, unit] = label(name);
    const common = {
      title,
      unit,
      yLabel: axisLabel(name),
      dots: true,
      fromZero: true,
      height: 280,
    };
    return [
      {
        ...common,
        xLabel: "position in the response, tokens",
        xName: "tokens",
        categories: BUCKETS,
        series: shown()
          .map((run) => ({
            name: run.name,
            color: run.color,
            dash: run.dash,
            points: trained(run, name).map((y, x) => ({ x, y })),
          }))
          .filter((one) => one.points.some((p) => p.y !== null)),
      },
      {
        ...common,
        xLabel: "position in the response, % of its length",
        xName: "tenth from %",
        categories: [...Array(10).keys()].map((i) => `${10 * i}`),
        series: shown()
          .filter((run) => run.diagnoses.length)
          .map((run) => ({
            name: run.name,
            color: run.color,
            dash: run.dash,
            points: run.diagnoses.at(-1).tenths[name].map((y, x) => ({ x, y })),
          })),
      },
    ];
  };
  const node = section(
    "drift",
    "Drift by position",
    "Disagreement of the views and the student by position. A student that imitates hindsight drifts late in long responses.",
    h(
      "div",
      { class: "controls" },
      control(
        "Metric",
        select(
          names.map((one) => [one, label(one)[0]]),
          name,
          (value) => {
            name = value;
            node.refresh();
          },
        ),
      ),
    ),
    h(
      "div",
      { class: "columns" },
      h("div", { class: "card" }, h("h3", {}, "Training, last tenth of the steps"), byBucket),
      diagnosed
        ? h("div", { class: "card" }, h("h3", {}, "Diagnosed responses, by tenth"), byTenth)
        : null,
    ),
  );
  const charts = [
    lineChart(byBucket, specs()[0]),
    diagnosed ? lineChart(byTenth, specs()[1]) : null,
  ];
  node.refresh = () => specs().forEach((spec, i) => charts[i]?.update(spec));
  return node;
}

function accuracySection(all, shown) {
  const tasks = [
    ...new Set(all.flatMap((run) => run.evaluations.flatMap((one) => Object.keys(one.tasks)))),
  ];
  if (!tasks.length) return null;
  const hosts = tasks.map(() => h("div", {}));
  const spec = (task) => ({
    title: `Accuracy on ${task} by response length`,
    unit: "share",
    yLabel: "accuracy",
    xLabel: "response length, tokens",
    xName: "tokens",
    categories: BUCKETS,
    dots: true,
    dodge: true,
    height: 280,
    range: [0, 1],
    series: shown().flatMap((run) =>
      run.evaluations
        .filter((one) => one.tasks[task])
        .slice(-1)
        .map((one) => ({
          name: run.name,
          color: run.color,
          dash: run.dash,
          points: BUCKETS.map((bucket, x) => [x, one.tasks[task].by_length[bucket]])
            .filter(([, result]) => result)
            .map(([x, result]) => ({
              x,
              y: result.accuracy,
              low: result.interval_95[0],
              high: result.interval_95[1],
              note: `(${format(result.interval_95[0], "share")} to ${format(result.interval_95[1], "share")}, ${result.samples} responses)`,
            })),
        })),
    ),
  });
  const node = section(
    "accuracy",
    "Accuracy by response length",
    "Bars are 95 % confidence intervals.",
    h(
      "div",
      { class: "columns" },
      tasks.map((task, i) => h("div", { class: "card" }, h("h3", {}, task), hosts[i])),
    ),
  );
  const charts = tasks.map((task, i) => lineChart(hosts[i], spec(task)));
  node.refresh = () => charts.forEach((chart, i) => chart.update(spec(tasks[i])));
  return node;
}

const SIGNALS = {
  total: "total: full over student",
  partial: "partial over student",
  marginal: "marginal: full over partial",
};

function diagnosisSection(all) {
  const diagnoses = all.flatMap((run) => run.diagnoses.map((one) => [run, one]));
  if (!diagnoses.length) return null;
  const host = h("div", { class: "columns" });
  const show = (index) => {
    const one = diagnoses[index][1],
      {
        residual,
        hindsight,
        reliability,
        metrics,
        settings,
        response_ends: ends,
        predictors,
      } = one;
    const total = residual.counts.reduce((a, b) => a + b, 0);
    const chart = h("div", {}),
      most = Math.max(...hindsight.rates.flat(), 1e-9);
    const gaps = [
      "support_gap_full_partial",
      "support_gap_target_partial",
      "support_gap_full_student",
      "support_gap_target_student",
    ];
    host.replaceChildren(
      h(
        "div",
        { class: "card" },
        h("h3", {}, "Residuals of the sampled tokens"),
        chart,
        h(
          "p",
          { class: "note" },
          `Mean ${withUnit(residual.mean, "nats")}, over ${format(total, "tokens")} tokens. The outer bars include all values beyond.`,
        ),
      ),
      h(
        "div",
        { class: "card" },
        h("h3", {}, "Hindsight token rate by thresholds"),
        table(
          ["τ \\ ε", ...hindsight.floors.map((floor) => String(floor))],
          hindsight.gaps.map((gap, i) => [
            `${gap}`,
            ...hindsight.rates[i].map((rate, j) =>
              h(
                "td",
                {
                  class:
                    gap === settings.hindsight_gap &&
                    hindsight.floors[j] === settings.hindsight_floor
                      ? "here"
                      : null,
                  style: `background:color-mix(in srgb, var(--warm) ${(70 * Math.sqrt(rate / most)).toFixed(0)}%, transparent)`,
                },
                format(rate, "share").replace(" %", ""),
              ),
            ),
          ]),
          { label: "Hindsight token rate by thresholds, %", class: "heat" },
        ),
        h(
          "p",
          { class: "note" },
          "Share of tokens, in %, with log f − log p above τ nats (rows) and p below ε (columns). The run's own thresholds are outlined.",
        ),
      ),
      h(
        "div",
        { class: "card" },
        h("h3", {}, "Support gaps"),
        table(
          ["mass", "%"],
          gaps.map((name) => [label(name)[0], format(metrics[name], "share").replace(" %", "")]),
          { label: "Support gaps" },
        ),
        h(
          "p",
          { class: "note" },
          "Probability mass on tokens that only the first distribution supports, by the run's thresholds. Full over partial is the teacher's hindsight. Target over partial is the part of it that the target keeps.",
        ),
      ),
      h(
        "div",
        { class: "card" },
        h("h3", {}, "Response ends"),
        table(
          ["distribution", "P(EOS), %"],
          Object.entries(ends.eos_prob).map(([name, prob]) => [
            name,
            format(prob, "share").replace(" %", ""),
          ]),
          { label: "P(EOS) at response ends" },
        ),
        h(
          "p",
          { class: "note" },
          `Mean probability of the EOS token at the end of finished responses. Finished: ${format(ends.finished, "tokens")}. Cut at the limit: ${format(ends.cut, "tokens")}. A target far below the student teaches the student not to end there. The student's own value is high because it sampled these ends.`,
        ),
      ),
      h(
        "div",
        { class: "card" },
        h("h3", {}, "Predictors of a right answer"),
        table(
          ["signal", "AUC", "95 % interval"],
          Object.entries(SIGNALS).map(([name, title]) => {
            const { auc, interval_95: bounds } = predictors.signals[name],
              number = (value) => (value === null ? "–" : value.toFixed(3));
            return [title, number(auc), bounds ? `${number(bounds[0])}–${number(bounds[1])}` : "–"];
          }),
          { label: "Predictors of a right answer" },
        ),
        h(
          "p",
          { class: "note" },
          `${predictors.reason ? `No AUC: ${predictors.reason}.` : `${predictors.right} right and ${predictors.wrong} wrong responses. 0.5 is chance.`} Accuracy ${format(predictors.accuracy, "share")}.`,
        ),
      ),
      h(
        "div",
        { class: "card" },
        h("h3", {}, "Reliability of the teacher"),
        table(
          [
            "tokens of trace",
            "responses",
            "end with answer, %",
            "prefers right",
            "KL(full ‖ partial)",
          ],
          reliability.map((part) => [
            part.tokens_from === part.tokens_to
              ? `${part.tokens_from}`
              : `${part.tokens_from}–${part.tokens_to}`,
            format(part.responses, "tokens"),
            format(part.ends_with_answer, "share").replace(" %", ""),
            format(part.prefers_right, "share"),
            format(part.kl_full_partial, "nats"),
          ]),
          { label: "Reliability by length of the privileged context" },
        ),
        h(
          "p",
          { class: "note" },
          "Prefers right: probability that a response that ends with the gold answer has a higher mean of log f − log s than one that does not. 50 % is chance.",
        ),
      ),
    );
    const bins = residual.counts.map((count, i) => {
      const [from, to] = residual.edges.slice(i, i + 2);
      const name =
        i === 0
          ? `below ${to}`
          : i === residual.counts.length - 1
            ? `above ${from}`
            : `${from} to ${to}`;
      return {
        from,
        to,
        share: count / total,
        name: `${name.replaceAll("-", "−")} nats`,
        color: `var(--${from < 0 ? "partial" : "full"})`,
      };
    });
    histogram(chart, {
      title: "Residuals of the sampled tokens",
      yLabel: "share of tokens, logarithmic",
      xLabel: "log f − log p, nats",
      bins,
    });
  };
  show(0);
  return section(
    "diagnosis",
    "Diagnosis",
    "Scores of the student's own responses under the teacher's two views.",
    h(
      "div",
      { class: "controls" },
      control(
        "Diagnosis",
        select(
          diagnoses.map(([run, one], i) => [String(i), `${run.name}: ${one.name}`]),
          "0",
          (value) => show(Number(value)),
        ),
      ),
    ),
    host,
  );
}
