// The events of `driftgate tail`, as they come: filter, follow, pause.
import { html, useEffect, useRef, useState } from "../html.js";
import { paths, useAnswer, useScores } from "../api.js";
import { count, plural } from "../format.js";
import { BandMark, Choice, Empty, InContext, LogRatio, Metric, Name, routeTo, Scroll, Section, Select, Time, Title, Verdict } from "../parts.js";
import { BAND_ORDER, scoreBand } from "../scale.js";

const KEPT = 500;
const BACK = 50;
const SPEAK_EVERY_MS = 5000;

const ANY = { q: "", trajectory: "", model: "", band: "", kind: "drift" };

const BANDS = [
  ["", "any"],
  ["green", "comparable"],
  ["amber", "▲ watch or worse"],
  ["red", "■ out of band"],
];

export function Live({ query, go }) {
  const [events, setEvents] = useState([]);
  const [paused, setPaused] = useState(false);
  const glossary = useAnswer(paths.glossary).data;
  const held = useRef([]);
  const [waiting, setWaiting] = useState(0);
  const add = (found) => setEvents((old) => [...found.reverse(), ...old].slice(0, KEPT));
  const state = useScores(BACK, (event) => {
    if (!paused) return add([event]);
    held.current = [...held.current, event].slice(-KEPT);
    return setWaiting((n) => n + 1);
  });
  const pause = () => {
    if (paused) {
      add(held.current);
      held.current = [];
      setWaiting(0);
    }
    setPaused(!paused);
  };
  // The address holds the filter, as `driftgate tail --web` prints it.
  const wanted = Object.fromEntries(Object.entries(ANY).map(([name, any]) => [name, query.get(name) ?? any]));
  const set = (name, value) => {
    const given = Object.entries({ ...wanted, [name]: value }).filter(([key, v]) => v !== ANY[key]);
    go(`#/live${given.length ? `?${new URLSearchParams(given)}` : ""}`, true);
  };
  const shown = events.filter((e) => fits(e.score, wanted, glossary));
  return html`<${Title} raw="/api/drift" note=${html`The same events as <code>driftgate tail</code>, newest first.`}>Live<//>
    <form class="filters" onSubmit=${(e) => e.preventDefault()}>
      <label class="field grow"><span>Filter</span><input type="search" value=${wanted.q} placeholder="trajectory, model, verdict or reason" onInput=${(e) => set("q", e.target.value)} /></label>
      <label class="field"><span>Trajectory</span><input type="search" value=${wanted.trajectory} placeholder="any" onChange=${(e) => set("trajectory", e.target.value.trim())} /></label>
      <label class="field"><span>Model</span><input type="search" value=${wanted.model} placeholder="any" onChange=${(e) => set("model", e.target.value.trim())} /></label>
      <${Select} label="Band" value=${wanted.band} options=${BANDS} onChange=${(v) => set("band", v)} />
      <${Choice} label="Kind of score" name="kind" value=${wanted.kind} options=${[["drift", "drift"], ["noise_floor", "noise floor"], ["", "both"]]} onChange=${(v) => set("kind", v)} />
      <button type="button" aria-pressed=${paused} onClick=${pause}>${paused ? `Go on${waiting ? ` (${count(waiting)} new)` : ""}` : "Pause"}</button>
    </form>
    <p class="stream" data-state=${state}><span class="dot" aria-hidden="true"></span>${STATES[state]}${paused ? ", paused" : ""} · ${plural(shown.length, "event")} shown${shown.length < events.length ? `, ${count(events.length - shown.length)} filtered out` : ""}</p>
    <${Spoken} event=${shown[0]} />
    <${Section} id="events" title="Scores">
      <p class="muted small">The sign before the time is the worst band of k3, mean |D|, the share beyond ×2 and routes.</p>
      ${shown.length ? html`<${Rows} events=${shown} glossary=${glossary} />` : html`<${Empty}>${events.length ? "No event fits the filter." : state === "live" ? "No score yet: they appear here as the worker makes them." : STATES[state]}<//>`}
    <//>`;
}

