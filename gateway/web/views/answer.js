// One answer in full: what was asked, the sampled tokens in colour, and all that is known of one.
import { html, useMemo, useState } from "../html.js";
import { paths, useAnswer } from "../api.js";
import { ResponseChart } from "../chart.js";
import { Replay } from "../replay.js";
import { report } from "../report.js";
import { clock, count, num, percent, plural, probability, side, signed, visible } from "../format.js";
import { Choice, Empty, LogRatio, Name, Raw, Reasons, Scroll, Section, Show, Verdict } from "../parts.js";
import { missShare, MODES } from "../scale.js";
import { byDrift, Legend, Tokens } from "../tokens.js";
import { Messages, Reply } from "./messages.js";
import { Break } from "./steps.js";

const LISTED = 12;

export function Answer({ name, step, choice, token, node, version, onToken }) {
  const path = paths.step(name, step);
  const answer = useAnswer(path, 0, version);
  return html`<${Show} answer=${answer} what=${`step ${step}`}>
    ${(detail) => {
      const all = detail.choices;
      const trace = all.find((c) => c.meta.choice === choice) ?? all[0];
      return html`<${Asked} trace=${trace} node=${node} name=${name} path=${path} />
        <${Response} key=${trace.meta.trace_id} trace=${trace} name=${name} step=${step} path=${path} token=${token} onToken=${onToken} />
        <${Replay} of=${trace.score} raw=${path} />`;
    }}
  <//>`;
}

function Asked({ trace, node, name, path }) {
  const meta = trace.meta;
  const sampling = Object.entries(meta.sampling).map(([n, v]) => `${n} ${v}`);
  return html`<${Section} id="asked" title="Asked" raw=${path}>
    <${Messages} request=${trace.request} />
    <p class="muted small">
      ${count(trace.prompt_ids?.length ?? meta.proof.prompt_ids)} prompt tokens · ${sampling.join(", ") || "the engine's defaults"} ·
      ${" "}${meta.streamed ? "streamed" : "JSON"} · named by ${meta.attribution} · at ${clock(meta.started_ns, true)}
    </p>
    <${Break} node=${node} name=${name} />
  <//>`;
}

function Response({ trace, name, step, path, token, onToken }) {
  const [mode, setMode] = useState("d");
  const [hovered, setHovered] = useState(null);
  const hasRoutes = trace.routes != null && trace.trainer_routes != null;
  const routesPath = paths.routes(name, step, trace.meta.choice);
  const routes = useAnswer(hasRoutes ? routesPath : null);
  const missed = useMemo(() => missShare(routes.data), [routes.data]);
  const options = Object.entries(MODES)
    .filter(([key]) => key !== "routes" || hasRoutes)
    .map(([key, m]) => [key, m.label, m.long]);
  const { tokens, score } = trace;
  const values = useMemo(() => tokens.map((t) => MODES[mode].value(t, missed)), [tokens, mode, missed]);
  const worst = useMemo(() => byDrift(tokens).slice(0, LISTED), [tokens]);
  const shownToken = tokens[hovered ?? token] ?? null;
  const aside = html`<${Choice} label="Colour tokens by" name="mode" value=${mode} options=${options} onChange=${setMode} />`;
  return html`<${Section} id="response" title=${`Response, ${plural(tokens.length, "token")}`} raw=${path} aside=${aside}>
    ${score && html`<${ScoreLine} score=${score} />`}
    ${!score && html`<p class="muted">Not scored yet: the engine's side is shown.</p>`}
    <${Reply} response=${trace.response} meta=${trace.meta} />
    ${!tokens.length && html`<${Empty}>The engine gave no token ids.<//>`}
    ${tokens.length > 0 &&
    html`<p class="muted small">Coloured by ${MODES[mode].long}.</p>
      <${Legend} mode=${mode} />
      <div class="reading">
        <div>
          <${Tokens} tokens=${tokens} mode=${mode} missed=${missed} chosen=${token} onChoose=${onToken} onHover=${setHovered} />
          <${ResponseChart} values=${values} unit=${MODES[mode].long} onPick=${onToken} label=${`${MODES[mode].long} of each of ${tokens.length} tokens; the table below has the largest`} />
        </div>
        <${Facts} token=${shownToken} alternatives=${trace.alternatives?.[shownToken?.index]} meta=${trace.meta} missed=${missed} pinned=${hovered == null} />
      </div>
      <div class="two">
        <${Largest} tokens=${tokens} worst=${worst} chosen=${token} onToken=${onToken} raw=${path} />
        ${hasRoutes && token != null && html`<${LayersOf} key=${token} name=${name} step=${step} choice=${trace.meta.choice} token=${token} />`}
      </div>
      ${hasRoutes && html`<p class="small"><${Raw} href=${routesPath} what="route disagreement by token and layer" /> <span class="muted">routes by token and layer</span></p>`}`}
  <//>`;
}

function ScoreLine({ score }) {
  const m = score.measures?.metrics;
  return html`<div class="score-line">
    <p>
      <${Verdict} verdict=${score.comparable.verdict} />
      ${m && html`<span>k3 ${num(m.kl_k3_rollout_train)} <span class="unit">nats</span></span>
        <span>mean |D| ${num(m.abs_log_ratio_mean)} <span class="unit">nats</span></span>
        <span>max |D| ${num(m.abs_log_ratio_max)} <span class="unit">nats</span></span>`}
      <span class="muted">by ${side(score.trainer)} at T = ${score.temperature}, ${score.one_pass ? "one pass with its trajectory" : "a pass of its own"}</span>
    </p>
    ${score.comparable.reasons.length > 0 && html`<${Reasons} reasons=${score.comparable.reasons} />`}
  </div>`;
}

