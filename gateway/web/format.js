// Numbers, times and names as people read them. Every number that has a unit is given with it.

const EXPONENT = 1e-3;

/** Three significant digits, zeros too, so that columns line up; small ones as 8.34e-4. */
export function num(value, digits = 3) {
  if (value == null) return "–";
  if (value < 0) return `−${num(-value, digits)}`;
  if (value === 0) return "0";
  const size = value;
  if (size < EXPONENT || size >= 1e6) return value.toExponential(digits - 1).replace("e+", "e");
  if (Number.isInteger(value)) return value.toLocaleString("en-GB");
  if (size >= 1000) return Math.round(value).toLocaleString("en-GB");
  return value.toPrecision(digits);
}

/** Without zeros at its end: for limits and marks, which are round by themselves. */
export const round = (value, digits) => num(value, digits).replace(/(\.\d*?)0+(?=e|$)/, "$1").replace(/\.(?=e|$)/, "");

/** With its sign, always: a log ratio's sign says who is more sure. */
export const signed = (value) => (value == null ? "–" : (value > 0 ? "+" : value < 0 ? "−" : "") + num(Math.abs(value)));

export const count = (value) => (value == null ? "–" : value.toLocaleString("en-GB"));
export const plural = (n, word, many = `${word}s`) => `${count(n)} ${n === 1 ? word : many}`;

export function percent(value) {
  if (value == null) return "–";
  const p = 100 * value;
  if (p !== 0 && p < 0.1) return `${num(p, 2)} %`;
  return `${p >= 10 ? Math.round(p) : Number(p.toFixed(1))} %`;
}

export function duration(seconds) {
  if (seconds == null) return "–";
  if (seconds < 0.001) return "0 s";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

export const ago = (ns, nowNs) => (ns == null ? "never" : `${duration(Math.max(0, (nowNs - ns) / 1e9))} ago`);
export const date = (ns) => new Date(ns / 1e6);

/** 12:04, or with the day where that is not today. */
export function clock(ns, seconds = false) {
  if (ns == null) return "–";
  const at = date(ns);
  const time = at.toLocaleTimeString("en-GB", {
    hour: "2-digit",
    minute: "2-digit",
    second: seconds ? "2-digit" : undefined,
  });
  if (at.toDateString() === new Date().toDateString()) return time;
  return `${at.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${time}`;
}

/** With the day, always: for what is read later. */
export const day = (ns) => date(ns).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });

/** One side of a cell in a few words. */
export function side(value) {
  return value.side === "engine"
    ? `${value.name} ${value.version}`
    : `${value.backend}${value.world_size > 1 ? ` ×${value.world_size}` : ""} ${value.dtype}`;
}

/** A noise floor by its side, and how its second run was made where that is not plain repetition. */
export const floorName = (floor) =>
  floor.label && floor.label !== "repeat" ? `${floor.side}, ${floor.label.replaceAll("_", " ")}` : floor.side;

/** How the second run of a floor's cell was made, as driftgate.floor.label_of. */
export const floorLabel = (cell) => (cell.trainer.settings?.floor ?? "repeat").replaceAll("_", " ");

/** What else changes a side's numbers, in words. */
export function sideDetail(value, digest) {
  const set = Object.entries(value.settings ?? {}).filter(([name]) => !name.startsWith("default_"));
  const words = set.map(([name, v]) => `${name} ${v}`);
  return [value.model, ...words, digest].filter(Boolean).join(" · ");
}

/** A token as it can be seen: blanks and line ends get a sign. */
export function visible(text) {
  if (text == null) return "⟨?⟩";
  if (text === "") return "∅";
  return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
}

export const probability = (logprob) => (logprob == null ? null : Math.exp(logprob));