const STATES = {
  connecting: "connecting",
  reading: "reading the newest scores",
  live: "live",
  lost: "connection lost, trying again",
  key: "a read key is needed",
};

/** Exact names and a band or worse, as `driftgate.tailing.Wanted`; and words found anywhere. */
function fits(score, wanted, glossary) {
  if (wanted.kind && score.kind !== wanted.kind) return false;
  if (wanted.trajectory && score.trajectory !== wanted.trajectory) return false;
  if (wanted.model && score.model !== wanted.model) return false;
  if (wanted.band && BAND_ORDER.indexOf(scoreBand(glossary, score)) < BAND_ORDER.indexOf(wanted.band)) return false;
  const words = wanted.q.toLowerCase().split(/\s+/).filter(Boolean);
  const all = [score.trajectory, score.model, score.comparable.verdict, score.kind, ...score.comparable.reasons.map((r) => r.code)].join(" ").toLowerCase();
  return words.every((word) => all.includes(word));
}

/** Says the newest event to screen readers, at most every few seconds. */
function Spoken({ event }) {
  const [said, set] = useState("");
  const newest = useRef(event);
  newest.current = event;
  useEffect(() => {
    const timer = setInterval(() => {
      const e = newest.current;
      if (e) set(`${e.score.trajectory} step ${e.score.step} scored: ${e.score.comparable.verdict === "no" ? "not comparable" : "comparable"}`);
    }, SPEAK_EVERY_MS);
    return () => clearInterval(timer);
  }, []);
  return html`<p class="sr" aria-live="polite">${said}</p>`;
}

function Rows({ events, glossary }) {
  return html`<${Scroll} label="Scores as they come">
    <table class="rows live-rows">
      <thead><tr><th scope="col">scored</th><th scope="col">trajectory</th><th scope="col" class="n">step</th><th scope="col" class="n">k3</th><th scope="col">comparable</th><th scope="col">worst token</th><th scope="col" class="n">D</th><th scope="col" class="n">tokens</th><th scope="col">model</th></tr></thead>
      <tbody>
        ${events.map(({ cursor, score: s }) => html`<tr key=${cursor}>
          <td class="nowrap"><span class="mark"><${BandMark} colour=${scoreBand(glossary, s)} /></span><${Time} ns=${s.scored_ns} seconds /></td>
          <th scope="row"><a href=${routeTo.trajectory(s.trajectory, { step: s.step, choice: s.choice })}><${Name} of=${s.trajectory} /></a></th>
          <td class="n">${s.step}${s.choice ? `.${s.choice}` : ""}</td>
          <td class="n nowrap">${s.comparable.verdict === "no" ? html`<span class="muted">left out</span>` : html`<${Metric} glossary=${glossary} name="kl_k3_rollout_train" measures=${s.measures} slack=${s.k3_slack} />`}</td>
          <td class="nowrap" title=${s.comparable.reasons.map((r) => `${r.code}: ${r.detail}`).join("\n")}><${Verdict} verdict=${s.comparable.verdict} short /> ${s.comparable.verdict} <span class="muted">${s.comparable.reasons[0]?.code}</span></td>
          <td class="nowrap">${s.worst && html`<a class="token-link" href=${routeTo.token(s.worst, s.trajectory)}><${InContext} worst=${s.worst} chars=${16} /></a>`}</td>
          <td class=${s.comparable.verdict === "no" ? "n nowrap muted" : "n nowrap"}>${s.worst && html`<${LogRatio} value=${s.worst.log_ratio} />`}</td>
          <td class="n">${count(s.measures?.metrics.n_tokens ?? 0)}</td>
          <td class="nowrap"><${Name} of=${s.model} />${s.kind === "noise_floor" ? html` <span class="tag">floor</span>` : ""}</td>
        </tr>`)}
      </tbody>
    </table>
  <//>`;
}
