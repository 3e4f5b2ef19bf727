// From numbers to colours: bands of METRICS 2, and the steps of the token scales.
// A colour never stands alone: a band has a sign and a word, a token its number.

/** "green" | "amber" | "red" | null, as driftgate.bands.band. */
export function band(glossary, name, value, { bad = 0, slack = 1 } = {}) {
  const limits = glossary?.bands[name];
  if (!limits || value == null) return null;
  const wide = name === "kl_k3_rollout_train" ? slack : 1;
  const up = limits.ascending;
  const green = up ? value < limits.green * wide : value >= limits.green;
  const red = up ? value >= limits.red * wide : value < limits.red;
  if (red) return "red";
  return green && !bad ? "green" : "amber";
}

/** What colours a score or a cell as a whole, in words too: the worst, as driftgate.render.colour. */
const GATED = [
  ["kl_k3_rollout_train", "k3"],
  ["abs_log_ratio_mean", "mean |D|"],
  ["extreme_frac_tau2", "the share beyond ×2"],
  ["router_set_disagree_rate", "routes"],
];
export const BAND_ORDER = ["green", "amber", "red"];

/** The worst band of a score or of a cell, `{colour, by}`; both null where it is not comparable. */
export function worstBand(glossary, of, verdict) {
  const none = { colour: null, by: null };
  if (verdict === "no" || !of.measures) return none;
  const all = { ...of.router?.metrics, ...of.measures.metrics };
  const found = GATED.map(([name, by]) => ({ by, colour: band(glossary, name, all[name], { bad: name.startsWith("router") ? 0 : all.n_bad_tokens, slack: of.k3_slack }) }));
  const worst = BAND_ORDER.findLast((level) => found.some((f) => f.colour === level));
  return found.find((f) => f.colour === worst) ?? none;
}

export const scoreBand = (glossary, score) => worstBand(glossary, score, score.comparable.verdict).colour;

export const BAND_WORDS = {
  green: ["●", "within band"],
  amber: ["▲", "watch"],
  red: ["■", "out of band"],
};

/** Steps of |D|: between them stand the ratios that METRICS counts, ×1.25, ×2, ×5. */
const D_STEPS = [0.02, 0.05, 0.1, Math.log(1.25), Math.log(2), Math.log(5)];
const ENTROPY_STEPS = [0.1, 0.5, 1, 2, 3, 5];
const P_STEPS = [0.9, 0.5, 0.2, 0.05, 0.01, 0.001];
const MISS_STEPS = [0.0001, 0.05, 0.1, 0.2, 0.4, 0.6];
export const RATE_STEPS = [0.005, 0.02, 0.05, 0.1, 0.2, 0.4];

const stepUp = (value, steps) => steps.filter((limit) => value >= limit).length;

/** Steps of an expert's load, as multiples of an even spread. */
export const LOAD_STEPS = [0.25, 0.5, 1, 1.5, 2, 4];
const SHIFT_STEPS = [0.01, 0.02, 0.05, 0.1, 0.3, 1];

export const loadClass = (value) => (value == null ? "none" : `q${stepUp(value, LOAD_STEPS)}`);
export const shiftClass = (value) => {
  const step = value == null ? 0 : stepUp(Math.abs(value), SHIFT_STEPS);
  return step ? `${value < 0 ? "n" : "p"}${step}` : "q0";
};

/** The colour behind a class, for what is drawn on a canvas. */
export const cssOf = (cls) => getComputedStyle(document.documentElement).getPropertyValue(`--${cls === "q0" || cls === "none" ? "hover" : cls}`).trim();

export const rateClass = (value) => (value == null ? "q-none" : `q${stepUp(value, RATE_STEPS)}`);

/** What a token can be coloured by: its value, its class, its legend. */
export const MODES = {
  d: {
    label: "D",
    long: "D = log p(trainer) − log p(engine), nats",
    value: (t) => t.log_ratio,
    cls: (v) => (v == null ? "none" : v === 0 ? "q0" : `${v < 0 ? "n" : "p"}${stepUp(Math.abs(v), D_STEPS)}`),
    legend: [
      ["n6", "÷5 and less"],
      ["n5", "÷2"],
      ["n4", "÷1.25"],
      ["n2", "−0.05"],
      ["q0", "equal"],
      ["p2", "+0.05"],
      ["p4", "×1.25"],
      ["p5", "×2"],
      ["p6", "×5 and more"],
    ],
    ends: ["trainer finds it less likely", "trainer finds it more likely"],
  },
  abs: {
    label: "|D|",
    long: "|D|, nats",
    value: (t) => (t.log_ratio == null ? null : Math.abs(t.log_ratio)),
    cls: (v) => (v == null ? "none" : `q${stepUp(v, D_STEPS)}`),
    legend: D_STEPS.map((s, i) => [`q${i + 1}`, `≥ ${num2(s)}`]),
    ends: ["the same", "far apart, nats"],
  },
  p: {
    label: "p",
    long: "p(engine): probability the token was sampled with",
    value: (t) => (t.rollout_logprob == null ? null : Math.exp(t.rollout_logprob)),
    cls: (v) => (v == null ? "none" : `q${P_STEPS.filter((limit) => v < limit).length}`),
    legend: P_STEPS.map((s, i) => [`q${i + 1}`, `< ${s}`]),
    ends: ["certain", "unlikely"],
  },
  entropy: {
    label: "entropy",
    long: "entropy of the trainer's distribution at T = 1, nats",
    value: (t) => t.entropy,
    cls: (v) => (v == null ? "none" : `q${stepUp(v, ENTROPY_STEPS)}`),
    legend: ENTROPY_STEPS.map((s, i) => [`q${i + 1}`, `≥ ${s}`]),
    ends: ["sure", "open, nats"],
  },
  routes: {
    label: "routes",
    long: "share of the engine's experts, over all layers, that the trainer did not choose",
    value: (t, missed) => missed?.[t.index] ?? null,
    cls: (v) => (v == null ? "none" : `q${stepUp(v, MISS_STEPS)}`),
    legend: MISS_STEPS.map((s, i) => [`q${i + 1}`, i ? `≥ ${Math.round(100 * s)} %` : "> 0"]),
    ends: ["same experts", "other experts"],
  },
};

function num2(value) {
  return String(Number(value.toPrecision(2)));
}

/** Share of missed experts per token, from a StepRoutes answer; null without routes. */
export function missShare(routes) {
  if (!routes || routes.reason) return null;
  return routes.missed.map((row) => {
    const known = row.filter((m) => m != null);
    return known.length ? known.reduce((a, b) => a + b, 0) / (known.length * routes.k) : null;
  });
}
