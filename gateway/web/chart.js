// uPlot in Preact: a chart that follows its width and the colour scheme. It is a picture to readers;
// every chart stands beside a table with the same numbers.
import { html, useEffect, useRef, useState } from "./html.js";
import uPlot from "./vendor/uplot/uplot.js";
import { round } from "./format.js";

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Redraws when the colour scheme changes. */
export function useTheme() {
  const [theme, set] = useState(document.documentElement.dataset.theme);
  useEffect(() => {
    const changed = () => set(document.documentElement.dataset.theme);
    window.addEventListener("driftgate-theme", changed);
    return () => window.removeEventListener("driftgate-theme", changed);
  }, []);
  return theme;
}

function Plot({ options, data, height, label }) {
  const ref = useRef(null);
  const theme = useTheme();
  useEffect(() => {
    const box = ref.current;
    const plot = new uPlot({ ...options(css), width: Math.max(box.clientWidth, 120), height }, data, box);
    const resize = new ResizeObserver(() => plot.setSize({ width: Math.max(box.clientWidth, 120), height }));
    resize.observe(box);
    return () => {
      resize.disconnect();
      plot.destroy();
    };
  }, [options, data, height, theme]);
  return html`<div class="plot" role="img" aria-label=${label} ref=${ref}></div>`;
}

const axis = (color, extra) => ({
  stroke: color("--muted"),
  grid: { stroke: color("--line"), width: 1 },
  ticks: { stroke: color("--line"), width: 1, size: 4 },
  font: "11px ui-sans-serif, system-ui, sans-serif",
  ...extra,
});

/** Fills the zones of a band behind the lines: watch from green's end, out of band from red's. */
function zones(limits, color) {
  return (u) => {
    if (!limits) return;
    const { left, top, width, height } = u.bbox;
    const y = (v) => Math.min(Math.max(u.valToPos(v, "y", true), top), top + height);
    const fill = (from, to, colour) => {
      u.ctx.fillStyle = colour;
      u.ctx.fillRect(left, to, width, from - to);
    };
    u.ctx.save();
    fill(y(limits.green), y(limits.red), color("--zone-amber"));
    fill(y(limits.red), top, color("--zone-red"));
    u.ctx.restore();
  };
}

function ruler(values, color, dash) {
  return (u) => {
    for (const value of values) {
      if (!(value > 0)) continue;
      const y = Math.round(u.valToPos(value, "y", true)) + 0.5;
      if (y < u.bbox.top || y > u.bbox.top + u.bbox.height) continue;
      u.ctx.save();
      u.ctx.strokeStyle = color("--floor");
      u.ctx.setLineDash(dash);
      u.ctx.lineWidth = devicePixelRatio;
      u.ctx.beginPath();
      u.ctx.moveTo(u.bbox.left, y);
      u.ctx.lineTo(u.bbox.left + u.bbox.width, y);
      u.ctx.stroke();
      u.ctx.restore();
    }
  };
}

const positive = (values) => values.filter((v) => v > 0);

/** Drift over time on a logarithmic axis, its bands behind it and its noise floors dashed. */
export function DriftChart({ times, values, limits, floors, label }) {
  const data = [times, values.map((v) => (v > 0 ? v : null))];
  const seen = positive([...values, ...floors, limits?.green, limits?.red]);
  const low = 10 ** Math.floor(Math.log10(Math.min(...seen, 1)));
  const high = 10 ** Math.ceil(Math.log10(Math.max(...seen, low * 10)));
  const first = times[0] ?? 0;
  const last = times.at(-1) ?? 1;
  const pad = Math.max(1, (last - first) * 0.03);
  const options = (color) => ({
    legend: { show: false },
    cursor: { y: false, points: { size: 7 } },
    padding: [8, 8, 0, 0],
    scales: { x: { time: true, range: [first - pad, last + pad] }, y: { distr: 3, range: [low, high] } },
    axes: [
      axis(color, { size: 30, space: 90, values: (_, ticks) => timeLabels(ticks, last - first) }),
      axis(color, { size: 48, splits: () => decades(low, high), filter: (_, ticks) => ticks, values: (_, ticks) => ticks.map((t) => (t ? round(t, 1) : "")) }),
    ],
    series: [
      {},
      {
        stroke: color("--line-a"),
        width: 1.75,
        spanGaps: true,
        points: { show: true, size: 5, fill: color("--line-a"), stroke: color("--line-a") },
      },
    ],
    hooks: { drawAxes: [zones(limits, color), ruler(floors, color, [6, 4])] },
  });
  return html`<${Plot} options=${useStable(options, [times, values, limits, floors])} data=${useStable(data, [times, values])} height=${170} label=${label} />`;
}

