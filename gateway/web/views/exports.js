// How to take one run out: the command for each trainer's files, and the JSON that this page is of.
import { html, useState } from "../html.js";
import { paths } from "../api.js";
import { Raw, Section, Select } from "../parts.js";

/** As `driftgate export --format`; what is written, in words. */
export const FORMATS = {
  jsonl: "every trace, nothing left out",
  hf: "Hugging Face datasets",
  megatron: "Megatron-Core routes",
  miles: "miles samples",
  "nemo-rl": "NeMo-RL message log",
  parquet: "Parquet with list columns",
  "prime-rl": "prime-rl training samples",
  skyrl: "SkyRL trajectories",
  slime: "slime samples",
  trl: "TRL prompts and completions",
  verl: "verl DataProto",
};

const COPIED_MS = 1500;

/** A word of a shell's line. */
const quoted = (text) => (/^[\w.:@%+=/-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

export function Exports({ name }) {
  const [format, setFormat] = useState("jsonl");
  const to = format === "jsonl" ? "run.jsonl" : "run";
  const raw = [
    [paths.trajectory(name), "steps"],
    [`${paths.mismatch(name)}`, "drift"],
    [paths.verdict(name, "default"), "verdict"],
    [paths.explain(name), "causes"],
  ];
  return html`<${Section} id="exports" title="Take it out">
    <form class="filters" onSubmit=${(e) => e.preventDefault()}>
      <${Select} label="Files for" value=${format} options=${Object.entries(FORMATS).map(([key, text]) => [key, `${key}: ${text}`])} onChange=${setFormat} />
      <${Command} text=${`driftgate export -f ${format} --trajectory ${quoted(name)} -o ${to}`} />
    </form>
    <p class="muted small">
      Where the store is; <code>--store</code> names another. The same in a terminal:${" "}
      <code>driftgate show ${quoted(name)}</code>, <code>driftgate explain ${quoted(name)}</code>.
      ${" "}The data of this page: ${raw.map(([path, what], i) => html`${i ? " · " : ""}${what} <${Raw} href=${path} what=${what} />`)}
    </p>
  <//>`;
}

function Command({ text }) {
  const [copied, set] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    set(true);
    setTimeout(() => set(false), COPIED_MS);
  };
  return html`<p class="command"><code>${text}</code>
    ${navigator.clipboard && html`<button type="button" onClick=${copy}>${copied ? "Copied" : "Copy"}</button>`}</p>`;
}
