// The steps of a run as a tree: what continues what, why a prefix broke, and how far each drifts.
import { html } from "../html.js";
import { paths } from "../api.js";
import { count, num, percent, plural, visible } from "../format.js";
import { BandMark, Raw, Reasons, routeTo, Verdict } from "../parts.js";
import { worstBand } from "../scale.js";

export function Steps({ steps, tree, step, choice, name }) {
  return html`<nav class="steps card" aria-label="Steps">
    <div class="card-head"><h2>Steps</h2><${Raw} href=${paths.trajectory(name)} what="the steps" /></div>
    <ol>
      ${steps.map(
        (s) => html`<li style=${{ marginInlineStart: `${Math.min(s.depth, 6) * 12}px` }}>
          ${s.notes.map((note) => html`<p class="break">${note}</p>`)}
          ${s.answers.map(
            (a) => html`<a href=${routeTo.trajectory(name, { step: a.step, choice: a.choice })} aria-current=${a.step === step && a.choice === choice ? "true" : undefined}>
              <span class="step-name">${a.step}${s.answers.length > 1 ? `.${a.choice}` : ""}</span>
              <span class="step-what">${plural(a.tokens, "token")}${a.tool ? " · tool" : ""}</span>
              <span class="step-drift">${a.comparable ? html`<${BandMark} colour=${a.colour} /> ${num(a.k3)}` : a.score ? html`<${Verdict} verdict="no" short /> <span class="muted">left out</span>` : html`<span class="muted">…</span>`}</span>
            </a>`,
          )}
          ${!s.answers.length && html`<p class="break">${s.step}: ${s.state}</p>`}
        </li>`,
      )}
    </ol>
    <p class="muted small">k3 of each answer, nats; its sign is the worst band of k3, mean |D|, the share beyond ×2 and routes.</p>
    ${tree && html`<${Shape} tree=${tree} />`}
  </nav>`;
}

/** Kinds of the tree that stay in the column of the call that they follow. */
const GOES_ON = ["root", "extension", "broken", "handoff", "compaction", "no_tokens"];

/** What a kind is called where it is not simply the next step; its sign. */
const KINDS = {
  branch: "⑂ branch",
  parallel: "⑂ parallel call",
  choice: "⑂ choice",
  handoff: "⇄ handoff",
  sub_agent: "⑂ sub-agent",
  compaction: "⌇ compaction",
  retried: "↻ retried, no sample",
  no_tokens: "? no tokens",
};

/** Nodes of the tree by `step.choice`; of a retried call the last one, which is the sample. */
export function nodesOf(tree) {
  return new Map((tree?.nodes ?? []).toSorted((a, b) => a.retry - b.retry).map((n) => [`${n.step}.${n.choice}`, n]));
}

/** Steps with their place in the tree, why a prefix broke, and the drift of each answer. */
export function outline(data, tree, glossary) {
  const nodes = nodesOf(tree);
  const byTrace = new Map((tree?.nodes ?? []).map((n) => [n.trace_id, n]));
  const depths = new Map();
  for (const n of tree?.nodes ?? []) {
    depths.set(n.trace_id, (depths.get(n.after) ?? 0) + (n.after == null || GOES_ON.includes(n.kind) ? 0 : 1));
  }
  let last = null;
  return data.steps.map((s) => {
    const node = nodes.get(`${s.step}.${s.choices[0]?.meta.choice ?? 0}`);
    const notes = node ? notesOf(node, byTrace.get(node.after), last) : [];
    last = node ?? last;
    if (s.calls.length > 1) notes.push(`↻ ${plural(s.calls.length - 1, "retry", "retries")}`);
    const state = s.calls.at(-1)?.state.replace("_", " ") ?? "no call";
    return { step: s.step, depth: depths.get(node?.trace_id) ?? 0, notes, state, answers: s.choices.map((c) => answerOf(c, glossary)) };
  });
}

/** In a few words, how a call hangs on the one it follows; nothing where it is the one above. */
function notesOf(node, after, last) {
  const from = after && after !== last && after.step !== last?.step ? ` of step ${after.step}` : "";
  const notes = [];
  if (node.broken) notes.push(`⌇ ${node.broken.reasons[0]?.code ?? "broken"}${from}, token ${count(node.broken.position)}`);
  else if (KINDS[node.kind]) notes.push(`${KINDS[node.kind]}${from}${node.kind === "sub_agent" && node.agent ? `: ${node.agent}` : ""}`);
  if (node.kind === "root" && last) notes.push("○ begins afresh");
  if (node.ambiguous.length) notes.push(`? ${plural(node.ambiguous.length, "other place")} fits as well`);
  return notes;
}

/** What a trainer saves by merging, and the causes of all breaks. */
export function Shape({ tree }) {
  const share = tree.tokens.sent ? 1 - tree.tokens.once / tree.tokens.sent : null;
  const breaks = Object.entries(tree.breaks).map(([code, n]) => `${code} ×${n}`);
  return html`<p class="muted small">
    ${plural(tree.samples, "answer")} in ${plural(tree.tokens.lines, "sequence")}: ${count(tree.tokens.once)} of ${count(tree.tokens.sent)} tokens are scored, ${percent(share)} merge.
    ${breaks.length > 0 && html` Prefixes broken: ${breaks.join(", ")}.`} <${Raw} href=${paths.tree(tree.trajectory)} what="the tree" />
  </p>`;
}

/** Why the tokens of an answer's prompt are not those that it should continue. */
export function Break({ node, name }) {
  const found = node?.broken;
  if (!found) return null;
  return html`<div class="broken">
    <p><${BandMark} colour="amber" /> The prompt breaks with its history at token ${count(found.position)} of ${count(found.of)}: what follows is trained as a sequence of its own.</p>
    <${Reasons} reasons=${found.reasons} />
    ${found.was != null && html`<dl class="pairs tight"><dt>was</dt><dd><code class="text">${visible(found.was)}</code></dd><dt>now</dt><dd><code class="text">${visible(found.now)}</code></dd></dl>`}
    <p class="small"><${Raw} href=${paths.tree(name)} what="the tree" /></p>
  </div>`;
}

function answerOf(choice, glossary) {
  const score = choice.scores.filter((s) => s.kind === "drift").at(-1) ?? null;
  return {
    step: choice.meta.step,
    choice: choice.meta.choice,
    tokens: choice.response_len,
    tool: choice.meta.finish_reason === "tool_calls",
    score,
    k3: score?.measures?.metrics.kl_k3_rollout_train ?? null,
    comparable: score != null && score.measures != null && score.comparable.verdict !== "no",
    ...(score ? worstBand(glossary, score, score.comparable.verdict) : { colour: null, by: null }),
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
