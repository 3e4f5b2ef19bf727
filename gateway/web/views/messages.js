// What the agent sent and what it got, as it reads: roles, contents, tool calls.
import { html } from "../html.js";
import { Fold } from "../parts.js";
import { plural } from "../format.js";
import { report } from "../report.js";

const LONG = 1200;

export function Messages({ request }) {
  if (!request) return html`<p class="muted">${report ? "The request's text is left out of this report." : "The request was not stored."}</p>`;
  if (typeof request === "string") return html`<${Text} text=${request} />`;
  if (!request.messages) return html`<${Text} text=${promptText(request.prompt)} />`;
  // What this step adds: everything after the last answer; the rest was seen in earlier steps.
  const last = request.messages.findLastIndex((m) => m.role === "assistant");
  const [before, added] = [request.messages.slice(0, last + 1), request.messages.slice(last + 1)];
  return html`<div class="messages">
    ${before.length > 0 && html`<${Fold} summary=${`${plural(before.length, "earlier message")}`}>${before.map((m) => html`<${Message} message=${m} />`)}<//>`}
    ${added.map((m) => html`<${Message} message=${m} />`)}
    ${request.tools?.length > 0 && html`<${Fold} summary=${plural(request.tools.length, "tool") + " offered"}><ul class="plain">${request.tools.map((t) => html`<li><code>${t.function?.name ?? t.type}</code> ${t.function?.description ?? ""}</li>`)}</ul><//>`}
  </div>`;
}

const promptText = (prompt) => (typeof prompt === "string" ? prompt : JSON.stringify(prompt));

function Message({ message }) {
  return html`<div class=${`message ${message.role}`}>
    <p class="role">${message.role}${message.name ? ` ${message.name}` : ""}</p>
    <div>
      <${Text} text=${contentText(message.content)} />
      <${ToolCalls} calls=${message.tool_calls} />
    </div>
  </div>`;
}

function contentText(content) {
  if (content == null) return "";
  if (typeof content === "string") return content;
  return content.map((part) => part.text ?? `[${part.type}]`).join("\n");
}

function Text({ text }) {
  if (!text) return null;
  if (text.length <= LONG) return html`<p class="text">${text}</p>`;
  return html`<p class="text">${text.slice(0, LONG)}…</p>
    <${Fold} summary=${`the other ${(text.length - LONG).toLocaleString("en-GB")} characters`}><p class="text">${text.slice(LONG)}</p><//>`;
}

function ToolCalls({ calls }) {
  return (calls ?? []).map(
    (call) => html`<p class="tool-call"><span class="tag">tool call</span> <code>${call.function?.name}(${call.function?.arguments ?? ""})</code></p>`,
  );
}

/** The tool calls that a response was parsed into; its text stands below as tokens. */
export function Reply({ response, meta }) {
  const message = response?.message;
  return html`<div class="reply">
    <${ToolCalls} calls=${message?.tool_calls} />
    <p class="muted small">finish reason: ${response?.finish_reason ?? meta.finish_reason ?? "none"}</p>
  </div>`;
}
