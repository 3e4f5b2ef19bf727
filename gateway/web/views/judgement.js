// May it be trained on, and why do the two sides differ: verdict and causes of one trajectory.
import { html, useState } from "../html.js";
import { paths, useAnswer } from "../api.js";
import { count, num, percent, plural } from "../format.js";
import { Choice, Empty, Fold, Raw, routeTo, Scroll, Section, Show, Words } from "../parts.js";

const PROFILES = [
  ["default", "default", "limits that fire on real data"],
  ["observatory", "observatory", "the original observatory's limits"],
];

const TIERS = {
  train: ["●", "green", "train"],
  train_with_correction: ["▲", "amber", "train with correction"],
  replay: ["▲", "amber", "replay"],
  quarantine: ["■", "red", "quarantine"],
};

function Tier({ of }) {
  const [sign, colour, words] = TIERS[of] ?? ["–", "", of ?? "no verdict"];
  return html`<strong class=${`tier ${colour}`}><span aria-hidden="true">${sign} </span>${words}</strong>`;
}

/** `version`: of what is scored; another one is judged anew. */
export function Judgement({ name, version }) {
  const [profile, setProfile] = useState("default");
  const path = paths.verdict(name, profile);
  const verdict = useAnswer(path, 0, version);
  return html`<${Section}
    id="verdict"
    title="Train on it?"
    raw=${path}
    aside=${html`<${Choice} label="Budget of the verdict" name="profile" value=${profile} options=${PROFILES} onChange=${setProfile} />`}
  >
    <${Show} answer=${verdict} what="the verdict">
      ${(data) => html`${data.items.map((item) => html`<${Item} item=${item} many=${data.items.length > 1} />`)}
        ${data.groups.map((group) => html`<${Group} group=${group} />`)}`}
    <//>
    <${Causes} name=${name} version=${version} />
  <//>`;
}

function Item({ item, many }) {
  const v = item.verdict;
  return html`<div>
    <p>
      <${Tier} of=${v.verdict} />
      ${many && html` <span class="muted">by trainer ${item.trainer_digest}</span>`}
      ${" "}<span class="muted">${v.why_null ?? `over ${plural(item.n_tokens, "comparable token")}, ${count(item.scored)} of ${count(item.captured)} answers scored, weights ${item.weight_versions.join(", ") || "unknown"}`}</span>
    </p>
    <ul class="reasons">
      ${v.reasons.map(
        (r) => html`<li><code>${r.code}</code> <${Words} text=${r.detail} /> <span class="muted">(alone: ${TIERS[r.verdict]?.[2] ?? r.verdict})</span><span class="fix">→ <${Words} text=${r.fix} /></span></li>`,
      )}
    </ul>
    <${Gates} gates=${v.gates} />
  </div>`;
}

/** What other trainers' default gates would do with these tokens. */
function Gates({ gates }) {
  const known = gates.filter((g) => g.share != null);
  if (!known.length) return null;
  const caught = known.filter((g) => g.share > 0).length;
  return html`<${Fold} summary=${`Gates of trainers: ${caught} of ${known.length} would catch something`}>
    <${Scroll} label="Gates of trainers" tall>
      <table class="rows">
        <thead><tr><th scope="col">gate</th><th scope="col">rule</th><th scope="col">of</th><th scope="col" class="n">share</th></tr></thead>
        <tbody>${known.map((g) => html`<tr><th scope="row"><code>${g.gate.metric}</code></th><td>${g.gate.rule}</td><td>${g.gate.of}</td><td class="n">${percent(g.share)}</td></tr>`)}</tbody>
      </table>
    <//>
  <//>`;
}

function Group({ group }) {
  return html`<div>
    <h3>Its prompt group: <${Tier} of=${group.verdict.verdict} /></h3>
    <p class="muted small">
      ${plural(group.members.length, "run")} of one prompt: ${group.members.map((m, i) => html`${i ? ", " : ""}<a href=${routeTo.trajectory(m.trajectory)}>${m.trajectory}</a> ${TIERS[m.verdict.verdict]?.[2] ?? "no verdict"}`)}
    </p>
  </div>`;
}

function Causes({ name, version }) {
  const path = paths.explain(name);
  const answer = useAnswer(path, 0, version);
  return html`<div>
    <div class="card-head"><h3>Why the two sides differ</h3><${Raw} href=${path} what="causes" /></div>
    <${Show} answer=${answer} what="the causes">
      ${(data) =>
        data.items.length
          ? data.items.map((item) => html`<${Explained} item=${item} name=${name} />`)
          : html`<${Empty}>${data.why_empty ?? "Nothing to explain."}<//>`}
    <//>
  </div>`;
}

function Explained({ item, name }) {
  const first = item.first_divergent;
  return html`<div>
    <p class="muted small">
      Shares of mean |D| ${num(item.abs_log_ratio_mean)} nats over ${plural(item.n_tokens, "comparable token")}. Noise floor: ${num(item.noise_floor)} nats.
      ${first && html` First token beyond ×2: <a href=${routeTo.token(first, name)}>step ${first.step}, token ${first.token_index}</a>.`}
    </p>
    ${item.set_aside.length > 0 && html`<ul class="reasons">
      ${item.set_aside.map(
        (a) => html`<li><code>${a.code}</code> set aside: ${plural(a.tokens, "token")}, ${percent(a.share_of_tokens)} of all and ${percent(a.share_of_drift)} of all |D|, in step ${a.steps.join(", ")}: ${a.detail}<span class="fix">→ ${a.fix}</span></li>`,
      )}
    </ul>`}
    ${item.left_out_responses > 0 && html`<p class="muted small">A long run: ${plural(item.n_responses, "answer")} evenly over it were read, ${count(item.left_out_responses)} with ${plural(item.left_out_tokens, "token")} were not.</p>`}
    ${item.causes.length > 0 && html`<${Scroll} label="Causes">
      <table class="rows causes">
        <thead><tr><th scope="col">cause</th><th scope="col" class="n">share</th><th scope="col">how known</th><th scope="col">what is seen</th></tr></thead>
        <tbody>
          ${item.causes.map(
            (c) => html`<tr>
              <th scope="row">${c.name.replace("_", " ")}</th>
              <td class="n nowrap"><meter min="0" max="1" value=${c.share} aria-label=${`share of ${c.name}`}>${percent(c.share)}</meter> <span class="share">${percent(c.share)}</span></td>
              <td>${c.found}</td>
              <td class="reads">${c.detail}${c.fix && c.fix !== "nothing" && html` <span class="muted">→ ${c.fix}</span>`}</td>
            </tr>`,
          )}
        </tbody>
      </table>
    <//>`}
  </div>`;
}
