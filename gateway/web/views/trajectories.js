// All agent runs, newest first, with what is missing of each.
import { html, useEffect, useState } from "../html.js";
import { get, paths, useAnswer } from "../api.js";
import { count, duration, num, plural, round } from "../format.js";
import { band } from "../scale.js";
import { BandMark, Empty, Failure, Name, routeTo, Scroll, Section, Select, Show, Time, Title } from "../parts.js";

const PAGE = 50;

export function Trajectories({ query, go }) {
  const filters = Object.fromEntries(["model", "complete", "scored"].map((k) => [k, query.get(k) ?? ""]));
  const asked = { limit: PAGE, drift: true, ...Object.fromEntries(Object.entries(filters).filter(([, v]) => v)) };
  const path = paths.trajectories(asked);
  const first = useAnswer(path, 10);
  const set = (name, value) => {
    const next = new URLSearchParams(Object.entries({ ...filters, [name]: value }).filter(([, v]) => v));
    go(`#/trajectories${next.size ? `?${next}` : ""}`);
  };
  return html`<${Title} raw=${path}>Trajectories<//>
    <form class="filters" onSubmit=${(e) => e.preventDefault()}>
      <label class="field"><span>Model</span><input value=${filters.model} placeholder="any" onChange=${(e) => set("model", e.target.value.trim())} /></label>
      <${Select} label="Capture" value=${filters.complete} options=${[["", "any"], ["true", "complete"], ["false", "with gaps"]]} onChange=${(v) => set("complete", v)} />
      <${Select} label="Scoring" value=${filters.scored} options=${[["", "any"], ["true", "scored"], ["false", "not all scored"]]} onChange=${(v) => set("scored", v)} />
    </form>
    <${Show} answer=${first} what="trajectories">
      ${(page) => html`<${List} key=${path} page=${page} asked=${asked} />`}
    <//>`;
}

const isOlder = (a, b) => a.started_ns < b.started_ns || (a.started_ns === b.started_ns && a.trajectory < b.trajectory);

/** What was seen, with the newest page as it is now. Where more came at once than a page holds, the
    two do not meet: then the list begins anew, and what lies between is behind "Older ones". */
function joined(seen, page) {
  const now = new Set(page.items.map((t) => t.trajectory));
  if (!seen.items.some((t) => now.has(t.trajectory))) return page;
  const last = page.items.at(-1);
  return { items: [...page.items, ...seen.items.filter((t) => isOlder(t, last))], next: seen.next };
}

function List({ page, asked }) {
  // Null until older ones were asked for: the first page follows the gateway by itself.
  const [seen, setSeen] = useState(null);
  const [error, setError] = useState(null);
  useEffect(() => setSeen((old) => old && joined(old, page)), [page]);
  const { items: rows, next } = seen ? joined(seen, page) : page;
  const load = async () => {
    try {
      const older = await get(paths.trajectories({ ...asked, before: next }));
      setSeen({ items: [...rows, ...older.items], next: older.next });
      setError(null);
    } catch (failure) {
      setError(failure);
    }
  };
  return html`<${Section} id="runs" title=${`${count(rows.length)} newest`}>
    ${rows.length ? html`<${Rows} rows=${rows} />` : html`<${Empty}>No trajectory fits. Point an agent at this gateway: <code>export OPENAI_BASE_URL=${location.origin}/v1</code><//>`}
    ${error && html`<${Failure} error=${error} retry=${load} />`}
    ${next && html`<button type="button" onClick=${load}>Older ones</button>`}
  <//>`;
}

/** Of the pair of engine and trainer that is furthest apart. */
function MeanD({ of, glossary }) {
  if (!of) return html`<span class="muted" title="no comparable score">–<span class="sr"> no comparable score</span></span>`;
  const value = of.abs_log_ratio_mean;
  const why = `${plural(of.n_tokens, "token")}${of.pairs > 1 ? `, the furthest apart of ${count(of.pairs)} pairs` : ""}`;
  return html`<span class="value" title=${why}><${BandMark} colour=${band(glossary, "abs_log_ratio_mean", value)} /> ${num(value)} <span class="unit">nats</span></span>`;
}

function Rows({ rows }) {
  const glossary = useAnswer(paths.glossary).data;
  return html`<${Scroll} label="Trajectories">
    <table class="rows">
      <thead>
        <tr><th scope="col">trajectory</th><th scope="col" class="n">mean |D|</th><th scope="col" class="n">max |D|</th><th scope="col">started</th><th scope="col" class="n">took</th><th scope="col">model</th><th scope="col" class="n">steps</th><th scope="col" class="n">captured</th><th scope="col" class="n">scored</th><th scope="col">capture</th><th scope="col" class="n">reward</th></tr>
      </thead>
      <tbody>
        ${rows.map(
          (t) => html`<tr>
            <th scope="row"><a href=${routeTo.trajectory(t.trajectory)}><${Name} of=${t.trajectory} /></a></th>
            <td class="n nowrap"><${MeanD} of=${t.drift} glossary=${glossary} /></td>
            <td class="n nowrap">${t.drift ? html`${num(t.drift.abs_log_ratio_max)} <span class="unit">nats</span>` : "–"}</td>
            <td class="nowrap"><${Time} ns=${t.started_ns} seconds /></td>
            <td class="n nowrap">${duration((t.ended_ns - t.started_ns) / 1e9)}</td>
            <td class="nowrap"><${Name} of=${t.models.join(", ")} /></td>
            <td class="n">${count(t.steps)}</td>
            <td class="n nowrap">${count(t.captured)} of ${count(t.choices)}</td>
            <td class="n nowrap">${count(t.scored)} of ${count(t.scorable)}</td>
            <td class="nowrap"><${Capture} row=${t} /></td>
            <td class="n">${round(t.reward)}</td>
          </tr>`,
        )}
      </tbody>
    </table>
  <//>`;
}

export function Capture({ row }) {
  if (row.open_calls) return html`<span class="verdict converted"><span aria-hidden="true">… </span>running</span>`;
  if (row.complete) return html`<span class="verdict yes"><span aria-hidden="true">✓ </span>complete</span>`;
  return html`<span class="verdict no" title=${row.gaps.join("\n")}><span aria-hidden="true">✕ </span>${plural(row.gaps.length, "gap")}</span>`;
}
