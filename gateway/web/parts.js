// Small pieces that every view is made of.
import { html, useEffect, useRef, useState } from "./html.js";
import { readKey, save } from "./api.js";
import { report } from "./report.js";
import { band, BAND_WORDS } from "./scale.js";
import { clock, count, date, num, plural, signed, visible } from "./format.js";

export const routeTo = {
  overview: () => "#/",
  matrix: () => "#/matrix",
  cell: (c) => `#/cell/${[c.engine_digest, c.trainer_digest, c.model, c.kind].map(encodeURIComponent).join("/")}`,
  trajectories: () => "#/trajectories",
  trajectory: (name, query = {}) => {
    const given = Object.entries(query).filter(([, v]) => v != null && v !== "");
    const text = new URLSearchParams(given).toString();
    return `#/t/${encodeURIComponent(name)}${text ? `?${text}` : ""}`;
  },
  token: (worst, trajectory = worst.trajectory) =>
    routeTo.trajectory(trajectory, { step: worst.step, choice: worst.choice, token: worst.token_index }),
  compare: (a, b) => `#/compare?${new URLSearchParams({ a: a ?? "", b: b ?? "" })}`,
};

let entered = false;

/** Heading of a page; takes the focus when the page is entered, so that readers start there. */
export function Title({ children, raw, note }) {
  const ref = useRef(null);
  useEffect(() => {
    // Not on the first page: there the first Tab is the skip link's.
    if (entered) ref.current?.focus({ preventScroll: true });
    entered = true;
  }, []);
  return html`<header class="title">
    <h1 tabindex="-1" ref=${ref}>${children}</h1>
    ${note && html`<p class="muted">${note}</p>`}
    ${raw && html`<${Raw} href=${raw} what="this page" />`}
  </header>`;
}

export function Section({ title, raw, aside, children, id }) {
  return html`<section class="card" aria-labelledby=${id}>
    <div class="card-head">
      <h2 id=${id}>${title}</h2>
      <div class="card-aside">${aside}${raw && html`<${Raw} href=${raw} what=${title} />`}</div>
    </div>
    ${children}
  </section>`;
}

/** A browser's link cannot carry a read key: then what it leads to is saved. */
export function saveWithKey(event, href) {
  if (!readKey()) return;
  event.preventDefault();
  save(href);
}

/** The JSON behind what is shown. */
export function Raw({ href, what }) {
  const text = html`JSON<span class="sr"> behind ${what}</span>`;
  if (report) return html`<button type="button" class="raw link" onClick=${() => save(href)}>${text}</button>`;
  return html`<a class="raw" href=${href} onClick=${(event) => saveWithKey(event, href)}>${text}</a>`;
}

export function Waiting({ what }) {
  return html`<p class="muted waiting" role="status">Loading ${what}…</p>`;
}

export function Failure({ error, retry }) {
  return html`<div class="failure" role="alert">
    <p><strong>${error.message}</strong> ${error.fix}</p>
    ${retry && html`<button type="button" onClick=${retry}>Try again</button>`}
  </div>`;
}

/** An answer's content, or why there is none; what is old says so. */
export function Show({ answer, what, children }) {
  // That the gateway does not answer at all is said above every page.
  const refused = answer.error?.status > 0;
  if (answer.data != null) return html`${refused && html`<${Old} answer=${answer} what=${what} />`}${children(answer.data)}`;
  if (answer.error) return html`<${Failure} error=${answer.error} retry=${answer.reload} />`;
  return html`<${Waiting} what=${what} />`;
}

export const Sign = () => html`<span class="band red" aria-hidden="true">■</span>`;

function Old({ answer, what }) {
  return html`<p class="lost" role="status"><${Sign} /><span><strong>From ${clock(answer.atMs * 1e6, true)}: ${what}.</strong> Since then the gateway answers: ${answer.error.message} ${answer.error.fix}</span></p>`;
}

export function Empty({ children }) {
  return html`<p class="empty">${children}</p>`;
}

/** A wide table scrolls by itself, by keyboard too, so that the page never does. */
export function Scroll({ label, children, tall }) {
  return html`<div class=${tall ? "scroll tall" : "scroll"} role="region" aria-label=${`Table: ${label}`} tabindex="0">${children}</div>`;
}

export function BandMark({ colour, words = false }) {
  if (!colour) return null;
  const [sign, word] = BAND_WORDS[colour];
  return html`<span class=${`band ${colour}`} title=${word}
    ><span aria-hidden="true">${sign}</span><span class=${words ? "" : "sr"}> ${word}</span></span
  >`;
}

/** A metric's value with its band's sign and its unit; a null says why it is one. What is not
    comparable has no band: it does not measure engine against trainer. */
export function Metric({ glossary, name, measures, verdict, slack, unit = true, digits }) {
  const value = measures?.metrics[name] ?? null;
  if (value == null) {
    const why = measures?.undefined?.[name] ?? "no numbers";
    return html`<span class="muted" title=${why}>–<span class="sr"> ${why}</span></span>`;
  }
  const colour = verdict === "no" ? null : band(glossary, name, value, { bad: measures.metrics.n_bad_tokens, slack });
  const known = glossary?.metrics[name] ?? glossary?.router_metrics[name];
  const of = unit && known && known.unit !== "1" ? html` <span class="unit">${known.unit}</span>` : null;
  return html`<span class=${verdict === "no" ? "value muted" : "value"}><${BandMark} colour=${colour} /> ${num(value, digits)}${of}</span>`;
}

