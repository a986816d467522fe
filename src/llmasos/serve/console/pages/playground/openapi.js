/** What an OpenAPI document says of its operations, as the playground shows it. No page. */

import { resolve, sample } from "../../components/schema.js";
import { python } from "../../components/snippets.js";

const METHODS = ["get", "post", "put", "patch", "delete"];

/** Families of paths, the first that fits counts. */
const GROUPS = [
  ["Anthropic", /^\/v1\/messages/],
  ["OpenAI", /^\/(v1|v2)\/|^\/(rerank|score|tokenize|detokenize)$/],
  ["Ollama", /^\/api\//],
  ["LLMasOS", /^\/llmasos\//],
  ["apps", /^\/apps\//],
];

const ORDER = ["OpenAI", "Anthropic", "Ollama", "LLMasOS", "apps", "other"];
export const groupsOf = (operations) => ORDER.filter((group) => operations.some((one) => one.group === group));

/** [{id, method, path, group, summary, operation}], in the document's order. */
export function operationsOf(document) {
  return Object.entries(document.paths ?? {}).flatMap(([path, item]) =>
    METHODS.filter((method) => item[method]).map((method) => ({
      id: `${method} ${path}`,
      method: method.toUpperCase(),
      path,
      group: GROUPS.find(([, shape]) => shape.test(path))?.[0] ?? "other",
      summary: item[method].summary ?? "",
      operation: { ...item[method], parameters: [...(item.parameters ?? []), ...(item[method].parameters ?? [])] },
    })),
  );
}

/** Those with every word of `text` in their method, path or words. */
export function found(operations, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  return operations.filter((one) => {
    const all = `${one.method} ${one.path} ${one.summary} ${one.group}`.toLowerCase();
    return words.every((word) => all.includes(word));
  });
}

/** The inputs of path and query as one schema of an object: fields of a form. */
export function parameterSchema(operation) {
  const shown = operation.parameters.filter((one) => one.in === "path" || one.in === "query");
  const properties = shown.map((one) => [one.name, { description: one.description, ...one.schema }]);
  const required = shown.filter((one) => one.required).map((one) => one.name);
  return { type: "object", properties: Object.fromEntries(properties), required };
}

/** The schema of a JSON body; undefined: it takes none. */
export const bodySchema = (operation) => operation.requestBody?.content?.["application/json"]?.schema;

const user = (content) => [{ role: "user", content }];
const TEXT = "The capital of France is";
/** Bodies for which the schema alone says too little. */
const BODIES = {
  "/v1/chat/completions": { messages: user("Say hello."), max_tokens: 40, stream: true },
  "/v1/completions": { prompt: TEXT, max_tokens: 20 },
  "/v1/embeddings": { input: ["A cat sat.", "A dog ran."] },
  "/v1/rerank": { query: "a pet", documents: ["Rain fell.", "A cat sat."] },
  "/v1/score": { text_1: "a pet", text_2: ["Rain fell.", "A cat sat."] },
  "/v1/responses": { input: "Say hello.", max_output_tokens: 40 },
  "/v1/messages": { messages: user("Say hello."), max_tokens: 40 },
  "/v1/messages/count_tokens": { messages: user("Say hello.") },
  "/tokenize": { prompt: TEXT, return_token_strs: true },
  "/detokenize": { tokens: [1, 2, 3] },
  "/api/chat": { messages: user("Say hello."), stream: false },
  "/api/generate": { prompt: TEXT, stream: false, options: { num_predict: 20 } },
  "/api/embed": { input: ["A cat sat."] },
};

/** A body to begin with. `models`: {chat, embed}, names to fill in. */
export function sampleBody(path, operation, document, models) {
  const schema = bodySchema(operation);
  if (!schema) return undefined;
  const whole = resolve(schema, document);
  const given = operation.requestBody.content["application/json"];
  const example = given.example ?? Object.values(given.examples ?? {})[0]?.value;
  const body = structuredClone(example ?? BODIES[path.replace(/^\/(v2)?\/?(rerank|score)$/, "/v1/$2")] ?? sample(whole, document));
  if (!body || typeof body !== "object" || !whole.properties?.model) return body;
  const wants = /embed|rerank|score/.test(path) ? models.embed : models.chat;
  return { model: body.model || wants || models.chat || models.embed || "", ...without(body, "model") };
}

const without = ({ ...object }, name) => (delete object[name], object);

/** {url, missing} with the inputs in their places. */
export function urlOf(root, path, operation, values) {
  const missing = [];
  const filled = path.replace(/\{([^}:]+)(:[^}]*)?\}/g, (_, name, rest) => {
    const value = values[name] ?? "";
    if (value === "") missing.push(name);
    return rest ? String(value).split("/").map(encodeURIComponent).join("/") : encodeURIComponent(value);
  });
  const names = operation.parameters.filter((one) => one.in === "query").map((one) => one.name);
  const pairs = names.flatMap((name) => [values[name] ?? []].flat().map((value) => [name, String(value)]));
  return { url: root + filled + (pairs.length ? `?${new URLSearchParams(pairs)}` : ""), missing };
}

/** Any request as Python (httpx) and JavaScript (fetch). */
export function requestSnippets({ method, url, body, hasKey, stream }) {
  const headers = hasKey ? '\n    headers={"Authorization": f"Bearer {os.environ[\'LLMASOS_API_KEY\']}"},' : "";
  const json = body === undefined ? "" : `\n    json=${python(body, "    ")},`;
  const call = `"${method}",\n    ${JSON.stringify(url)},${headers}${json}\n    timeout=None,\n`;
  const start = `${hasKey ? "import os\n\n" : ""}import httpx\n\n`;
  const py = stream
    ? `${start}with httpx.stream(\n    ${call}) as answer:\n    for line in answer.iter_lines():\n        print(line)`
    : `${start}answer = httpx.request(\n    ${call})\nprint(answer.status_code, answer.text)`;
  const sent = [`method: "${method}"`];
  const given = { ...(body === undefined ? {} : { "content-type": "application/json" }) };
  const key = hasKey ? [...Object.entries(given).map(([k, v]) => `"${k}": "${v}"`), "authorization: `Bearer ${process.env.LLMASOS_API_KEY}`"] : Object.entries(given).map(([k, v]) => `"${k}": "${v}"`);
  if (key.length) sent.push(`headers: { ${key.join(", ")} }`);
  if (body !== undefined) sent.push(`body: JSON.stringify(${JSON.stringify(body, null, 2).replaceAll("\n", "\n  ")})`);
  const read = stream
    ? "for await (const piece of answer.body.pipeThrough(new TextDecoderStream())) console.log(piece);"
    : "console.log(answer.status, await answer.text());";
  const js = `const answer = await fetch(${JSON.stringify(url)}, {\n  ${sent.join(",\n  ")},\n});\n${read}`;
  return { python: py, js };
}

