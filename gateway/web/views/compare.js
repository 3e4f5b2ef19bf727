// Two trajectories, or two cells, side by side: the same prompts under two engines, say.
import { html, useState } from "../html.js";
import { get, paths, useAnswer } from "../api.js";
import { count, floorLabel, num, plural, side, signed, visible } from "../format.js";
import { Empty, Failure, Metric, Raw, routeTo, Scroll, Section, Show, Title, Verdict } from "../parts.js";
import { report } from "../report.js";
import { sourceOf } from "./matrix.js";

const SHOWN = [
  "kl_k3_rollout_train", "abs_log_ratio_mean", "abs_log_ratio_p99", "abs_log_ratio_max", "extreme_frac_tau2", "log_ratio_mean", "mean_weight_token", "ess_kish_seq", "router_set_disagree_rate", "router_zero_overlap_rate",
];

export function Compare({ query, go }) {
  const cells = useAnswer(paths.cells);
  const runs = useAnswer(paths.trajectories({ limit: 100 }));
  const [a, b] = [query.get("a") ?? "", query.get("b") ?? ""];
  return html`<${Title} note="Two trajectories or two cells.">Compare<//>
    <${Show} answer=${cells} what="cells">
      ${(matrix) => {
        const options = choices(matrix.items, runs.data?.items ?? [], [a, b]);
        return html`<form class="filters" onSubmit=${(e) => e.preventDefault()}>
            <${Pick} label="A" value=${a} options=${options} onChange=${(v) => go(routeTo.compare(v, b))} />
            <${Pick} label="B" value=${b} options=${options} onChange=${(v) => go(routeTo.compare(a, v))} />
          </form>
          <${Both} a=${a} b=${b} cells=${matrix.items} />`;
      }}
    <//>`;
}

const cellKey = (c) => `c:${routeTo.cell(c).slice("#/cell/".length)}`;
const cellName = (c) => `${c.model}: ${side(c.engine)} → ${side(c.trainer)}${c.kind === "noise_floor" ? ` (floor, ${floorLabel(c)})` : ""} ${c.engine_digest.slice(0, 4)}/${c.trainer_digest.slice(0, 4)}`;

function choices(cells, runs, given) {
  const groups = [
    ["Cells", cells.map((c) => [cellKey(c), cellName(c)])],
    ["Trajectories", runs.map((t) => [`t:${t.trajectory}`, `${t.trajectory} (${t.models.join(", ")})`])],
  ];
  const known = new Set(groups.flatMap(([, list]) => list.map(([key]) => key)));
  for (const key of given) if (key.startsWith("t:") && !known.has(key)) groups[1][1].unshift([key, key.slice(2)]);
  return groups;
}

function Pick({ label, value, options, onChange }) {
  return html`<label class="field grow"><span>${label}</span>
    <select value=${value} onChange=${(e) => onChange(e.target.value)}>
      <option value="" selected=${value === ""}>choose…</option>
      ${options.map(([group, list]) => html`<optgroup label=${group}>${list.map(([key, text]) => html`<option value=${key} selected=${key === value}>${text}</option>`)}</optgroup>`)}
    </select></label>`;
}

function Both({ a, b, cells }) {
  if (!a || !b) return html`<${Empty}>Choose two of a kind.<//>`;
  if (a[0] !== b[0]) return html`<${Empty}>A is a ${a[0] === "c" ? "cell" : "trajectory"}, B is not: choose two of a kind.<//>`;
  if (a[0] === "c") {
    const found = [a, b].map((key) => cells.find((c) => cellKey(c) === key));
    return found.every(Boolean) ? html`<${SamePrompts} cells=${found} /><${Table} id="cells" raw=${paths.cells} sides=${found.map((c) => ({ name: cellName(c), href: routeTo.cell(c), cell: c }))} />` : html`<${Empty}>No such cell any more.<//>`;
  }
  return html`<${Runs} a=${a.slice(2)} b=${b.slice(2)} />`;
}

const pairName = (c) => [c.engine_digest, c.trainer_digest, c.model].join("/");
const PAIRED = ["kl_k3_rollout_train", "abs_log_ratio_mean", "abs_log_ratio_max", "extreme_frac_tau2", "log_ratio_mean"];

