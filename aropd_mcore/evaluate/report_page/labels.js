// What metrics are called, and what they are measured in (METHOD section 7).

const LABELS = {
  loss: ["loss", "nats"],
  kl_target_student: ["KL(target ‖ student)", "nats"],
  kl_full_student: ["KL(full ‖ student)", "nats"],
  kl_partial_student: ["KL(partial ‖ student)", "nats"],
  kl_full_partial: ["KL(full ‖ partial)", "nats"],
  kl_engine_student: ["KL(engine ‖ student)", "nats"],
  residual_uptake: ["residual uptake", "nats"],
  residual_capture_ratio: ["residual capture ratio", ""],
  entropy_student: ["student's entropy", "nats"],
  entropy_partial: ["partial view's entropy", "nats"],
  entropy_full: ["full view's entropy", "nats"],
  cross_entropy: ["cross-entropy", "nats"],
  clip_fraction: ["clipped mass", "share"],
  topk_overlap: ["top-16 overlap, student and full", "share"],
  hindsight_token_rate: ["hindsight token rate", "share"],
  eos_prob_student: ["P(EOS) at response ends, student", "share"],
  eos_prob_partial: ["P(EOS) at response ends, partial view", "share"],
  eos_prob_full: ["P(EOS) at response ends, full view", "share"],
  eos_prob_target: ["P(EOS) at response ends, target", "share"],
  truncation_rise: ["truncation rate above the run's start", "share"],
  premature_answer_rate: ["premature answer rate", "share"],
  ends_with_answer_rate: ["ends with the answer", "share"],
  truncation_rate: ["truncation rate", "share"],
  padding_fraction: ["padding", "share"],
  importance_capped: ["capped importance ratios", "share"],
  response_length_mean: ["mean response length", "tokens"],
  num_response_tokens: ["response tokens a step", "tokens"],
  num_loss_tokens: ["loss tokens a step", "tokens"],
  grad_norm: ["gradient norm", ""],
  lr: ["learning rate", ""],
  tokens_per_second: ["response tokens a second", "tokens"],
  rollout_tokens_per_second: ["sampled tokens a second", "tokens"],
  rollout_staleness: ["rollouts' staleness, steps", ""],
  support_gap_full_partial: ["full over partial", "share"],
  support_gap_target_partial: ["target over partial", "share"],
  support_gap_full_student: ["full over student", "share"],
  support_gap_target_student: ["target over student", "share"],
};

/** [title, unit] of any metric, also NAME/BUCKET, seconds/PHASE and those that are not known. */
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
