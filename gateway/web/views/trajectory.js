// One agent run: its steps as a tree, how far each drifts, and the answer that is looked at.
import { html, useMemo } from "../html.js";
import { paths, useAnswer } from "../api.js";
import { count, duration, num, plural, side } from "../format.js";
import { BandMark, Empty, Metric, Raw, routeTo, Scroll, Section, Show, Time, Title, Verdict } from "../parts.js";
import { band } from "../scale.js";
import { Answer } from "./answer.js";
import { Judgement } from "./judgement.js";
import { Capture } from "./trajectories.js";

export function Trajectory({ name, query, go }) {
  const path = paths.trajectory(name);
  const detail = useAnswer(path, 5);
  const mismatch = useAnswer(paths.mismatch(name), 10);
  const glossary = useAnswer(paths.glossary).data;
  return html`<${Show} answer=${detail} what=${`trajectory ${name}`}>
    ${(data) => html`<${Whole} name=${name} data=${data} mismatch=${mismatch} glossary=${glossary} query=${query} go=${go} path=${path} />`}
  <//>`;
}

function Whole({ name, data, mismatch, glossary, query, go, path }) {
  const steps = useMemo(() => outline(data, glossary), [data, glossary]);
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
        First divergent step <span class="muted">${divergent ? `step ${divergent.step}, ${divergent.colour} by k3` : "none: every comparable step is within band"}</span>
      <//>
      <a class="button" href=${routeTo.compare(`t:${name}`, null)}>Compare</a>
    </nav>
    <${Cells} mismatch=${mismatch} glossary=${glossary} name=${name} />
    <${Judgement} name=${name} />
    <div class="split">
      <${Steps} steps=${steps} step=${step} choice=${choice} name=${name} />
      <div class="main-column">
        ${step == null
          ? html`<${Empty}>No answer is stored yet.<//>`
          : html`<${Answer} key=${`${step}`} name=${name} step=${step} choice=${choice} token=${token} onToken=${(i) => go(here({ token: i }), true)} />`}
      </div>
    </div>`;
}

function Summary({ row, reward }) {
  return html`<${Capture} row=${row} /> · ${row.models.join(", ")} · started <${Time} ns=${row.started_ns} seconds />, took ${duration((row.ended_ns - row.started_ns) / 1e9)} ·
    ${" "}${plural(row.steps, "step")} · ${count(row.scored)} of ${count(row.scorable)} scored${reward ? ` · reward ${num(reward.value)}${reward.source ? ` by ${reward.source}` : ""}` : ""}`;
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
                    const value = (metric, from = of) => html`<${Metric} glossary=${glossary} name=${metric} measures=${from} moe=${c.router != null} />`;
                    return html`<tr>
                      <th scope="row"><a href=${routeTo.cell(c)}>${side(c.engine)} → ${side(c.trainer)}</a></th>
                      <td><${Verdict} verdict=${c.verdict} />${c.comparable.no ? html` <span class="muted">${plural(c.comparable.no, "answer")} left out</span>` : ""}</td>
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

function Steps({ steps, step, choice, name }) {
  return html`<nav class="steps card" aria-label="Steps">
    <div class="card-head"><h2>Steps</h2><${Raw} href=${paths.trajectory(name)} what="the steps" /></div>
    <ol>
      ${steps.map(
        (s) => html`<li style=${{ marginInlineStart: `${Math.min(s.depth, 6) * 12}px` }}>
          ${s.notes.map((note) => html`<p class="break">${note}</p>`)}
          ${s.answers.map(
            (a) => html`<a href=${routeTo.trajectory(name, { step: a.step, choice: a.choice })} aria-current=${a.step === step && a.choice === choice ? "true" : undefined}>
              <span class="step-name">${a.step}${s.answers.length > 1 ? `.${a.choice}` : ""}</span>
              <span class="step-what">${count(a.tokens)} tokens${a.tool ? " · tool" : ""}</span>
              <span class="step-drift">${a.comparable ? html`<${BandMark} colour=${a.colour} /> ${num(a.k3)}` : a.score ? html`<${Verdict} verdict="no" short /> <span class="muted">left out</span>` : html`<span class="muted">…</span>`}</span>
            </a>`,
          )}
          ${!s.answers.length && html`<p class="break">${s.step}: ${s.state}</p>`}
        </li>`,
      )}
    </ol>
    <p class="muted small">k3 of each answer, nats.</p>
  </nav>`;
}

/** Steps with the depth of their branch, why a prefix broke, and the drift of each answer. */
function outline(data, glossary) {
  const depths = new Map();
  const children = new Map();
  return data.steps.map((s) => {
    const notes = [];
    const first = s.choices[0]?.meta;
    let depth = 0;
    if (first?.parent) {
      const born = children.get(first.parent) ?? 0;
      children.set(first.parent, born + 1);
      depth = (depths.get(first.parent) ?? 0) + (born > 0 ? 1 : 0);
      if (born > 0) notes.push("⑂ branch");
      if (!first.prefix_exact) notes.push(`⌇ prefix breaks after ${count(first.prefix_len)} tokens`);
    }
    for (const c of s.choices) depths.set(c.meta.trace_id, depth);
    if (s.calls.length > 1) notes.push(`↻ ${plural(s.calls.length - 1, "retry", "retries")}`);
    if (first?.ambiguous?.length) notes.push("? ambiguous: several runs could have led here");
    const state = s.calls.at(-1)?.state.replace("_", " ") ?? "no call";
    return { step: s.step, depth, notes, state, answers: s.choices.map((c) => answerOf(c, glossary)) };
  });
}

function answerOf(choice, glossary) {
  const score = choice.scores.filter((s) => s.kind === "drift").at(-1) ?? null;
  const m = score?.measures?.metrics;
  const k3 = m?.kl_k3_rollout_train ?? null;
  return {
    step: choice.meta.step,
    choice: choice.meta.choice,
    tokens: choice.response_len,
    tool: choice.meta.finish_reason === "tool_calls",
    score,
    k3,
    comparable: score != null && score.measures != null && score.comparable.verdict !== "no",
    colour: band(glossary, "kl_k3_rollout_train", k3, { bad: m?.n_bad_tokens, moe: score?.router != null }),
    worst: score?.worst ?? null,
  };
}

/** The largest |D| among comparable answers; among all where none is. */
function worstOf(answers) {
  const known = answers.filter((a) => a.worst?.log_ratio != null);
  const fair = known.filter((a) => a.comparable);
  const size = (a) => Math.abs(a.worst.log_ratio);
  return (fair.length ? fair : known).toSorted((a, b) => size(b) - size(a))[0] ?? null;
}
