/** What is sent for an answer, and the same as code. */

import { ROOT, key } from "../../core/api.js";
import { curl, python, shell } from "../../components/snippets.js";
import { branch } from "./store.js";

/** Sampling settings: how each is asked for, in the order of the form. */
export const NUMBERS = [
  { name: "temperature", min: 0, max: 2, step: 0.05 },
  { name: "top_p", min: 0, max: 1, step: 0.01 },
  { name: "top_k", min: 0, max: 200, step: 1 },
  { name: "min_p", min: 0, max: 1, step: 0.01 },
  { name: "repetition_penalty", min: 0.5, max: 2, step: 0.01 },
  { name: "frequency_penalty", min: -2, max: 2, step: 0.05 },
  { name: "presence_penalty", min: -2, max: 2, step: 0.05 },
];
export const WHOLES = ["max_tokens", "seed"];

const given = (value) => value !== undefined && value !== null && value !== "";

/** The text of a file for a model: its name, then what is in it between fences that it does not hold itself. */
function fenced({ name, text }) {
  let fence = "```";
  while (text.includes(fence)) fence += "`";
  return `${name}:\n${fence}\n${text}\n${fence}`;
}

const cited = (passages) =>
  `Use these passages where they help, and name them as [1], [2], …\n\n${passages.map((one, i) => `[${i + 1}] (${one.citation})\n${one.text}`).join("\n\n")}`;

function userContent(node) {
  const files = node.attachments ?? [];
  const texts = files.filter((file) => file.kind === "text").map(fenced);
  const passages = node.passages?.length ? [cited(node.passages)] : [];
  const text = [...passages, ...texts, node.content].filter(Boolean).join("\n\n");
  const images = files.filter((file) => file.kind === "image");
  if (!images.length) return text;
  return [{ type: "text", text }, ...images.map((file) => ({ type: "image_url", image_url: { url: file.url } }))];
}

/** The messages up to and with node `id`; `second`: as the second model has them. */
export function messagesOf(chat, id, second = false) {
  const system = chat.settings.system?.trim() ? [{ role: "system", content: chat.settings.system }] : [];
  const said = branch(chat, id).flatMap((node) => {
    if (node.role === "user") return [{ role: "user", content: userContent(node) }];
    const content = (second && node.twin ? node.twin : node).content;
    return content ? [{ role: "assistant", content }] : [];
  });
  return [...system, ...said];
}

/** Fields of the request beside model and messages. Throws SyntaxError for a schema that is no JSON. */
export function fieldsOf(settings) {
  const fields = {};
  for (const name of [...NUMBERS.map((one) => one.name), ...WHOLES]) if (given(settings[name])) fields[name] = Number(settings[name]);
  if (given(settings.reasoning_effort)) fields.reasoning_effort = settings.reasoning_effort;
  const stop = (settings.stop ?? "").split("\n").filter(Boolean);
  if (stop.length) fields.stop = stop;
  if (settings.schema?.trim()) {
    const schema = JSON.parse(settings.schema);
    fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  }
  return fields;
}

/** The tools of a run: names of the server's, and functions of the person's own. Throws SyntaxError. */
export function toolsOf(settings) {
  const own = settings.functions?.trim() ? [JSON.parse(settings.functions)].flat() : [];
  return [...(settings.tools ?? []), ...own.map((one) => (one.type ? one : { type: "function", function: one }))];
}

/** What an agent is asked for beside its input. Of the sampling, runs take the temperature and the length of answers. */
export function agentFields(model, messages, settings, tools) {
  const fields = { model, tools };
  const system = messages.find((one) => one.role === "system")?.content;
  if (system) fields.system = system;
  if (given(settings.temperature)) fields.temperature = Number(settings.temperature);
  if (given(settings.max_tokens)) fields.limits = { answer_tokens: Number(settings.max_tokens) };
  if (settings.schema?.trim()) fields.output = JSON.parse(settings.schema);
  return fields;
}

export const agentInput = (messages) => messages.filter((one) => one.role !== "system");

/** A run with tools as code. */
function agentSnippets(model, messages, settings, tools) {
  const fields = agentFields(model, messages, settings, tools);
  const input = agentInput(messages);
  return {
    curl: curl({ url: `${ROOT}/llmasos/v1/agents/runs`, method: "POST", body: { input, ...fields, stream: true }, hasKey: Boolean(key.value), stream: true }),
    python: `from llmasos.client import Client

with Client("${ROOT}/v1") as client:  # a key: api_key="…", else LLMASOS_API_KEY
    run = client.agents.run(
        ${python(input, "        ")},
${Object.entries(fields).map(([name, value]) => `        ${name}=${python(value, "        ")},\n`).join("")}    )
    print(run.state, run.text)`,
    js: `import { LLMasOS } from "llmasos";

const client = new LLMasOS({ baseURL: "${ROOT}/v1" });
const run = await client.agents.run(${JSON.stringify(input, null, 2)}, ${JSON.stringify(fields, null, 2)});
console.log(run.state, run.text);`,
  };
}

/** The request as Python and JavaScript, and as a line for a shell where one question is all there is. */
export function snippets(model, messages, settings) {
  const tools = toolsOf(settings);
  if (tools.length) return agentSnippets(model, messages, settings, tools);
  const fields = fieldsOf(settings);
  const body = { model, messages, ...fields };
  const url = `${ROOT}/v1/chat/completions`;
  const hasKey = Boolean(key.value);
  const options = Object.entries({ model, ...fields });
  return {
    curl: curl({ url, method: "POST", body: { ...body, stream: true }, hasKey, stream: true }),
    python: `from llmasos.client import Client

with Client("${ROOT}/v1") as client:  # a key: api_key="…", else LLMASOS_API_KEY
    stream = client.stream_chat(
        ${python(messages, "        ")},
${options.map(([name, value]) => `        ${name}=${python(value, "        ")},\n`).join("")}    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)`,
    js: `import { LLMasOS } from "llmasos";

const client = new LLMasOS({ baseURL: "${ROOT}/v1" });
const stream = client.streamChat(${JSON.stringify(messages, null, 2)}, ${JSON.stringify({ model, ...fields }, null, 2)});
for await (const text of stream.text) process.stdout.write(text);`,
    cli: commandLine(model, messages, settings, fields),
  };
}

/** `llmasos run` knows no history and no images: then there is none. */
function commandLine(model, messages, settings, fields) {
  const [asked, ...more] = agentInput(messages);
  if (more.length || typeof asked?.content !== "string" || asked.content.startsWith("-")) return undefined;
  const words = ["llmasos", "run", model, asked.content];
  const system = messages.find((one) => one.role === "system")?.content;
  if (system) words.push("--system", system);
  for (const [name, value] of Object.entries(fields)) if (typeof value === "number") words.push(`--${name.replaceAll("_", "-")}=${value}`);
  for (const text of fields.stop ?? []) words.push(`--stop=${text}`);
  if (settings.schema?.trim()) words.push("--json-schema", JSON.stringify(JSON.parse(settings.schema)));
  return words.map(shell).join(" ");
}
