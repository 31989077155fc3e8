// Titles and units of metrics (METHOD section 7). The data contains those of the token metrics.

const data = JSON.parse(document.getElementById("data").textContent);
const LABELS = {
  ...data.labels,
  truncation_rise: ["truncation rate above the run's start", "share"],
  premature_answer_rate: ["premature answer rate", "share"],
  ends_with_answer_rate: ["ends with the answer", "share"],
  truncation_rate: ["truncation rate", "share"],
  padding_fraction: ["padding", "share"],
  response_length_mean: ["mean response length", "tokens"],
  num_response_tokens: ["response tokens per step", "tokens"],
  num_loss_tokens: ["loss tokens per step", "tokens"],
  grad_norm: ["gradient norm", ""],
  lr: ["learning rate", ""],
  tokens_per_second: ["response tokens per second", "tokens"],
  rollout_tokens_per_second: ["sampled tokens per second", "tokens"],
  device_memory_peak_gb: ["peak device memory, GB", ""],
  mfu: ["model FLOP/s utilization", "share"],
  rollout_staleness: ["rollout staleness, steps", ""],
};

/** Returns [title, unit] of any metric, including NAME/BUCKET, seconds/PHASE and unknown names. */
function label(name) {
  if (LABELS[name]) return LABELS[name];
  const [head, tail] = name.split("/");
  if (head === "seconds") return [`seconds: ${tail}`, "seconds"];
  if (tail && LABELS[head]) return [`${LABELS[head][0]}, tokens ${tail}`, LABELS[head][1]];
  const quantile = /^response_length_p(\d+)$/.exec(name);
  if (quantile) return [`response length, ${quantile[1]} % quantile`, "tokens"];
  return [name.replaceAll("_", " "), ""];
}
const axisLabel = (name) => {
  const [title, unit] = label(name);
  const units = { nats: "nats", tokens: "tokens", seconds: "s", share: "% " };
  return unit && unit !== "share" && !title.includes(unit) ? `${title}, ${units[unit]}` : title;
};
