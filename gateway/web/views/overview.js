// What is live now, what wants a look, drift over time, and the worst tokens.
import { html, useMemo, useState } from "../html.js";
import { paths, useAnswer, useScores } from "../api.js";
import { DriftChart } from "../chart.js";
import { ago, count, duration, floorName, num, percent, plural, round, side } from "../format.js";
import {
  BandMark,
  Basis,
  Choice,
  Empty,
  Fold,
  InContext,
  LogRatio,
  Metric,
  Name,
  Partial,
  routeTo,
  Scroll,
  Section,
  Show,
  Time,
  Title,
  Verdict,
} from "../parts.js";
import { BAND_ORDER, BAND_WORDS, worstBand } from "../scale.js";

const EVERY_S = 5;

const LINES = [
  ["kl_k3_rollout_train", "k3", "kl_k3_rollout_train, nats"],
  ["abs_log_ratio_mean", "mean |D|", "abs_log_ratio_mean, nats"],
  ["extreme_frac_tau2", "beyond ×2", "extreme_frac_tau2: share of tokens whose ratio leaves [1/2, 2]"],
  ["router_set_disagree_rate", "routes", "router_set_disagree_rate: share of (token, layer) with other experts"],
];

export function Overview() {
  const overview = useAnswer(paths.overview, EVERY_S);
  const cells = useAnswer(paths.cells, EVERY_S * 3);
  const series = useAnswer(paths.series, EVERY_S * 3);
  const glossary = useAnswer(paths.glossary);
  useScores(0, () => overview.reload());
  return html`<${Title} note="Would the trainer see the policy that produced these rollouts?">Overview<//>
    <${Show} answer=${overview} what="what is live">
      ${(now) => html`<${Alarms} now=${now} cells=${cells.data} glossary=${glossary.data} />
        <${Now} now=${now} />
        <${OverTime} series=${series} cells=${cells.data} glossary=${glossary.data} />
        <${Worst} now=${now} />`}
    <//>`;
}

/** An alarm judges the newest scores; a cell's bands all of them. Both are said. */
function Calm({ cells, glossary }) {
  const judged = cells.filter((c) => c.kind === "drift" && c.verdict !== "no").map((c) => worstBand(glossary, c, c.verdict).colour);
  const of = (colour) => judged.filter((found) => found === colour).length;
  const worst = BAND_ORDER.findLast(of) ?? null;
  const beyond = of("amber") + of("red");
  const each = BAND_ORDER.filter(of).map((colour) => `${plural(of(colour), "cell")} ${BAND_WORDS[colour][1]}`);
  return html`<p class=${beyond ? "alarm past" : "alarm calm"}>
    <${BandMark} colour=${worst ?? "green"} />
    <span>${!judged.length
      ? "Nothing to look at yet: nothing is scored."
      : beyond
        ? `Nothing new to look at, nothing lost. Over all of their scores: ${each.join(", ")}.`
        : `Nothing to look at: ${each.join(", ")}, nothing lost.`}</span>
  </p>`;
}

function Alarms({ now, cells, glossary }) {
  return html`<section aria-labelledby="alarms" class="alarms">
    <h2 id="alarms" class="sr">Alarms</h2>
    ${now.alarms.length === 0 && cells && glossary && html`<${Calm} cells=${cells.items} glossary=${glossary} />`}
    <ul>
      ${now.alarms.map(
        (a) => html`<li class=${`alarm ${a.severity}`}>
          <${BandMark} colour=${a.severity} />
          <div>
            <p>
              ${a.text}${a.since_ns && html`, since <${Time} ns=${a.since_ns} />`}
              ${" "}${a.engine_digest && html`<a href=${routeTo.cell({ ...a, kind: "drift" })}>open the cell</a>`}
              ${a.code === "capture_gaps" && html`<a href="#/trajectories?complete=false">show them</a>`}
            </p>
            <p class="fix">→ ${a.fix}</p>
          </div>
        </li>`,
      )}
    </ul>
  </section>`;
}

