// Expert load of one cell: how each layer spreads its tokens over its experts, by engine and trainer.
import { html, useEffect, useRef, useState } from "../html.js";
import { paths, useAnswer } from "../api.js";
import { useTheme } from "../chart.js";
import { count, percent, plural, side } from "../format.js";
import { Choice, Empty, routeTo, Scroll, Section, Select, Show } from "../parts.js";
import { cssOf, loadClass, shiftClass, LOAD_STEPS } from "../scale.js";

const SIDES = [
  ["rollout", "engine", "the engine's share of tokens, as a multiple of an even spread"],
  ["train", "trainer", "the trainer's share of tokens, as a multiple of an even spread"],
  ["shift", "trainer − engine", "what the trainer sends there more (orange) or less (blue), in even shares"],
];

/** Share of a layer's choices that go to each expert, as a multiple of an even spread. */
function spread(counts) {
  const total = counts.reduce((a, b) => a + b, 0);
  return counts.map((n) => (total ? (n / total) * counts.length : null));
}

const valuesOf = (layer, side) => {
  if (side !== "shift") return spread(layer[side]);
  const [a, b] = [spread(layer.rollout), spread(layer.train)];
  return a.map((v, e) => (v == null || b[e] == null ? null : b[e] - v));
};

/** Of one of `cells`, which can be chosen where there are several. */
export function ExpertLoad({ cells }) {
  const [name, setName] = useState(null);
  if (!cells.length) return null;
  const cell = cells.find((c) => routeTo.cell(c) === name) ?? cells[0];
  const options = cells.map((c) => [routeTo.cell(c), `${c.model}: ${side(c.engine)} → ${side(c.trainer)}`]);
  return html`<${Load} key=${routeTo.cell(cell)} cell=${cell} pick=${cells.length > 1 && html`<${Select} label="Cell" hideLabel value=${routeTo.cell(cell)} options=${options} onChange=${setName} />`} />`;
}

function Load({ cell, pick }) {
  const path = paths.load(cell);
  const answer = useAnswer(path);
  const [shown, setShown] = useState("rollout");
  return html`<${Section} id="load" title="Expert load" raw=${path} aside=${html`${pick}<${Choice} label="Side of the load" name="load-side" value=${shown} options=${SIDES} onChange=${setShown} />`}>
    <${Show} answer=${answer} what="expert load">
      ${(load) =>
        !load.answers
          ? html`<${Empty}>None of the newest ${count(load.limit)} scored answers has routes of both sides.<//>`
          : html`<p class="muted small">
                Each square is an expert, each row a layer: ${SIDES.find(([key]) => key === shown)[2]}.
                Over the newest ${plural(load.answers, "answer")} (at most ${count(load.limit)} are read), ${count(load.k)} of ${count(load.experts)} experts a token.
              </p>
              <${Key} side=${shown} />
              <${Squares} load=${load} side=${shown} />
              <${ByLayer} load=${load} />`}
    <//>
  <//>`;
}

function Key({ side }) {
  const steps =
    side === "shift"
      ? [["n6", "−1"], ["n4", "−0.1"], ["q0", "the same"], ["p4", "+0.1"], ["p6", "+1"]]
      : [["q0", `< ${LOAD_STEPS[0]}`], ...LOAD_STEPS.map((s, i) => [`q${i + 1}`, `≥ ${s}×`])];
  return html`<p class="legend small">${steps.map(([cls, text]) => html`<span class=${`t ${cls}`}>${text}</span>`)}</p>`;
}

const ROW_PX = 14;
const GAP_PX = 1;

/** A canvas: 48 layers of 128 experts are six thousand squares. The table below has the numbers. */
function Squares({ load, side }) {
  const ref = useRef(null);
  const theme = useTheme();
  const [at, setAt] = useState(null);
  const rows = load.layers.length;
  useEffect(() => {
    const canvas = ref.current;
    const draw = () => {
      const width = canvas.clientWidth;
      canvas.width = width * devicePixelRatio;
      canvas.height = rows * ROW_PX * devicePixelRatio;
      const pen = canvas.getContext("2d");
      pen.scale(devicePixelRatio, devicePixelRatio);
      const step = width / load.experts;
      const known = new Map();
      const colour = (cls) => known.get(cls) ?? known.set(cls, cssOf(cls)).get(cls);
      load.layers.forEach((layer, l) =>
        valuesOf(layer, side).forEach((value, e) => {
          pen.fillStyle = colour(side === "shift" ? shiftClass(value) : loadClass(value));
          pen.fillRect(e * step, l * ROW_PX, Math.max(step - GAP_PX, 0.75), ROW_PX - GAP_PX);
        }),
      );
    };
    const resize = new ResizeObserver(draw);
    resize.observe(canvas);
    return () => resize.disconnect();
  }, [load, side, theme]);
  const point = (event) => {
    const box = ref.current.getBoundingClientRect();
    const layer = load.layers[Math.floor((event.clientY - box.top) / ROW_PX)];
    const expert = Math.floor(((event.clientX - box.left) / box.width) * load.experts);
    setAt(layer && expert >= 0 && expert < load.experts ? { layer, expert } : null);
  };
  return html`<div class="load">
    <canvas role="img" aria-label=${`Load of ${load.experts} experts in ${rows} layers; the table below has the busiest of each layer`} style=${{ height: `${rows * ROW_PX}px` }} ref=${ref} onMouseMove=${point} onMouseLeave=${() => setAt(null)}></canvas>
    <p class="axis-note"><span>${at ? told(at) : "point at a square"}</span><span>expert 0 to ${load.experts - 1} →</span></p>
  </div>`;
}

function told({ layer, expert }) {
  const share = (counts) => percent(counts[expert] / (counts.reduce((a, b) => a + b, 0) || 1));
  return `layer ${layer.layer}, expert ${expert}: engine ${share(layer.rollout)}, trainer ${share(layer.train)} of its choices`;
}

function busiest(counts) {
  const values = spread(counts);
  const expert = values.reduce((best, v, e) => (v > values[best] ? e : best), 0);
  return html`${expert} <span class="muted">${values[expert]?.toFixed(1) ?? "–"}×</span>`;
}

const idle = (counts) => counts.filter((n) => n === 0).length;

function ByLayer({ load }) {
  const worst = load.layers.reduce((most, l) => Math.max(most, l.apart ?? 0), 0);
  return html`<${Scroll} label="Expert load by layer" tall>
    <table class="rows">
      <thead><tr><th scope="col" class="n">layer</th><th scope="col" class="n">tokens</th><th scope="col" class="n">busiest, engine</th><th scope="col" class="n">busiest, trainer</th><th scope="col" class="n">idle, engine</th><th scope="col" class="n">idle, trainer</th><th scope="col" class="n">load moved</th></tr></thead>
      <tbody>
        ${load.layers.map((l) => html`<tr>
          <th scope="row" class="n">${l.layer}</th>
          <td class="n">${count(l.tokens)}</td>
          <td class="n nowrap">${busiest(l.rollout)}</td>
          <td class="n nowrap">${busiest(l.train)}</td>
          <td class="n">${idle(l.rollout)}</td>
          <td class="n">${idle(l.train)}</td>
          <td class="n nowrap">${percent(l.apart)}${worst > 0 && l.apart === worst ? html` <span class="tag">most</span>` : ""}</td>
        </tr>`)}
      </tbody>
    </table>
  <//>
  <p class="muted small">× is the multiple of an even spread. Load moved: the share of choices that the trainer gives to other experts, after all tokens are added up; tokens that swap experts cancel out.</p>`;
}
