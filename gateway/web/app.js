// The page's frame: which view the address names, the navigation, the scheme, the read key.
import { html, render, useEffect, useState } from "./html.js";
import { readKey, setReadKey, useLost } from "./api.js";
import { clock, day, plural } from "./format.js";
import { Fold, saveWithKey, Sign } from "./parts.js";
import { report } from "./report.js";
import { Cell } from "./views/cell.js";
import { Compare } from "./views/compare.js";
import { Glossary } from "./views/glossary.js";
import { Live } from "./views/live.js";
import { Matrix } from "./views/matrix.js";
import { Overview } from "./views/overview.js";
import { Trajectories } from "./views/trajectories.js";
import { Trajectory } from "./views/trajectory.js";

const NAV = [
  ["", "Overview"],
  ["matrix", "Matrix"],
  ["trajectories", "Trajectories"],
  ["compare", "Compare"],
  ["live", "Live"],
  ["glossary", "Glossary"],
].filter(([key]) => !report || key !== "live");

const ICON = document.querySelector("link[rel=icon]").href;

/** As it is where it is no percent-encoding: a name can be typed. */
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/** `#/t/NAME?step=3` as {view: "t", parts: ["NAME"], query}. */
function place() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [view, ...parts] = path.split("/").map(decoded);
  return { view, parts, query: new URLSearchParams(query ?? "") };
}

/** Goes to an address; `quiet` replaces it, so that choosing tokens does not fill the history. */
function go(hash, quiet = false) {
  if (!quiet) {
    location.hash = hash;
    return;
  }
  history.replaceState(null, "", hash);
  window.dispatchEvent(new HashChangeEvent("hashchange"));
}

function View({ at }) {
  const { view, parts, query } = at;
  if (view === "") return html`<${Overview} />`;
  if (view === "matrix") return html`<${Matrix} />`;
  if (view === "cell") return html`<${Cell} key=${parts.join("/")} parts=${parts} />`;
  if (view === "trajectories") return html`<${Trajectories} query=${query} go=${go} />`;
  if (view === "t") return html`<${Trajectory} key=${parts[0]} name=${parts[0]} query=${query} go=${go} />`;
  if (view === "compare") return html`<${Compare} query=${query} go=${go} />`;
  if (view === "live" && !report) return html`<${Live} query=${query} go=${go} />`;
  if (view === "glossary") return html`<${Glossary} query=${query} go=${go} />`;
  return html`<h1 tabindex="-1">No such page</h1><p><a href="#/">Overview</a></p>`;
}

const titleOf = ({ view, parts }) => ({ t: parts[0], cell: parts[2] })[view] ?? NAV.find(([key]) => key === view)?.[1] ?? "";

const IN_NAV = { t: "trajectories", cell: "matrix" };

function Scheme() {
  const [chosen, set] = useState(window.driftgateTheme.chosen());
  const choose = (event) => {
    window.driftgateTheme.choose(event.target.value);
    set(event.target.value);
  };
  return html`<label class="scheme"><span class="sr">Colour scheme</span>
    <select value=${chosen} onChange=${choose}>
      ${[["auto", "◐ auto"], ["light", "○ light"], ["dark", "● dark"]].map(([key, text]) => html`<option value=${key} selected=${key === chosen}>${text}</option>`)}
    </select></label>`;
}

/** Asked for when the gateway answers 401; kept for this tab only. */
function KeyForm({ onKey }) {
  const save = (event) => {
    event.preventDefault();
    setReadKey(new FormData(event.target).get("key").trim());
    onKey();
  };
  return html`<form class="card key-form" onSubmit=${save}>
    <h1 tabindex="-1">Read key</h1>
    <p>${readKey() ? "The gateway refuses this key. " : "This gateway wants a key for reading. "}It is kept in this tab and sent to nobody else.</p>
    <label class="field"><span>Key</span><input name="key" type="password" autocomplete="off" required /></label>
    <button type="submit">Read</button>
  </form>`;
}

/** Of a report: when and of what it was made, and what is not in it. */
function Made() {
  return html`<aside class="made" aria-label="About this report">
    <p>${report.title} ${day(report.made_ns)}.</p>
    ${report.left_out.length > 0 && html`<${Fold} summary=${`Left out: ${plural(report.left_out.length, "thing")}`}><ul class="reasons">${report.left_out.map((line) => html`<li>${line}</li>`)}</ul><//>`}
  </aside>`;
}

/** Said on every page, so that nobody takes old numbers for live ones. */
function Lost() {
  const lostMs = useLost();
  return html`<div role="status">${lostMs != null && html`<p class="lost">
    <${Sign} />
    <span><strong>The gateway has not answered since ${clock(lostMs * 1e6, true)}.</strong> What is shown is from then or before. This page tries again by itself.</span>
  </p>`}</div>`;
}

function App() {
  const [at, setAt] = useState(place());
  const [locked, setLocked] = useState(false);
  useEffect(() => {
    const moved = () => setAt(place());
    const refused = () => setLocked(true);
    window.addEventListener("hashchange", moved);
    window.addEventListener("driftgate-key", refused);
    return () => {
      window.removeEventListener("hashchange", moved);
      window.removeEventListener("driftgate-key", refused);
    };
  }, []);
  const title = titleOf(at);
  useEffect(() => {
    document.title = title ? `${title} · driftgate` : "driftgate";
  }, [title]);
  useEffect(() => window.scrollTo(0, 0), [at.view, at.parts.join("/")]);
  const current = IN_NAV[at.view] ?? at.view;
  return html`<div class="head">
      <header class="top">
        <a class="brand" href="#/"><img src=${ICON} alt="" width="20" height="20" />driftgate</a>
        <nav aria-label="Views">
          ${NAV.map(([key, text]) => html`<a href=${`#/${key}`} aria-current=${current === key ? "page" : undefined}>${text}</a>`)}
        </nav>
        <div class="top-end">${!report && html`<a href="/api/openapi.json" onClick=${(event) => saveWithKey(event, "/api/openapi.json")}>API</a>`}<${Scheme} /></div>
      </header>
      <${Lost} />
    </div>
    ${report && html`<${Made} />`}
    <main id="main" tabindex="-1">${locked ? html`<${KeyForm} onKey=${() => setLocked(false)} />` : html`<${View} at=${at} />`}</main>
    <footer><p>D = log p(trainer) − log p(engine) of a sampled token, in nats. <span class="nowrap">● within band, ▲ watch, ■ out of band.</span></p></footer>`;
}

// The skip link must not be taken for the address of a view.
document.querySelector("[data-skip]").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