function Tile({ name, value, unit, note }) {
  return html`<div class="tile">
    <dt>${name}</dt>
    <dd><span class="big">${value}</span>${unit && html` <span class="unit">${unit}</span>`}<span class="note">${note}</span></dd>
  </div>`;
}

const runs = (n) => (n === 1 ? "trajectory" : "trajectories");

function Now({ now }) {
  const lag = now.oldest_waiting_ns == null ? null : (now.now_ns - now.oldest_waiting_ns) / 1e9;
  const share = now.scorable ? now.scored / now.scorable : null;
  return html`<section aria-labelledby="now">
    <h2 id="now" class="sr">Now</h2>
    <dl class="tiles">
      <${Tile} name="Running" value=${count(now.running)} unit=${runs(now.running)} note=${`of ${count(now.trajectories)} · last call ${ago(now.last_call_ns, now.now_ns)}`} />
      <${Tile} name="Steps" value=${num(now.steps_per_s)} unit="/ s" note=${`${num(now.response_tokens_per_s)} tokens / s · last ${duration(now.window_s)}`} />
      <${Tile}
        name="Scored"
        value=${count(now.scored)}
        unit=${`of ${count(now.scorable)}`}
        note=${html`<meter min="0" max="1" value=${share ?? 0} aria-label="share of scorable answers with a score">${percent(share)}</meter> ${percent(share)} · ${count(now.captured)} captured`}
      />
      <${Tile} name="Worker lag" value=${lag == null ? "0 s" : duration(lag)} note=${`${plural(now.waiting, "answer")} waiting · last score ${ago(now.last_score_ns, now.now_ns)}`} />
      <${Tile} name="Gaps" value=${count(now.incomplete)} unit=${runs(now.incomplete)} note=${now.incomplete ? html`<a href="#/trajectories?complete=false">incomplete capture</a>` : "capture is complete"} />
    </dl>
  </section>`;
}

function OverTime({ series, cells, glossary }) {
  const [metric, setMetric] = useState(LINES[0][0]);
  const long = LINES.find(([name]) => name === metric)[2];
  return html`<${Section}
    id="over-time"
    title="Drift over time"
    raw=${paths.series}
    aside=${html`<${Choice} label="Metric of the charts" name="metric" value=${metric} options=${LINES} onChange=${setMetric} />`}
  >
    <p class="muted small">
      ${long}, by the time of scoring; comparable answers only.
      <span class="key"><i class="key-zone amber"></i>watch</span>
      <span class="key"><i class="key-zone red"></i>out of band</span>
      <span class="key"><i class="key-floor"></i>noise floor</span>
    </p>
    <${Show} answer=${series} what="drift over time">
      ${(data) => {
        const drift = data.items.filter((c) => c.kind === "drift" && c.points.some((p) => p.metrics[metric] != null));
        if (!drift.length) return html`<${Empty}>No score has this metric yet.<//>`;
        return html`<div class="charts">
          ${drift.map((line) => html`<${CellLine} key=${routeTo.cell(line)} line=${line} metric=${metric} cells=${cells} glossary=${glossary} slot=${data.slot_s} />`)}
        </div>`;
      }}
    <//>
  <//>`;
}