/** Only answers whose prompts both engines were given: a difference is then not the prompts'. */
function SamePrompts({ cells }) {
  const drift = cells.every((c) => c.kind === "drift");
  const path = drift && !report ? paths.pair(pairName(cells[0]), pairName(cells[1])) : null;
  const answer = useAnswer(path);
  const glossary = useAnswer(paths.glossary).data;
  if (!path) return null;
  return html`<${Section} id="same-prompts" title="On the same prompts" raw=${path}>
    <${Show} answer=${answer} what="shared prompts">
      ${(p) => {
        const looked = `${count(p.a.looked)} and ${count(p.b.looked)} scored answers looked at, at most the newest ${count(p.limit)} of each engine`;
        if (!p.prompts) return html`<${Empty}>The two engines share no prompt (${looked}). Ask both the same, and compare again.<//>`;
        return html`<p class="muted small">${plural(p.prompts, "prompt")} with the same token ids on both sides: ${plural(p.a.answers, "answer")} of A, ${count(p.b.answers)} of B; ${looked}.</p>
          <${Scroll} label="Metrics on the same prompts">
            <table class="rows">
              <thead><tr><th scope="col">metric</th><th scope="col" class="n">A</th><th scope="col" class="n">B</th><th scope="col" class="n">B − A</th></tr></thead>
              <tbody>
                ${PAIRED.map((name) => {
                  const [x, y] = [p.a, p.b].map((s) => s.measures?.metrics[name] ?? null);
                  return html`<tr>
                    <th scope="row"><code>${name}</code></th>
                    ${[p.a, p.b].map((s, i) => html`<td class="n nowrap"><${Metric} glossary=${glossary} name=${name} measures=${s.measures} slack=${cells[i].k3_slack} /></td>`)}
                    <td class="n">${x == null || y == null ? "–" : signed(y - x)}</td>
                  </tr>`;
                })}
              </tbody>
            </table>
          <//>
          <${Scroll} label="Answers to the same prompts" tall>
            <table class="rows">
              <thead><tr><th scope="col">A</th><th scope="col">B</th><th scope="col" class="n">same tokens</th><th scope="col" class="n">k3 A, nats</th><th scope="col" class="n">k3 B, nats</th></tr></thead>
              <tbody>
                ${p.items.map((item) => html`<tr>
                  ${[0, 1].map((i) => html`<td class="nowrap"><a href=${routeTo.trajectory(item.trajectories[i], { step: item.steps[i], choice: item.choices[i] })}>${item.trajectories[i]} ${item.steps[i]}.${item.choices[i]}</a></td>`)}
                  <td class="n nowrap">${count(item.alike)} of ${count(Math.min(...item.tokens))}</td>
                  ${[0, 1].map((i) => html`<td class="n">${item.kl_k3_rollout_train[i] == null ? "left out" : num(item.kl_k3_rollout_train[i])}</td>`)}
                </tr>`)}
              </tbody>
            </table>
          <//>`;
      }}
    <//>
  <//>`;
}

function Table({ sides, id, raw }) {
  const glossary = useAnswer(paths.glossary).data;
  const [a, b] = sides.map((s) => s.cell);
  const value = (cell, name) => sourceOf(cell, name)?.metrics[name] ?? null;
  const apart = (name) => {
    const [x, y] = [a.intervals[name], b.intervals[name]];
    return x && y ? (x.high < y.low || y.high < x.low ? "intervals apart" : "intervals overlap") : "";
  };
  const dated = SHOWN.some(apart);
  return html`<${Section} id=${id} title="Metrics" raw=${raw}>
    <${Scroll} label="Metrics of both">
      <table class="rows">
        <thead><tr><th scope="col">metric</th>${sides.map((s, i) => html`<th scope="col" class="n"><a href=${s.href}>${"AB"[i]} ${s.name}</a></th>`)}<th scope="col" class="n">B − A</th>${dated && html`<th scope="col">95 % intervals</th>`}</tr></thead>
        <tbody>
          <tr><th scope="row">comparable</th>${sides.map((s) => html`<td class="n"><${Verdict} verdict=${s.cell.verdict} /></td>`)}<td></td>${dated && html`<td></td>`}</tr>
          <tr><th scope="row">tokens</th>${sides.map((s) => html`<td class="n">${count(s.cell.n_tokens)}</td>`)}<td></td>${dated && html`<td></td>`}</tr>
          ${SHOWN.filter((name) => value(a, name) != null || value(b, name) != null).map((name) => {
            const [x, y] = [value(a, name), value(b, name)];
            return html`<tr>
              <th scope="row"><code>${name}</code></th>
              ${[a, b].map((c) => html`<td class="n nowrap"><${Metric} glossary=${glossary} name=${name} measures=${sourceOf(c, name)} verdict=${c.verdict} slack=${c.k3_slack} /></td>`)}
              <td class="n">${x == null || y == null ? "–" : num(y - x)}</td>
              ${dated && html`<td class="muted">${apart(name)}</td>`}
            </tr>`;
          })}
        </tbody>
      </table>
    <//>
  <//>`;
}