const VERDICTS = {
  yes: ["✓", "comparable"],
  converted: ["≈", "comparable, converted"],
  no: ["✕", "not comparable"],
};

export function Verdict({ verdict, short }) {
  const [sign, word] = VERDICTS[verdict];
  return html`<span class=${`verdict ${verdict}`} title=${word}
    ><span aria-hidden="true">${sign} </span><span class=${short ? "sr" : ""}>${word}</span></span
  >`;
}

/** How sure a cell's value is, and how much stands behind it. */
export function Basis({ cell, metric }) {
  const interval = cell.verdict === "no" ? null : cell.intervals[metric];
  const wide = interval ? `95 % ${num(interval.low)} … ${num(interval.high)}` : "no interval";
  return html`${wide} · ${plural(cell.n_tokens, "token")}, ${plural(cell.trajectories, "trajectory", "trajectories")}${cell.few ? html` <abbr title="fewer than 30 trajectories: intervals come out too narrow">(few)</abbr>` : ""}`;
}

/** How many weight versions lie between sampling and scoring, in words; nothing of a noise floor. */
export function lagWords(cell) {
  const labels = cell.kind === "drift" ? cell.by_lag.map((part) => part.label) : [];
  if (!labels.length) return "";
  if (labels.length > 1) return `weights ${labels.join(", ")} versions apart`;
  return { 0: "same weights", 1: "weights 1 version apart", unknown: "weight lag not known", differs: "other weights" }[labels[0]] ?? `weights ${labels[0]} versions apart`;
}

/** Scores are still to come: the numbers may change. */
export function Partial({ cell }) {
  if (!cell.partial) return null;
  const why = `${count(cell.scored)} of ${count(cell.captured)} captured answers are scored: the numbers may still change`;
  return html`<span class="tag" title=${why}>partial<span class="sr">: ${why}</span></span>`;
}

export function Time({ ns, seconds }) {
  if (ns == null) return html`<span>–</span>`;
  return html`<time datetime=${date(ns).toISOString()} title=${date(ns).toISOString()}>${clock(ns, seconds)}</time>`;
}

const LONG_NAME = 30;
const LONG_TOKEN = 24;

/** A name in a table by its two ends, for runs often differ at the last: the whole is its title. */
export function Name({ of }) {
  if (of.length <= LONG_NAME) return html`<span class="name">${of}</span>`;
  const ends = `${of.slice(0, LONG_NAME / 2)}…${of.slice(1 - LONG_NAME / 2)}`;
  return html`<span class="name" title=${of}><span aria-hidden="true">${ends}</span><span class="sr">${of}</span></span>`;
}

/** The worst token between the words around it; its page has the whole of a long one. */
export function InContext({ worst, chars = 44 }) {
  const dim = (text) => text && html`<span class="dim">${visible(text)}</span>`;
  return html`<span class="context"
    >${dim((worst.before ?? "").slice(-chars))}<mark>${visible(shortened(worst.text))}</mark>${dim((worst.after ?? "").slice(0, chars))}</span
  >`;
}

const shortened = (text) => (text?.length > LONG_TOKEN ? `${text.slice(0, LONG_TOKEN)}…` : text);

export function LogRatio({ value }) {
  if (value == null) return html`<span class="muted">–</span>`;
  return html`<span class="value">${signed(value)} <span class="unit">nats</span></span>`;
}

/** One of a few: real radio buttons, so that arrow keys and readers work as they should. */
export function Choice({ label, name, value, options, onChange }) {
  return html`<fieldset class="choice">
    <legend class="sr">${label}</legend>
    ${options.map(
      ([key, text, title]) => html`<label title=${title ?? ""} class=${key === value ? "on" : ""}
        ><input type="radio" name=${name} value=${key} checked=${key === value} onChange=${() => onChange(key)} />${text}</label
      >`,
    )}
  </fieldset>`;
}

export function Select({ label, value, options, onChange, hideLabel }) {
  return html`<label class="field"
    ><span class=${hideLabel ? "sr" : ""}>${label}</span>
    <select value=${value} onChange=${(e) => onChange(e.target.value)}>
      ${options.map(([key, text]) => html`<option value=${key} selected=${key === value}>${text}</option>`)}
    </select></label
  >`;
}

/** Prose with `code` in it. */
export function Words({ text }) {
  return (text ?? "").split("`").map((part, i) => (i % 2 ? html`<code>${part}</code>` : part));
}

export function Reasons({ reasons }) {
  return html`<ul class="reasons">
    ${reasons.map(
      (r) => html`<li>
        <code>${r.code}</code> <${Words} text=${r.detail} />
        ${r.fix && html`<span class="fix">→ <${Words} text=${r.fix} /></span>`}
      </li>`,
    )}
  </ul>`;
}

/** Open or closed is remembered while the page lives. */
export function Fold({ summary, children, open = false }) {
  const [shown, set] = useState(open);
  return html`<details open=${shown} onToggle=${(e) => set(e.target.open)}>
    <summary>${summary}</summary>
    ${shown && children}
  </details>`;
}