function CellLine({ line, metric, cells, glossary, slot }) {
  const cell = cells?.items.find((c) => routeTo.cell(c) === routeTo.cell(line));
  const points = useMemo(() => line.points.filter((p) => p.metrics[metric] != null), [line, metric]);
  const times = points.map((p) => p.start_ns / 1e9);
  const values = points.map((p) => p.metrics[metric]);
  const wide = metric === "kl_k3_rollout_train" ? (cell?.k3_slack ?? 1) : 1;
  const of = glossary?.bands[metric];
  const limits = of && { green: of.green * wide, red: of.red * wide };
  const floors = (cell?.floors ?? [])
    .map((f) => [floorName(f), f.measures.metrics[metric] ?? f.router?.metrics[metric]])
    .filter(([, v]) => v != null);
  const source = metric.startsWith("router") ? cell?.router : (cell?.measures ?? cell?.all_measures);
  const zero = values.filter((v) => v === 0).length;
  const floorText = floors.length ? floors.map(([s, v]) => `${s} ${num(v)}`).join(", ") : "not measured";
  const name = cell ? `${side(cell.engine)} → ${side(cell.trainer)}` : "";
  return html`<figure class="chart">
    <figcaption>
      <a href=${routeTo.cell(line)}><strong>${line.model}</strong> <span class="muted">${name}</span></a>
      ${source && html`<span class="chart-now"><${Metric} glossary=${glossary} name=${metric} measures=${source} verdict=${cell.verdict} slack=${cell?.k3_slack} /> <${Partial} cell=${cell} /></span>`}
    </figcaption>
    ${source && html`<p class="muted small"><${Basis} cell=${cell} metric=${metric} /></p>`}
    <${DriftChart}
      times=${times}
      values=${values}
      limits=${limits}
      floors=${floors.map(([, v]) => v)}
      label=${`${metric} of ${line.model} ${name} over time: ${plural(points.length, "point")}, last ${num(values.at(-1))}; the table below has them`}
    />
    <p class="muted small">
      Noise floor: ${floorText}. ${limits ? `Bands from ${round(limits.green)} and ${round(limits.red)}${wide > 1 ? ` (×${wide} for MoE and FP8)` : ""}.` : ""}
      ${zero ? ` ${plural(zero, "point")} at 0 not drawn.` : ""}${line.forgotten ? ` ${plural(line.forgotten, "older score")} not shown.` : ""}
    </p>
    <${Fold} summary=${`Table of ${plural(points.length, "point")}`}>
      <${Scroll} label=${`${metric} of ${line.model} over time`} tall>
        <table>
          <thead><tr><th scope="col">scored from</th><th scope="col" class="n">value</th><th scope="col" class="n">tokens</th><th scope="col" class="n">answers</th><th scope="col" class="n">left out</th></tr></thead>
          <tbody>
            ${points.map((p) => html`<tr><th scope="row"><${Time} ns=${p.start_ns} seconds /></th><td class="n">${num(p.metrics[metric])}</td><td class="n">${count(p.n_tokens)}</td><td class="n">${count(p.scores)}</td><td class="n">${count(p.not_comparable)}</td></tr>`)}
          </tbody>
        </table>
      <//>
      <p class="muted small">A point is ${duration(slot)} of scoring.</p>
    <//>
  </figure>`;
}

function Worst({ now }) {
  return html`<${Section} id="worst" title="Worst tokens, by trajectory" raw=${paths.overview}>
    ${!now.worst.length
      ? html`<${Empty}>No comparable score yet. <${Verdict} verdict="no" /> scores stand in the matrix with their reasons.<//>`
      : html`<${Scroll} label="Trajectories with their worst token">
          <table class="rows">
            <thead>
              <tr>
                <th scope="col" class="n">D</th><th scope="col">token</th><th scope="col" class="n">p engine</th><th scope="col" class="n">p trainer</th><th scope="col">where</th><th scope="col">model</th>
              </tr>
            </thead>
            <tbody>
              ${now.worst.map(
                (w) => html`<tr>
                  <td class="n"><${LogRatio} value=${w.worst.log_ratio} /></td>
                  <th scope="row"><a class="token-link" href=${routeTo.token(w.worst, w.trajectory)}><${InContext} worst=${w.worst} chars=${28} /></a></th>
                  <td class="n">${num(Math.exp(w.worst.rollout_logprob))}</td>
                  <td class="n">${num(Math.exp(w.worst.train_logprob))}</td>
                  <td class="nowrap"><a href=${routeTo.trajectory(w.trajectory)}><${Name} of=${w.trajectory} /></a> step ${w.worst.step}, token ${w.worst.token_index}</td>
                  <td class="nowrap"><${Name} of=${w.model} /></td>
                </tr>`,
              )}
            </tbody>
          </table>
        <//>`}
  <//>`;
}
