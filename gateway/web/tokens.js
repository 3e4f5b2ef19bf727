// The response's tokens in colour. Ten thousand of them stay smooth: they are made once per mode, in
// chunks that the browser lays out only when they come into sight, and choosing one touches one
// element. A listbox to readers and keyboards: arrows, Home, End, and n / p for the largest |D|.
import { html, useEffect, useMemo, useRef } from "./html.js";
import { MODES } from "./scale.js";
import { visible } from "./format.js";

const CHUNK = 128;

/** From here on, chunks out of sight are not laid out. */
const LONG = 512;

export function Tokens({ tokens, mode, missed, chosen, onChoose, onHover }) {
  const box = useRef(null);
  const text = useMemo(() => chunks(tokens, mode, missed), [tokens, mode, missed]);
  useMark(box, chosen, text);
  const order = useMemo(() => byDrift(tokens), [tokens]);
  const at = (event) => event.target.closest?.("[data-i]")?.dataset.i;
  const onKeyDown = (event) => {
    const next = keyTarget(event.key, chosen, tokens.length, order);
    if (next == null || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    onChoose(next);
  };
  return html`<div
    class=${tokens.length > LONG ? "tokens long" : "tokens"}
    role="listbox"
    tabindex="0"
    aria-label=${`Tokens of the response, coloured by ${MODES[mode].long}. Arrow keys choose a token, n and p the next and previous by size of D.`}
    aria-activedescendant=${chosen == null ? undefined : `token-${chosen}`}
    ref=${box}
    onKeyDown=${onKeyDown}
    onClick=${(e) => at(e) != null && onChoose(Number(at(e)))}
    onMouseOver=${(e) => onHover(at(e) == null ? null : Number(at(e)))}
    onMouseLeave=${() => onHover(null)}
  >
    ${text}
  </div>`;
}

function chunks(tokens, mode, missed) {
  const { value, cls } = MODES[mode];
  const out = [];
  for (let start = 0; start < tokens.length; start += CHUNK) {
    const part = tokens.slice(start, start + CHUNK);
    out.push(
      html`<div class="chunk" role="group" aria-label=${`tokens ${start} to ${start + part.length - 1}`} key=${start}>
        <span class="gutter" aria-hidden="true">${start}</span>
        <span class="flow" role="presentation"
          >${part.map(
            (t) => html`<span role="option" aria-selected="false" id=${`token-${t.index}`} data-i=${t.index} class=${`t ${cls(value(t, missed))}`}>${shown(t.text)}</span>`,
          )}</span
        >
      </div>`,
    );
  }
  return out;
}

const shown = (text) => (text != null && text.includes("\n") ? visible(text).replaceAll("↵", "↵\n") : visible(text));

/** Marks the chosen token by hand: a render of all of them would be felt. */
function useMark(box, chosen, text) {
  useEffect(() => {
    if (chosen == null) return undefined;
    const token = box.current?.querySelector(`[data-i="${chosen}"]`);
    if (!token) return undefined;
    token.classList.add("chosen");
    token.setAttribute("aria-selected", "true");
    keepInSight(box.current, token);
    // Chosen from elsewhere on the page, or by its address: show where it stands.
    const { top, bottom } = box.current.getBoundingClientRect();
    if (bottom < 80 || top > innerHeight - 80) box.current.scrollIntoView({ block: "center" });
    return () => {
      token.classList.remove("chosen");
      token.setAttribute("aria-selected", "false");
    };
  }, [chosen, text]);
}

/** Scrolls the box, not the page. */
function keepInSight(box, token) {
  const outer = box.getBoundingClientRect();
  const inner = token.getBoundingClientRect();
  if (inner.top < outer.top + 8) box.scrollTop += inner.top - outer.top - outer.height / 3;
  else if (inner.bottom > outer.bottom - 8) box.scrollTop += inner.bottom - outer.bottom + outer.height / 3;
}

/** Indices of tokens with a D, the largest |D| first. */
export function byDrift(tokens) {
  return tokens
    .filter((t) => t.log_ratio != null)
    .sort((a, b) => Math.abs(b.log_ratio) - Math.abs(a.log_ratio))
    .map((t) => t.index);
}

function keyTarget(key, chosen, count, order) {
  const last = count - 1;
  const from = chosen ?? -1;
  if (key === "ArrowRight" || key === "ArrowDown") return Math.min(last, from + 1);
  if (key === "ArrowLeft" || key === "ArrowUp") return Math.max(0, from - 1);
  if (key === "Home") return 0;
  if (key === "End") return last;
  const rank = order.indexOf(from);
  if (key === "n") return order[Math.min(rank + 1, order.length - 1)];
  if (key === "p") return order[Math.max(rank - 1, 0)];
  return null;
}

export function Legend({ mode }) {
  const { legend, ends } = MODES[mode];
  return html`<p class="legend small">
    <span class="muted">${ends[0]}</span>
    ${legend.map(([cls, text]) => html`<span class=${`t ${cls}`}>${text}</span>`)}
    <span class="muted">${ends[1]}</span>
  </p>`;
}
