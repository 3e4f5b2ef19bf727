// One pair (engine, trainer) in full: every metric with interval and floor, reasons, layers.
import { html, useState } from "../html.js";
import { paths, useAnswer } from "../api.js";
import { Replay } from "../replay.js";
import { count, floorLabel, floorName, num, plural, side, sideDetail } from "../format.js";
import {
  Basis, Empty, InContext, lagWords, LogRatio, Metric, Partial, Reasons, routeTo, Scroll, Section, Show, Title, Verdict,
} from "../parts.js";
import { ExpertLoad } from "./load.js";
import { Layers } from "./matrix.js";

export function Cell({ parts }) {
  const cells = useAnswer(paths.cells, 15);
  const glossary = useAnswer(paths.glossary);
  const key = parts.join("/");
  return html`<${Show} answer=${cells} what="the cell">
    ${(data) => {
      const cell = data.items.find((c) => [c.engine_digest, c.trainer_digest, c.model, c.kind].join("/") === key);
      if (!cell) return html`<${Title}>Cell<//><${Empty}>There is no such cell. <a href=${routeTo.matrix()}>The matrix</a> lists all.<//>`;
      return html`<${Whole} cell=${cell} glossary=${glossary.data} />`;
    }}
  <//>`;
}

function Whole({ cell, glossary }) {
  const moe = cell.router != null;
  return html`<${Title} raw=${paths.cells} note=${`${side(cell.engine)} → ${side(cell.trainer)}`}>
      ${cell.model} ${cell.kind === "noise_floor" && html`<span class="tag">noise floor, ${floorLabel(cell)}</span>`}
    <//>
    <section class="card">
      <p class="headline">
        <span class="big"><${Metric} glossary=${glossary} name="kl_k3_rollout_train" measures=${cell.measures ?? cell.all_measures} verdict=${cell.verdict} slack=${cell.k3_slack} /></span>
        <${Verdict} verdict=${cell.verdict} />
        <span>k3, <${Basis} cell=${cell} metric="kl_k3_rollout_train" />, ${plural(cell.n_seqs, "answer")}</span>
      </p>
      <dl class="pairs">
        <dt>engine</dt><dd>${side(cell.engine)} · ${sideDetail(cell.engine, cell.engine_digest)}</dd>
        <dt>trainer</dt><dd>${side(cell.trainer)} · ${sideDetail(cell.trainer, cell.trainer_digest)}</dd>
        <dt>scored</dt><dd>${count(cell.scored)} of ${count(cell.captured)} captured${cell.partial && html` <${Partial} cell=${cell} />`}: ${count(cell.comparable.yes ?? 0)} comparable, ${count(cell.comparable.converted ?? 0)} converted, ${count(cell.comparable.no ?? 0)} not</dd>
        ${lagWords(cell) && html`<dt>weights</dt><dd>${lagWords(cell)}</dd>`}
        ${cell.worst &&
        html`<dt>worst token</dt>
          <dd>
            ${cell.worst.trajectory
              ? html`<a class="token-link" href=${routeTo.token(cell.worst)}><${InContext} worst=${cell.worst} /></a>`
              : html`<${InContext} worst=${cell.worst} />`}
            ${" "}<${LogRatio} value=${cell.worst.log_ratio} />
          </dd>`}
      </dl>
      <p><a href=${routeTo.compare(`c:${routeTo.cell(cell).slice(7)}`, null)}>Compare with another cell</a></p>
    </section>
    <${Why} cell=${cell} />
    <${Metrics} cell=${cell} glossary=${glossary} />
    <${ByLag} cell=${cell} glossary=${glossary} />
    <${Replay} of=${cell} raw=${paths.cells} />
    <${Layers} cells=${moe ? [cell] : []} />
    <${ExpertLoad} cells=${moe && cell.kind === "drift" ? [cell] : []} />
    <${ByPosition} cell=${cell} />`;
}

function Why({ cell }) {
  if (!cell.reasons.length && !cell.findings.length) return null;
  return html`<${Section} id="why" title="Reasons" raw=${paths.cells}>
    ${cell.findings.length > 0 && html`<h3>Of the scores taken together</h3><${Reasons} reasons=${cell.findings} />`}
    ${cell.reasons.length > 0 &&
    html`<${Scroll} label="Reasons of single scores">
      <table class="rows">
        <thead><tr><th scope="col">reason</th><th scope="col">what it means</th><th scope="col" class="n">scores</th></tr></thead>
        <tbody>${cell.reasons.map((r) => html`<tr><th scope="row"><code>${r.code}</code></th><td>${r.meaning}</td><td class="n">${count(r.scores)}</td></tr>`)}</tbody>
      </table>
    <//>`}
  <//>`;
}