function decades(low, high) {
  const [from, to] = [Math.round(Math.log10(low)), Math.round(Math.log10(high))];
  const every = Math.ceil((to - from) / 6);
  const found = [];
  for (let d = from; d <= to; d += every) found.push(10 ** d);
  return found;
}

/** As short as the span allows; a label that only repeats is left out. */
function timeLabels(ticks, spanS) {
  const words = ticks.map((t) => {
    const at = new Date(t * 1000);
    if (spanS > 2 * 86400) return at.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
    const second = spanS < 900 ? "2-digit" : undefined;
    return at.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second });
  });
  return words.map((word, i) => (word === words[i - 1] ? "" : word));
}

/** D of every token along a response, as bars from 0; a click chooses the token. */
export function ResponseChart({ values, label, unit, onPick }) {
  const xs = values.map((_, i) => i);
  const data = [xs, values];
  const options = (color) => ({
    legend: { show: false },
    cursor: { y: false, points: { show: false } },
    padding: [6, 8, 0, 0],
    scales: { x: { time: false, range: [-0.6, Math.max(values.length - 0.4, 1)] }, y: { range: around(values) } },
    axes: [
      axis(color, { size: 26, grid: { show: false }, values: (_, t) => t.map((v) => (Number.isInteger(v) ? v : "")) }),
      axis(color, { size: 48, values: (_, t) => t.map((v) => round(v)) }),
    ],
    series: [
      {},
      {
        paths: () => null,
        points: { show: false },
      },
    ],
    hooks: {
      draw: [bars(color)],
      init: [
        (u) => u.over.addEventListener("click", () => u.cursor.idx != null && onPick(u.cursor.idx)),
      ],
    },
  });
  return html`<div>
    <${Plot} options=${useStable(options, [values])} data=${useStable(data, [values])} height=${120} label=${label} />
    <p class="axis-note"><span>${unit}</span><span>token of the response →</span></p>
  </div>`;
}

function around(values) {
  const known = values.filter((v) => v != null);
  const low = Math.min(0, ...known);
  const high = Math.max(0, ...known);
  const pad = 0.08 * (high - low || 1);
  return [low < 0 ? low - pad : 0, high + pad];
}

/** Bars in the colour of their sign. */
function bars(color) {
  return (u) => {
    const [xs, ys] = u.data;
    const colours = { neg: color("--neg"), pos: color("--pos") };
    const zero = u.valToPos(0, "y", true);
    const width = Math.max(1, (u.bbox.width / Math.max(1, xs.length)) * 0.7);
    u.ctx.save();
    for (let i = 0; i < xs.length; i++) {
      if (ys[i] == null) continue;
      const y = u.valToPos(ys[i], "y", true);
      u.ctx.fillStyle = ys[i] < 0 ? colours.neg : colours.pos;
      u.ctx.fillRect(u.valToPos(xs[i], "x", true) - width / 2, Math.min(y, zero), width, Math.max(1, Math.abs(y - zero)));
    }
    u.ctx.restore();
  };
}

function useStable(value, deps) {
  const ref = useRef({ deps: null, value });
  const same = ref.current.deps && deps.every((d, i) => equal(d, ref.current.deps[i]));
  if (!same) ref.current = { deps, value };
  return ref.current.value;
}

const equal = (a, b) => a === b || JSON.stringify(a) === JSON.stringify(b);
