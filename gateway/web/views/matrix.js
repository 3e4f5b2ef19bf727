// Engine by trainer: the value that matters, how much stands behind it, and whether it is valid.
import { html, useState } from "../html.js";
import { paths, useAnswer } from "../api.js";
import { count, floorLabel, floorName, num, plural, side } from "../format.js";
import { Basis, Choice, Empty, lagWords, Metric, Partial, routeTo, Scroll, Section, Show, Title, Verdict } from "../parts.js";
import { rateClass } from "../scale.js";
import { ExpertLoad } from "./load.js";

const SHOWN = [
  ["kl_k3_rollout_train", "k3", "kl_k3_rollout_train"],
  ["abs_log_ratio_mean", "mean |D|", "abs_log_ratio_mean"],
  ["abs_log_ratio_max", "max |D|", "abs_log_ratio_max"],
  ["extreme_frac_tau2", "beyond ×2", "extreme_frac_tau2"],
  ["ess_kish_seq", "ESS (Kish, seq)", "ess_kish_seq"],
  ["router_set_disagree_rate", "routes", "router_set_disagree_rate"],
];

/** Where a metric of a cell lives: router metrics beside the others. */
export const sourceOf = (cell, metric) =>
  metric.startsWith("router") ? cell.router : (cell.measures ?? cell.all_measures);

export function Matrix() {
  const cells = useAnswer(paths.cells, 10);
  const glossary = useAnswer(paths.glossary);
  const [metric, setMetric] = useState(SHOWN[0][0]);
  return html`<${Title} raw=${paths.cells} note="Rows are rollout engines, columns are trainers. No number mixes fingerprints.">Matrix<//>
    <${Show} answer=${cells} what="the matrix">
      ${(data) => {
        const drift = data.items.filter((c) => c.kind === "drift");
        if (!drift.length) return html`<${Empty}>Nothing is scored yet. Start a worker: <code>driftgate teach --follow</code><//>`;
        return html`<${Section}
            id="cells"
            title="Drift"
            raw=${paths.cells}
            aside=${html`<${Choice} label="Metric of the matrix" name="matrix-metric" value=${metric} options=${SHOWN} onChange=${setMetric} />`}
          >
            <${Meaning} glossary=${glossary.data} metric=${metric} />
            <${Grid} cells=${drift} metric=${metric} glossary=${glossary.data} />
          <//>
          <${Layers} cells=${drift.filter((c) => c.router)} />
          <${ExpertLoad} cells=${drift.filter((c) => c.router)} />
          <${Floors} cells=${data.items.filter((c) => c.kind === "noise_floor")} metric=${metric} glossary=${glossary.data} />`;
      }}
    <//>`;
}

export function Meaning({ glossary, metric }) {
  const known = glossary?.metrics[metric] ?? glossary?.router_metrics[metric];
  if (!known) return null;
  return html`<p class="muted small">
    <code>${metric}</code> = ${known.formula}${known.unit === "1" ? "" : ` ${known.unit}`}: ${known.reads}.${known.trap && ` Trap: ${known.trap}.`}
  </p>`;
}

function Grid({ cells, metric, glossary }) {
  const engines = unique(cells.map((c) => [c.engine_digest, c.engine]));
  const trainers = unique(cells.map((c) => [c.trainer_digest, c.trainer]));
  return html`<${Scroll} label="Matrix of engines and trainers">
    <table class="matrix">
      <thead>
        <tr>
          <td><span class="muted">engine ↓ trainer →</span></td>
          ${trainers.map(([digest, t]) => html`<th scope="col"><span>${side(t)}</span><span class="sub">${inShort(t, digest)}</span></th>`)}
        </tr>
      </thead>
      <tbody>
        ${engines.map(
          ([engine, e]) => html`<tr>
            <th scope="row"><span>${side(e)} · ${e.model}</span><span class="sub">${inShort(e, engine)}</span></th>
            ${trainers.map(([trainer]) => {
              const found = cells.filter((c) => c.engine_digest === engine && c.trainer_digest === trainer);
              return found.length
                ? html`<td>${found.map((c) => html`<${Cell} cell=${c} metric=${metric} glossary=${glossary} />`)}</td>`
                : html`<td class="none"><span class="muted">not paired</span></td>`;
            })}
          </tr>`,
        )}
      </tbody>
    </table>
  <//>`;
}

/** What sets columns or rows apart most; the cell's page has all of it. */
function inShort(value, digest) {
  const { device, dtype, kv_cache_dtype: kv, attention, attention_backend: backend } = value.settings ?? {};
  const kernels = attention ?? backend;
  return [value.side === "trainer" && value.model, device && `on ${device}`, dtype, kv && `kv cache ${kv}`, kernels && `attention ${kernels}`, value.logprobs_mode, digest].filter(Boolean).join(" · ");
}

