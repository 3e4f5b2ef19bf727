// One agent run: its steps as a tree, how far each drifts, and the answer that is looked at.
import { html, useMemo } from "../html.js";
import { paths, useAnswer } from "../api.js";
import { count, duration, num, plural, round, side } from "../format.js";
import { BandMark, Empty, Failure, Metric, Partial, routeTo, Scroll, Section, Show, Time, Title, Verdict } from "../parts.js";
import { Answer } from "./answer.js";
import { Exports } from "./exports.js";
import { Judgement } from "./judgement.js";
import { nodesOf, outline, Steps, worstOf } from "./steps.js";
import { Capture } from "./trajectories.js";

export function Trajectory({ name, query, go }) {
  const path = paths.trajectory(name);
  const detail = useAnswer(path, 5);
  const tree = useAnswer(paths.tree(name), 10).data;
  const glossary = useAnswer(paths.glossary).data;
  if (detail.error && !detail.data) return html`<${Title}>${name}<//><${Failure} error=${detail.error} retry=${detail.reload} />`;
  return html`<${Show} answer=${detail} what=${`trajectory ${name}`}>
    ${(data) => html`<${Whole} name=${name} data=${data} tree=${tree} glossary=${glossary} query=${query} go=${go} path=${path} />`}
  <//>`;
}

/** Changes with every answer and score of these steps. */
function versionOf(steps) {
  const choices = steps.flatMap((s) => s.choices);
  const scores = choices.flatMap((c) => c.scores);
  return `${choices.length} ${scores.length} ${Math.max(...scores.map((s) => s.scored_ns))}`;
}

function Whole({ name, data, tree, glossary, query, go, path }) {
  const version = versionOf(data.steps);
  const mismatch = useAnswer(paths.mismatch(name), 10, version);
  const steps = useMemo(() => outline(data, tree, glossary), [data, tree, glossary]);
  const answers = steps.flatMap((s) => s.answers);
  const worst = worstOf(answers);
  const divergent = answers.find((a) => a.comparable && (a.colour === "amber" || a.colour === "red"));
  const step = query.has("step") ? Number(query.get("step")) : (answers[0]?.step ?? null);
  const choice = Number(query.get("choice") ?? 0);
  const token = query.has("token") ? Number(query.get("token")) : null;
  const here = (more) => routeTo.trajectory(name, { step, choice, ...more });
  return html`<${Title} raw=${path} note=${html`<${Summary} row=${data.trajectory} reward=${data.reward} />`}>${name}<//>
    ${!data.trajectory.complete && html`<${Gaps} row=${data.trajectory} />`}
    <nav class="jumps" aria-label="Jump to">
      <${Jump} to=${worst && routeTo.trajectory(name, { step: worst.step, choice: worst.choice, token: worst.worst.token_index })}>
        Worst token${worst && html` <span class="muted">step ${worst.step}, |D| ${num(Math.abs(worst.worst.log_ratio))} nats${worst.comparable ? "" : ", not comparable"}</span>`}
      <//>
      <${Jump} to=${divergent && routeTo.trajectory(name, { step: divergent.step, choice: divergent.choice })}>
        First divergent step <span class="muted">${glossary && (divergent ? `step ${divergent.step}, ${divergent.colour} by ${divergent.by}` : noneDiverges(answers))}</span>
      <//>
      <a class="button" href=${routeTo.compare(`t:${name}`, null)}>Compare</a>
    </nav>
    <${Cells} mismatch=${mismatch} glossary=${glossary} name=${name} />
    <${Judgement} name=${name} version=${version} />
    <div class="split">
      <${Steps} steps=${steps} tree=${tree} step=${step} choice=${choice} name=${name} />
      <div class="main-column">
        ${step == null
          ? html`<${Empty}>No answer is stored yet.<//>`
          : html`<${Answer} key=${`${step}`} name=${name} step=${step} choice=${choice} token=${token} version=${versionOf(data.steps.filter((s) => s.step === step))} node=${nodesOf(tree).get(`${step}.${choice}`)} onToken=${(i) => go(here({ token: i }), true)} />`}
      </div>
    </div>
    <${Exports} name=${name} />`;
}

function noneDiverges(answers) {
  if (!answers.some((a) => a.score)) return "no step is scored";
  return answers.some((a) => a.comparable) ? "none: every comparable step is within band" : "no comparable step";
}

function Summary({ row, reward }) {
  return html`<${Capture} row=${row} /> · ${row.models.join(", ")} · started <${Time} ns=${row.started_ns} seconds />, took ${duration((row.ended_ns - row.started_ns) / 1e9)} ·
    ${" "}${plural(row.steps, "step")} · ${count(row.scored)} of ${count(row.scorable)} scored${reward ? ` · reward ${round(reward.value)}${reward.source ? ` by ${reward.source}` : ""}` : ""}`;
}

function Gaps({ row }) {
  return html`<section class="alarm amber" aria-label="Gaps of the capture">
    <${BandMark} colour="amber" />
    <div><p>Incomplete capture: the numbers speak for ${count(row.captured)} of ${count(row.choices)} answers.</p><ul class="reasons">${row.gaps.map((g) => html`<li>${g}</li>`)}</ul></div>
  </section>`;
}

function Jump({ to, children }) {
  return to ? html`<a class="button" href=${to}>${children}</a>` : html`<span class="button off">${children}</span>`;
}

/** The whole trajectory under each (engine, trainer), and what else the gateway says of it. */
function Cells({ mismatch, glossary, name }) {
  return html`<${Show} answer=${mismatch} what="drift of the whole">
    ${(data) => html`<${Section} id="whole" title="As a whole" raw=${paths.mismatch(name)}>
        ${!data.cells.length
          ? html`<${Empty}>Not scored yet.<//>`
          : html`<${Scroll} label="Drift of the whole trajectory, by trainer">
              <table class="rows">
                <thead><tr><th scope="col">engine → trainer</th><th scope="col">comparable</th><th scope="col" class="n">k3</th><th scope="col" class="n">mean |D|</th><th scope="col" class="n">max |D|</th><th scope="col" class="n">routes</th><th scope="col" class="n">answers</th><th scope="col" class="n">tokens</th></tr></thead>
                <tbody>
                  ${data.cells.map(({ whole: c }) => {
                    const of = c.measures ?? c.all_measures;
                    const value = (metric, from = of) => html`<${Metric} glossary=${glossary} name=${metric} measures=${from} verdict=${c.verdict} slack=${c.k3_slack} />`;
                    return html`<tr>
                      <th scope="row"><a href=${routeTo.cell(c)}>${side(c.engine)} → ${side(c.trainer)}</a></th>
                      <td><${Verdict} verdict=${c.verdict} /> <${Partial} cell=${c} />${c.comparable.no ? html` <span class="muted">${plural(c.comparable.no, "answer")} left out</span>` : ""}</td>
                      <td class="n nowrap">${value("kl_k3_rollout_train")}</td>
                      <td class="n nowrap">${value("abs_log_ratio_mean")}</td>
                      <td class="n nowrap">${value("abs_log_ratio_max")}</td>
                      <td class="n nowrap">${value("router_set_disagree_rate", c.router)}</td>
                      <td class="n">${count(c.n_seqs)} of ${count(c.captured)}</td>
                      <td class="n">${count(c.n_tokens)}</td>
                    </tr>`;
                  })}
                </tbody>
              </table>
            <//>`}
      <//>`}
  <//>`;
}