/** One lag has nothing to be told apart from. */
function ByLag({ cell, glossary }) {
  if (cell.by_lag.length < 2) return null;
  const moe = cell.router != null;
  const value = (part, name, from = part.measures) => html`<td class="n nowrap"><${Metric} glossary=${glossary} name=${name} measures=${from} verdict=${cell.verdict} slack=${cell.k3_slack} /></td>`;
  return html`<${Section} id="by-lag" title="By weight lag" raw=${paths.cells}>
    <p class="muted small">Weight versions between sampling and scoring. What grows with them is the policy's own change, no drift of the engine.</p>
    <${Scroll} label="Drift by weight lag">
      <table class="rows">
        <thead><tr><th scope="col">versions apart</th><th scope="col" class="n">k3</th><th scope="col" class="n">mean |D|</th>${moe && html`<th scope="col" class="n">routes</th>`}<th scope="col" class="n">tokens</th><th scope="col" class="n">answers</th></tr></thead>
        <tbody>
          ${cell.by_lag.map((part) => html`<tr>
            <th scope="row">${part.label}</th>
            ${value(part, "kl_k3_rollout_train")}${value(part, "abs_log_ratio_mean")}${moe && value(part, "router_set_disagree_rate", part.router)}
            <td class="n">${count(part.n_tokens)}</td><td class="n">${count(part.n_seqs)}</td>
          </tr>`)}
        </tbody>
      </table>
    <//>
  <//>`;
}

function ByPosition({ cell }) {
  const rates = cell.router?.metrics.router_set_disagree_rate_by_position;
  if (!rates?.length) return null;
  return html`<${Section} id="by-position" title="Route disagreement along the response" raw=${paths.cells}>
    <${Scroll} label="Route disagreement by position in the response">
      <table class="heat">
        <thead><tr><th scope="col">tokens</th>${rates.map((_, b) => html`<th scope="col" class="n">${2 ** b - 1}–${2 ** (b + 1) - 2}</th>`)}</tr></thead>
        <tbody><tr><th scope="row">disagree</th>${rates.map((r) => html`<td class="n">${r == null ? "–" : `${num(100 * r, 2)} %`}</td>`)}</tr></tbody>
      </table>
    <//>
  <//>`;
}

/** All scalar metrics with what they mean; router ones after the others. */
function Metrics({ cell, glossary }) {
  const [all, setAll] = useState(false);
  const measures = cell.measures ?? cell.all_measures;
  const main = ["kl_k3_rollout_train", "abs_log_ratio_mean", "abs_log_ratio_p99", "abs_log_ratio_max", "extreme_frac_tau2", "mean_weight_token", "ess_kish_seq", "ess_kish_response"];
  const names = all ? Object.keys(measures?.metrics ?? {}) : main;
  const router = Object.entries(cell.router?.metrics ?? {}).filter(([, v]) => !Array.isArray(v)).map(([n]) => n);
  const routed = all ? router : router.filter((n) => ["router_set_disagree_rate", "router_expert_miss_rate", "router_zero_overlap_rate", "router_worst_layer"].includes(n));
  return html`<${Section}
    id="metrics"
    title="Metrics"
    raw=${paths.cells}
    aside=${html`<button type="button" aria-expanded=${all} onClick=${() => setAll(!all)}>${all ? "The main ones" : "All metrics"}</button>`}
  >
    ${!cell.measures && cell.all_measures && html`<p class="warn">▲ Nothing is comparable: these numbers are evidence of what is wrong, not drift.</p>`}
    <${Scroll} label="Metrics">
      <table class="rows metrics">
        <thead>
          <tr><th scope="col">metric</th><th scope="col" class="n">value</th><th scope="col" class="n">95 % interval</th>${cell.floors.map((f) => html`<th scope="col" class="n">${floorName(f)} floor</th>`)}<th scope="col">how to read it</th></tr>
        </thead>
        <tbody>
          ${[...names.map((n) => [n, measures]), ...routed.map((n) => [n, cell.router])].map(([name, from]) => {
            const interval = cell.intervals[name];
            const known = glossary?.metrics[name] ?? glossary?.router_metrics[name];
            return html`<tr>
              <th scope="row"><code>${name}</code></th>
              <td class="n nowrap"><${Metric} glossary=${glossary} name=${name} measures=${from} verdict=${cell.verdict} slack=${cell.k3_slack} /></td>
              <td class="n nowrap">${interval ? `${num(interval.low)} … ${num(interval.high)}` : "–"}</td>
              ${cell.floors.map((f) => html`<td class="n">${num(f.measures.metrics[name] ?? f.router?.metrics[name])}</td>`)}
              <td class="reads">${known && html`${known.formula}: ${known.reads}. ${known.trap && html`<span class="muted">Trap: ${known.trap}.</span>`}`}</td>
            </tr>`;
          })}
        </tbody>
      </table>
    <//>
  <//>`;
}
