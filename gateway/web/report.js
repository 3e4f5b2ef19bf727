// A report: the answers that `driftgate report` wrote beside this page, in the place of a gateway.
// A page that is opened from a file may load scripts and nothing else, so its answers are scripts.
const answers = window.driftgateAnswers ?? {};

/** What the report says of itself; null where a gateway serves the page. */
export const report = answers.report ?? null;

const loading = new Map();

function load(file) {
  if (!loading.has(file)) {
    const loaded = new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = file;
      script.onload = resolve;
      script.onerror = () => {
        loading.delete(file);
        reject(new Error(`${file} is missing beside this page.`));
      };
      document.head.append(script);
    });
    loading.set(file, loaded);
  }
  return loading.get(file);
}

/** The answer to a path of the API; undefined where the report does not hold it. */
export async function answer(path) {
  const [start, query] = path.split("?");
  if (start === "/api/trajectories") return page(new URLSearchParams(query));
  const file = report.files[path];
  if (file && answers[path] === undefined) await load(file);
  return answers[path];
}

/** As the gateway filters them. */
function page(query) {
  const fits = (row) =>
    (!query.has("model") || row.models.includes(query.get("model"))) &&
    (!query.has("complete") || row.complete === (query.get("complete") === "true")) &&
    (!query.has("scored") || (row.scored > 0 && row.scored === row.scorable) === (query.get("scored") === "true"));
  const rows = answers.rows.filter(fits);
  const from = query.has("before") ? rows.findIndex((row) => row.trajectory === query.get("before")) + 1 : 0;
  const items = rows.slice(from, from + Number(query.get("limit") ?? 50));
  return { items, next: from + items.length < rows.length ? items.at(-1).trajectory : null };
}