function Cell({ cell, metric, glossary }) {
  const floors = cell.floors
    .map((f) => [floorName(f), f.measures.metrics[metric] ?? f.router?.metrics[metric]])
    .filter(([, v]) => v != null);
  return html`<a class="cell" href=${routeTo.cell(cell)}>
    <span class="cell-value"><${Metric} glossary=${glossary} name=${metric} measures=${sourceOf(cell, metric)} verdict=${cell.verdict} slack=${cell.k3_slack} /></span>
    <span class="cell-line"><${Basis} cell=${cell} metric=${metric} /></span>
    <span class="cell-line">${floors.length ? `floor ${floors.map(([s, v]) => `${s} ${num(v)}`).join(", ")}` : "floor not measured"}</span>
    <span class="cell-line">${lagWords(cell)}</span>
    <span class="cell-line"><${Verdict} verdict=${cell.verdict} />${leftOut(cell)} <${Partial} cell=${cell} /></span>
    ${cell.verdict === "no" && html`<span class="cell-line">${whyNot(cell)}</span>`}
  </a>`;
}

/** The reason that most of its scores give. */
const whyNot = (cell) => cell.reasons.toSorted((a, b) => b.scores - a.scores).map((r) => r.code)[0] ?? cell.findings[0]?.code ?? "";

const leftOut = (cell) => (cell.comparable.no ? ` · ${plural(cell.comparable.no, "score")} left out` : "");

function unique(pairs) {
  return [...new Map(pairs)].sort(([a], [b]) => (a < b ? -1 : 1));
}

/** Route disagreement by layer: one row per cell, the worst layer framed. */
export function Layers({ cells, id = "layers" }) {
  if (!cells.length) return null;
  const layers = [...new Set(cells.flatMap((c) => c.router.metrics.layers))].sort((a, b) => a - b);
  return html`<${Section} id=${id} title="Mixture of experts, layer by layer" raw=${paths.cells}>
    <p class="muted small">
      Share of tokens that the two sides send to another set of experts (<code>router_set_disagree_rate_by_layer</code>). The worst layer is framed.
    </p>
    <${Scroll} label="Route disagreement by layer">
      <table class="heat">
        <thead><tr><th scope="col">cell</th>${layers.map((l) => html`<th scope="col" class="n">${l}</th>`)}<th scope="col" class="n">all</th></tr></thead>
        <tbody>
          ${cells.map((c) => {
            const m = c.router.metrics;
            const at = new Map(m.layers.map((l, i) => [l, m.router_set_disagree_rate_by_layer[i]]));
            return html`<tr>
              <th scope="row"><a href=${routeTo.cell(c)}>${c.model}</a> <span class="sub">${side(c.engine)} → ${side(c.trainer)}</span></th>
              ${layers.map((l) => html`<td class=${`heat-cell ${rateClass(at.get(l))}${l === m.router_worst_layer ? " worst" : ""}`}>${percentCell(at.get(l))}${l === m.router_worst_layer ? html`<span class="sr"> worst layer</span>` : ""}</td>`)}
              <td class="n">${percentCell(m.router_set_disagree_rate)}</td>
            </tr>`;
          })}
        </tbody>
      </table>
    <//>
  <//>`;
}

const percentCell = (value) => (value == null ? "–" : `${num(100 * value, 2)} %`);

function Floors({ cells, metric, glossary }) {
  if (!cells.length) return null;
  return html`<${Section} id="floors" title="Noise floors: a side against itself" raw=${paths.cells}>
    <p class="muted small">Drift below its floor says nothing.</p>
    <${Scroll} label="Noise floors">
      <table class="rows">
        <thead><tr><th scope="col">side</th><th scope="col">second run</th><th scope="col">model</th><th scope="col" class="n">${metric}</th><th scope="col" class="n">tokens</th><th scope="col" class="n">trajectories</th></tr></thead>
        <tbody>
          ${cells.map(
            (c) => html`<tr>
              <th scope="row"><a href=${routeTo.cell(c)}>${c.engine.side} ${side(c.engine)}</a></th>
              <td>${floorLabel(c)}</td>
              <td class="nowrap">${c.model}</td>
              <td class="n nowrap"><${Metric} glossary=${glossary} name=${metric} measures=${sourceOf(c, metric)} verdict=${c.verdict} slack=${c.k3_slack} /></td>
              <td class="n">${count(c.n_tokens)}</td>
              <td class="n">${count(c.trajectories)}</td>
            </tr>`,
          )}
        </tbody>
      </table>
    <//>
  <//>`;
}
