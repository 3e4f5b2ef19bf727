// Every number's name: what it is, its formula, how to read it, and how it misleads.
import { html, useState } from "../html.js";
import { paths, useAnswer } from "../api.js";
import { plural, round } from "../format.js";
import { BandMark, Empty, Scroll, Section, Show, Title } from "../parts.js";

export function Glossary({ query, go }) {
  const answer = useAnswer(paths.glossary);
  const [text, setText] = useState(query.get("q") ?? "");
  const look = (value) => {
    setText(value);
    go(value ? `#/glossary?${new URLSearchParams({ q: value })}` : "#/glossary", true);
  };
  return html`<${Title} raw=${paths.glossary} note="D = log p(trainer) − log p(engine) of a sampled token; ρ = e^D; L is the sum of D over a response.">Glossary<//>
    <form class="filters" onSubmit=${(e) => e.preventDefault()}>
      <label class="field grow"><span>Find</span><input type="search" value=${text} placeholder="a name, another trainer's name for it, a word" onInput=${(e) => look(e.target.value)} /></label>
    </form>
    <${Show} answer=${answer} what="the glossary">${(data) => html`<${Found} data=${data} text=${text} />`}<//>`;
}

function Found({ data, text }) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (...parts) => words.every((word) => parts.join(" ").toLowerCase().includes(word));
  const metrics = (table) => Object.values(table).filter((m) => fits(m.name, m.formula, m.reads, m.trap));
  const [main, router] = [metrics(data.metrics), metrics(data.router_metrics)];
  const codes = Object.entries(data.codes).filter(([code, meaning]) => fits(code, meaning));
  if (!main.length && !router.length && !codes.length) return html`<${Empty}>Nothing has that name.<//>`;
  return html`<${Metrics} id="metrics" title=${`Log-probabilities: ${plural(main.length, "metric")}`} rows=${main} data=${data} />
    <${Metrics} id="router" title=${`Routes of a mixture of experts: ${plural(router.length, "metric")}`} rows=${router} data=${data} />
    <${Codes} codes=${codes} />`;
}

function Metrics({ id, title, rows, data }) {
  if (!rows.length) return null;
  return html`<${Section} id=${id} title=${title}>
    <${Scroll} label=${title}>
      <table class="rows glossary">
        <thead><tr><th scope="col">name</th><th scope="col">formula</th><th scope="col">unit</th><th scope="col">how to read it</th><th scope="col">trap</th><th scope="col">bands</th></tr></thead>
        <tbody>
          ${rows.map(
            (m) => html`<tr>
              <th scope="row"><code>${m.name}</code></th>
              <td>${m.formula}</td>
              <td class="nowrap">${m.unit === "1" ? "" : m.unit}</td>
              <td>${m.reads}</td>
              <td>${m.trap}</td>
              <td class="nowrap"><${Bands} of=${data.bands[m.name]} /></td>
            </tr>`,
          )}
        </tbody>
      </table>
    <//>
  <//>`;
}

function Bands({ of }) {
  if (!of) return null;
  const [inside, outside] = of.ascending ? ["<", "≥"] : ["≥", "<"];
  return html`<${BandMark} colour="green" /> ${inside} ${round(of.green)}<br /><${BandMark} colour="red" /> ${outside} ${round(of.red)}`;
}

function Codes({ codes }) {
  if (!codes.length) return null;
  return html`<${Section} id="codes" title="Reasons of a comparison">
    <${Scroll} label="Reasons of a comparison">
      <table class="rows">
        <thead><tr><th scope="col">code</th><th scope="col">what it means</th></tr></thead>
        <tbody>${codes.map(([code, meaning]) => html`<tr><th scope="row"><code>${code}</code></th><td>${meaning}</td></tr>`)}</tbody>
      </table>
    <//>
  <//>`;
}