/** Everything known of one token; spoken when it changes by keyboard. */
function Facts({ token, alternatives, meta, missed, pinned }) {
  if (!token) return html`<aside class="facts" aria-label="Token"><p class="muted">Point at a token, or choose one with the arrow keys. <kbd>n</kbd> and <kbd>p</kbd> go by size of D.</p></aside>`;
  const ratio = token.log_ratio == null ? null : Math.exp(token.log_ratio);
  const p = (lp) => (lp == null ? "–" : html`${num(Math.exp(lp))} <span class="muted">log ${num(lp, 4)} nats</span>`);
  return html`<aside class="facts" aria-label="Token" aria-live=${pinned ? "polite" : "off"}>
    <p class="token-big"><code>${visible(token.text)}</code></p>
    <dl class="pairs tight">
      <dt>D</dt><dd><strong><${LogRatio} value=${token.log_ratio} /></strong>${ratio != null && html` <span class="muted">ratio ×${num(ratio)}</span>`}</dd>
      <dt>p engine</dt><dd>${p(token.rollout_logprob)}</dd>
      <dt>p trainer</dt><dd>${p(token.train_logprob)}</dd>
      ${alternatives?.length > 0 && html`<${Likeliest} of=${alternatives} sampled=${token.text} />`}
      <dt>entropy</dt><dd>${num(token.entropy)} <span class="unit">nats</span></dd>
      ${missed && html`<dt>routes</dt><dd>${percent(missed[token.index])} of experts differ</dd>`}
      <dt>place</dt><dd>${token.index} of the response, position ${count(token.position)}</dd>
      <dt>token id</dt><dd>${token.token_id ?? "left out"}</dd>
      <dt>weights</dt><dd>${versionOf(meta, token.index)}</dd>
    </dl>
  </aside>`;
}

/** The policy version that sampled a token: new weights may come while an answer is sampled. */
const versionOf = (meta, index) => meta.weight_spans?.findLast((span) => span.first <= index)?.version ?? meta.weight_version ?? "unknown";

const LIKELIEST = 8;

/** What the engine would as soon have said; there where the agent asked for it. */
function Likeliest({ of, sampled }) {
  return html`<dt>engine's ${of.length === 1 ? "first" : `first ${count(Math.min(of.length, LIKELIEST))}`}</dt>
    <dd><ol class="plain alternatives">${of.toSorted((a, b) => b.logprob - a.logprob).slice(0, LIKELIEST).map((a) => html`<li class=${a.text === sampled ? "sampled" : ""}><code>${visible(a.text)}</code> <span class="muted">${num(probability(a.logprob))}${a.text === sampled ? " sampled" : ""}</span></li>`)}</ol></dd>`;
}

function Largest({ tokens, worst, chosen, onToken, raw }) {
  if (!worst.length) return null;
  return html`<div>
    <div class="card-head"><h3>Largest |D| of this answer</h3><${Raw} href=${raw} what="all tokens" /></div>
    <${Scroll} label="Tokens with the largest |D|">
      <table class="rows">
        <thead><tr><th scope="col">token</th><th scope="col" class="n">index</th><th scope="col" class="n">D, nats</th><th scope="col" class="n">p engine</th><th scope="col" class="n">p trainer</th></tr></thead>
        <tbody>
          ${worst.map((i) => {
            const t = tokens[i];
            return html`<tr class=${i === chosen ? "chosen-row" : ""}>
              <th scope="row"><button type="button" class="link" aria-pressed=${i === chosen} onClick=${() => onToken(i)}><code><${Name} of=${visible(t.text)} /></code><span class="sr"> show token ${i}</span></button></th>
              <td class="n">${i}</td><td class="n">${signed(t.log_ratio)}</td><td class="n">${num(Math.exp(t.rollout_logprob))}</td><td class="n">${num(Math.exp(t.train_logprob))}</td>
            </tr>`;
          })}
        </tbody>
      </table>
    <//>
  </div>`;
}

/** Experts of one token, layer by layer, in each side's order. */
function LayersOf({ name, step, choice, token }) {
  const path = paths.routes(name, step, choice, token);
  const held = !report || report.files[path];
  const answer = useAnswer(held ? path : null);
  if (!held) return html`<div><h3>Experts of token ${token}</h3><${Empty}>This report holds those of the tokens with the largest |D|.<//></div>`;
  return html`<div>
    <div class="card-head"><h3>Experts of token ${token}</h3><${Raw} href=${path} what="this token's routes" /></div>
    <${Show} answer=${answer} what="routes">
      ${(r) =>
        r.reason
          ? html`<${Empty}>${r.reason}<//>`
          : html`<${Scroll} label=${`Experts of token ${token} by layer`} tall>
              <table class="rows experts">
                <thead><tr><th scope="col" class="n">layer</th><th scope="col">engine</th><th scope="col">trainer</th><th scope="col" class="n">missed</th></tr></thead>
                <tbody>
                  ${r.layers.map((layer, l) => {
                    const [a, b] = [r.token.rollout[l], r.token.train[l]];
                    return html`<tr>
                      <th scope="row" class="n">${layer}</th>
                      <td><${Experts} of=${a} other=${b} /></td>
                      <td><${Experts} of=${b} other=${a} /></td>
                      <td class="n">${r.token.missed[l] ?? "–"} of ${r.k}</td>
                    </tr>`;
                  })}
                </tbody>
              </table>
            <//>`}
    <//>
  </div>`;
}

function Experts({ of, other }) {
  const there = new Set(other);
  return html`<span class="expert-list">${of.map((e) => (there.has(e) ? html`<span>${e}</span>` : html`<strong class="differs">${e}<span class="sr"> differs</span></strong>`))}</span>`;
}
