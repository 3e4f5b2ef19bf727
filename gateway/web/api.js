// The only place that talks to the gateway: JSON, the stream of scores, and the reader's key. In a
// report there is no gateway: what it would have answered was written beside the page.
import { useCallback, useEffect, useRef, useState } from "./html.js";
import { answer, report } from "./report.js";

const KEY = "driftgate-read-key";

export class ApiFailure extends Error {
  constructor(status, message, fix) {
    super(message);
    this.status = status;
    this.fix = fix;
  }
}

export const readKey = () => sessionStorage.getItem(KEY);
export const setReadKey = (key) => sessionStorage.setItem(KEY, key);

/** Whether the gateway answers, and since when it does not. */
const line = { heardMs: Date.now(), lostMs: null };

function heard(answers) {
  if (answers) line.heardMs = Date.now();
  const lostMs = answers ? null : line.heardMs;
  if (lostMs === line.lostMs) return;
  line.lostMs = lostMs;
  window.dispatchEvent(new Event("driftgate-line"));
}

const headers = () => (readKey() ? { authorization: `Bearer ${readKey()}` } : {});

async function ask(path, signal) {
  let response;
  try {
    response = await fetch(path, { headers: headers(), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    heard(false);
    throw new ApiFailure(0, "The gateway does not answer.", "Is it still running? This page tries again by itself.");
  }
  heard(true);
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? {};
  // 401: no key, or none that it knows; 403: one that opens something else.
  const refused = response.status === 401 || (response.status === 403 && readKey());
  if (refused) window.dispatchEvent(new Event("driftgate-key"));
  throw new ApiFailure(response.status, error.message ?? `HTTP ${response.status}`, error.fix ?? "");
}

export async function get(path, signal) {
  if (!report) return (await ask(path, signal)).json();
  const found = await answer(path);
  if (found === undefined) throw new ApiFailure(404, "This report does not hold that.", report.left_out_fix);
  return found;
}

/** Saves the JSON of a path: for where a link cannot lead to it, with a read key or in a report. */
export async function save(path) {
  const body = report ? new Blob([JSON.stringify(await get(path), null, 1)]) : await (await ask(path)).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(body);
  link.download = "driftgate.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

export const paths = {
  pair: (a, b) => `/api/cells/pair?${new URLSearchParams({ a, b })}`,
  load: (c) => `/api/cells/load?${new URLSearchParams({ cell: [c.engine_digest, c.trainer_digest, c.model].join("/") })}`,
  overview: "/api/overview",
  cells: "/api/cells",
  glossary: "/api/glossary",
  series: "/api/series?points=120",
  trajectories: (query) => `/api/trajectories?${new URLSearchParams(query)}`,
  trajectory: (name) => `/api/trajectories/${encodeURIComponent(name)}`,
  mismatch: (name) => `/api/trajectories/${encodeURIComponent(name)}/mismatch`,
  step: (name, step) => `/api/trajectories/${encodeURIComponent(name)}/steps/${step}`,
  verdict: (name, profile) => `/api/trajectories/${encodeURIComponent(name)}/verdict?profile=${profile}`,
  tree: (name) => `/api/trajectories/${encodeURIComponent(name)}/tree`,
  explain: (name) => `/api/trajectories/${encodeURIComponent(name)}/explain`,
  routes: (name, step, choice, token) =>
    `/api/trajectories/${encodeURIComponent(name)}/steps/${step}/routes?choice=${choice}` +
    (token == null ? "" : `&token=${token}`),
};

const glossary = { promise: null };
/** Asked once for the life of the page; a failure is asked again. */
export function getGlossary() {
  glossary.promise ??= get(paths.glossary).catch((error) => {
    glossary.promise = null;
    throw error;
  });
  return glossary.promise;
}

/** A page that asks nothing by itself looks whether the gateway is there; as long may that take. */
const LOOK_MS = 5000;

/** When the gateway was last heard, in ms since the epoch; null while it answers. */
export function useLost() {
  const [lostMs, set] = useState(line.lostMs);
  useEffect(() => {
    if (report) return undefined;
    const told = () => set(line.lostMs);
    const look = () => document.hidden || ask("/healthz", AbortSignal.timeout(LOOK_MS)).catch(() => {});
    const timer = setInterval(look, LOOK_MS);
    window.addEventListener("driftgate-line", told);
    return () => {
      clearInterval(timer);
      window.removeEventListener("driftgate-line", told);
    };
  }, []);
  return lostMs;
}

/** From one reload to the next: scores can come far quicker than anybody reads. */
const RELOAD_MS = 1000;
const NOTHING = { data: null, error: null, atMs: null };

/**
 * `{data, error, atMs, reload}` of an answer, asked again every `everyS` seconds while the page is
 * seen, and when `version` changes. What was there stays while the next answer is under way, and
 * when there is none; `atMs` is when it came. One request is under way at a time: `reload` waits.
 */
export function useAnswer(path, everyS = 0, version = null) {
  const [state, set] = useState({ path: null, ...NOTHING });
  const again = useRef(() => {});
  useEffect(() => {
    if (path == null) return undefined;
    const stop = new AbortController();
    let [timer, begunMs, busy, wanted] = [0, 0, false, false];
    const plan = (work, ms) => {
      clearTimeout(timer);
      timer = setTimeout(work, ms);
    };
    const load = async () => {
      [busy, wanted, begunMs] = [true, false, performance.now()];
      try {
        const data = await (path === paths.glossary ? getGlossary() : get(path, stop.signal));
        set({ path, data, error: null, atMs: Date.now() });
      } catch (error) {
        if (stop.signal.aborted) return;
        set((old) => ({ ...(old.path === path ? old : { path, ...NOTHING }), error }));
      }
      busy = false;
      if (stop.signal.aborted) return;
      if (wanted) reload();
      else if (everyS && !report) plan(tick, everyS * 1000);
    };
    const tick = () => (document.hidden ? plan(tick, everyS * 1000) : load());
    const reload = () => {
      if (document.hidden) return;
      wanted = true;
      if (!busy) plan(load, Math.max(0, begunMs + RELOAD_MS - performance.now()));
    };
    again.current = reload;
    load();
    return () => {
      stop.abort();
      clearTimeout(timer);
    };
  }, [path, everyS, version]);
  const reload = useCallback(() => again.current(), []);
  return { ...(state.path === path ? state : NOTHING), reload };
}

const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 10000;

/** Newest cursor of the stream of scores. */
async function newestCursor(signal) {
  const response = await ask("/api/drift?after=now", signal);
  await response.text();
  return Number(response.headers.get("x-driftgate-cursor"));
}

/** Follows the scores from `back` events before now; calls `onEvent` with each, once, in order. */
async function follow({ back, onEvent, onState, signal }) {
  let cursor = null;
  let newest = 0;
  let wait = FIRST_RETRY_MS;
  while (!signal.aborted) {
    try {
      if (cursor == null) {
        newest = await newestCursor(signal);
        cursor = Math.max(0, newest - back);
      }
      const response = await ask(`/api/drift?follow=1&after=${cursor}`, signal);
      onState(cursor < newest ? "reading" : "live");
      wait = FIRST_RETRY_MS;
      for await (const event of lines(response.body)) {
        if (event) {
          cursor = event.cursor;
          onEvent(event);
        }
        // Nothing to say is said when all that there is was sent.
        if (!event || cursor >= newest) onState("live");
      }
    } catch (error) {
      if (signal.aborted) return;
      onState(error.status === 401 || error.status === 403 ? "key" : "lost");
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(2 * wait, LAST_RETRY_MS);
  }
}

/** Each line's event; null for an empty line, which a stream sends while it is idle. */
async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield part.trim() ? JSON.parse(part) : null;
  }
}

/** Follows the scores while the component lives. */
export function useScores(back, onEvent) {
  const [state, set] = useState("connecting");
  const handler = useRef(onEvent);
  handler.current = onEvent;
  useEffect(() => {
    if (report) return undefined;
    const stop = new AbortController();
    follow({ back, onEvent: (e) => handler.current(e), onState: set, signal: stop.signal });
    return () => stop.abort();
  }, [back]);
  return state;
}
