// Further answers that a gateway may give beside the numbers: verdict for training, causes, replay,
// exports. Shown where they are present, by name, whatever their fields are.
import { html } from "./html.js";
import { Section } from "./parts.js";
import { num } from "./format.js";

const KNOWN = [
  ["verdict_for_training", "Verdict for training"],
  ["budget", "Off-policy budget"],
  ["explanation", "Why"],
  ["causes", "Causes"],
  ["replay", "Replay: what routing replay would remove"],
  ["exports", "Exports"],
];

export function Extras({ of }) {
  const found = KNOWN.filter(([key]) => of?.[key] != null && !isEmpty(of[key]));
  return found.map(([key, title]) => html`<${Section} id=${`extra-${key}`} title=${title}><${Value} value=${of[key]} /><//>`);
}

const isEmpty = (value) => typeof value === "object" && Object.keys(value).length === 0;

function Value({ value }) {
  if (value == null) return html`<span class="muted">–</span>`;
  if (typeof value === "number") return html`<span class="value">${num(value)}</span>`;
  if (typeof value !== "object") return html`${String(value)}`;
  if (Array.isArray(value)) return html`<ul class="plain">${value.map((v) => html`<li><${Value} value=${v} /></li>`)}</ul>`;
  return html`<dl class="pairs">
    ${Object.entries(value).map(([name, v]) => html`<dt>${name.replaceAll("_", " ")}</dt><dd><${Value} value=${v} /></dd>`)}
  </dl>`;
}
