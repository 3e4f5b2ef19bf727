// The steps of a run as a tree: what continues what, why a prefix broke, and how far each drifts.
import { html } from "../html.js";
import { paths } from "../api.js";
import { count, num, plural } from "../format.js";
import { BandMark, Raw, routeTo, Verdict } from "../parts.js";
import { band } from "../scale.js";

export function Steps({ steps, step, choice, name }) {
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
export function outline(data, glossary) {
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
export function worstOf(answers) {
  const known = answers.filter((a) => a.worst?.log_ratio != null);
  const fair = known.filter((a) => a.comparable);
  const size = (a) => Math.abs(a.worst.log_ratio);
  return (fair.length ? fair : known).toSorted((a, b) => size(b) - size(a))[0] ?? null;
}