function Runs({ a, b }) {
  const details = [useAnswer(paths.trajectory(a)), useAnswer(paths.trajectory(b))];
  const drifts = [useAnswer(paths.mismatch(a)), useAnswer(paths.mismatch(b))];
  return html`<${Show} answer=${drifts[0]} what=${a}>${(x) => html`<${Show} answer=${drifts[1]} what=${b}>${(y) =>
    x.cells.length && y.cells.length
      ? html`<${Table} id="whole" raw=${paths.mismatch(a)} sides=${[[a, x], [b, y]].map(([name, m]) => ({ name, href: routeTo.trajectory(name), cell: m.cells[0].whole }))} />`
      : html`<${Empty}>${x.cells.length ? b : a} has no score yet.<//>`}<//>`}<//>
    <${Show} answer=${details[0]} what=${a}>${(x) => html`<${Show} answer=${details[1]} what=${b}>${(y) => html`<${StepByStep} names=${[a, b]} details=${[x, y]} />`}<//>`}<//>`;
}

function StepByStep({ names, details }) {
  const steps = [...new Set(details.flatMap((d) => d.steps.map((s) => s.step)))].sort((x, y) => x - y);
  return html`<${Section} id="steps" title="Step by step" raw=${paths.trajectory(names[0])}>
    <${Scroll} label="Steps of both">
      <table class="rows">
        <thead><tr><th scope="col" class="n">step</th>${["A", "B"].map((s) => html`<th scope="col" class="n">${s} tokens</th><th scope="col" class="n">${s} k3, nats</th>`)}<th scope="col">sampled alike</th></tr></thead>
        <tbody>${steps.map((step) => html`<${StepRow} step=${step} names=${names} choices=${details.map((d) => d.steps.find((s) => s.step === step)?.choices[0])} />`)}</tbody>
      </table>
    <//>
    <p class="small"><${Raw} href=${paths.trajectory(names[1])} what="steps of B" /> <span class="muted">of B</span></p>
  <//>`;
}

function StepRow({ step, names, choices }) {
  const [alike, setAlike] = useState(null);
  const k3 = (c) => {
    const score = c?.scores.filter((s) => s.kind === "drift").at(-1);
    return score?.comparable.verdict === "no" ? "left out" : num(score?.measures?.metrics.kl_k3_rollout_train);
  };
  const look = () => Promise.all(names.map((n) => get(paths.step(n, step)))).then(([x, y]) => setAlike(shared(x.choices[0], y.choices[0])), setAlike);
  return html`<tr>
    <th scope="row" class="n">${step}</th>
    ${choices.map((c, i) => html`<td class="n">${c ? html`<a href=${routeTo.trajectory(names[i], { step })}>${count(c.response_len)}<span class="sr"> tokens, step ${step} of ${"AB"[i]}</span></a>` : "–"}</td><td class="n">${k3(c)}</td>`)}
    <td>
      ${!choices.every(Boolean) ? html`<span class="muted">only one side has it</span>` : alike instanceof Error ? html`<${Failure} error=${alike} retry=${look} />` : alike ?? html`<button type="button" onClick=${look}>compare tokens<span class="sr"> of step ${step}</span></button>`}
    </td>
  </tr>`;
}

/** In words, how far two answers are the same tokens. */
function shared(x, y) {
  const prompts = JSON.stringify(x.prompt_ids) === JSON.stringify(y.prompt_ids) ? "same prompt" : "other prompt";
  const end = Math.min(x.tokens.length, y.tokens.length);
  const first = x.tokens.slice(0, end).findIndex((t, i) => t.token_id !== y.tokens[i].token_id);
  if (first < 0) return `${prompts}; ${x.tokens.length === y.tokens.length ? `all ${plural(end, "token")} alike` : `the first ${plural(end, "token")} alike, then one ends`}`;
  return html`${prompts}; first other token at ${first}: <code>${visible(x.tokens[first].text)}</code> / <code>${visible(y.tokens[first].text)}</code>`;
}
