// What routing replay would remove, where a trace or a cell was scored under the rollout's routes too.
import { html } from "./html.js";
import { Raw, Section } from "./parts.js";
import { num, percent, plural } from "./format.js";

const LINES = [
  ["mean |D|", "abs_log_ratio_mean"],
  ["k3", "kl_k3_rollout_train"],
];

/** Nothing where there was no replay. `of`: a score, or a cell. */
export function Replay({ of, raw }) {
  const found = of?.replay;
  if (!found) return null;
  return html`<${Section} id="replay" title="Routing replay" raw=${raw}>
    <p class="muted small">
      The same tokens scored with the trainer's own routes and with the rollout's: what is gone is what routing replay (R3) would remove.
      ${" "}${plural(found.n_tokens, "token")}${found.coverage == null ? "" : `, ${percent(found.coverage)} of the routes replayed`}.
    </p>
    <table class="rows">
      <thead><tr><th scope="col">metric</th><th scope="col" class="n">own routes, nats</th><th scope="col" class="n">rollout's routes, nats</th><th scope="col" class="n">removed</th></tr></thead>
      <tbody>
        ${LINES.map(([text, name]) => html`<tr>
          <th scope="row">${text}</th>
          <td class="n">${num(found.native.metrics[name])}</td>
          <td class="n">${num(found.measures.metrics[name])}</td>
          <td class="n">${percent(found.shares.metrics[`replay_removes_${name}`])}</td>
        </tr>`)}
      </tbody>
    </table>
  <//>`;
}
