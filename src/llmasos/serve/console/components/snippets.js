/** The same call elsewhere: as a line for a shell, as Python, as JavaScript. Texts only; nothing is sent. */

const BODYLESS = new Set(["GET", "DELETE"]);

/** A word of a POSIX shell. */
export function shell(word) {
  const text = String(word);
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

/** JSON as Python writes it. */
export function python(value, indent = "") {
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value); // a JSON string is one of Python's too
  const isList = Array.isArray(value);
  const parts = isList
    ? value.map((one) => python(one, indent + "    "))
    : Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one, indent + "    ")}`);
  const [open, close] = isList ? "[]" : "{}";
  const short = `${open}${parts.join(", ")}${close}`;
  if (short.length + indent.length < 90 && !short.includes("\n")) return short;
  return `${open}\n${parts.map((part) => `${indent}    ${part},\n`).join("")}${indent}${close}`;
}

const isName = (name) => /^[A-Za-z_]\w*$/.test(name);

/** The method that a form uses: one with a body where there is a choice. */
export function methodOf(route) {
  return route.methods.includes("POST") ? "POST" : (route.methods.find((one) => !BODYLESS.has(one)) ?? route.methods[0]);
}

/** {url, method, body} of a call of a route below `base`. */
export function requestOf(base, route, inputs) {
  const rest = { ...inputs };
  const path = route.path.replace(/\{(\w+)(?::\w+)?\}/g, (_, name) => {
    const value = rest[name] ?? "";
    delete rest[name];
    return encodeURIComponent(value);
  });
  const method = methodOf(route);
  const url = base.replace(/\/+$/, "") + path;
  if (!BODYLESS.has(method)) return { url, method, body: rest };
  const pairs = Object.entries(rest).flatMap(([name, value]) => [value].flat().map((one) => [name, String(one)]));
  return { url: pairs.length ? `${url}?${new URLSearchParams(pairs)}` : url, method };
}

/** curl for any request; `stream`: show what comes at once. */
export function curl({ url, method, body, headers = {}, hasKey = false, stream = false }) {
  const sent = { ...(body === undefined ? {} : { "Content-Type": "application/json" }), ...headers };
  const words = [`curl${stream ? " -N" : ""} ${shell(url)}`];
  if (method !== (body === undefined ? "GET" : "POST")) words.push(`-X ${method}`);
  if (hasKey) words.push('-H "Authorization: Bearer $LLMASOS_API_KEY"');
  for (const [name, value] of Object.entries(sent)) words.push(`-H ${shell(`${name}: ${value}`)}`);
  if (body !== undefined) words.push(`-d ${shell(JSON.stringify(body))}`);
  return words.join(" \\\n  ");
}

/** A call of an application's route in four languages: {curl, python, js, cli}. `call`: {base, name, route, inputs, hasKey}. */
export function callSnippets(call) {
  const { base, name, route, inputs, hasKey } = call;
  const streams = Boolean(route.stream);
  const headers = streams ? { Accept: "text/event-stream" } : {};
  return {
    curl: curl({ ...requestOf(base, route, inputs), headers, hasKey, stream: streams }),
    python: pythonCall(base, route, inputs, hasKey, streams),
    js: jsCall(base, route, inputs, streams),
    cli: cliCall(name, route, inputs),
  };
}

function pythonCall(base, route, inputs, hasKey, streams) {
  const names = Object.keys(inputs);
  const given = names.every((one) => isName(one) && one !== "route")
    ? names.map((one) => `, ${one}=${python(inputs[one], "    ")}`).join("")
    : `, **${python(inputs, "    ")}`;
  const key = hasKey ? ', api_key=os.environ["LLMASOS_API_KEY"]' : "";
  const lines = [...(hasKey ? ["import os", ""] : []), "from llmasos.client import AppClient", ""];
  lines.push(`with AppClient(${JSON.stringify(base)}${key}) as app:`);
  const called = `(${JSON.stringify(route.name)}${given})`;
  if (streams) lines.push(`    for piece in app.stream${called}:`, '        print(piece, end="", flush=True)');
  else lines.push(`    print(app.call${called})`);
  return lines.join("\n");
}

function jsCall(base, route, inputs, streams) {
  const method = methodOf(route);
  const options = method === "POST" ? "" : `, { method: "${method}" }`;
  const at = base.match(/^(https?:\/\/[^/]+)\/apps\/([^/]+)$/);
  const [client, app] = at ? [`{ baseURL: "${at[1]}/v1" }`, decodeURIComponent(at[2])] : ["", base];
  const called = `(${JSON.stringify(app)}, ${JSON.stringify(route.path)}, ${JSON.stringify(inputs, null, 2)}${options})`;
  const lines = ['import { LLMasOS } from "llmasos";', "", `const { apps } = new LLMasOS(${client});`];
  if (streams) lines.push(`for await (const piece of apps.stream${called}) console.log(piece);`);
  else lines.push(`console.log(await apps.run${called});`);
  return lines.join("\n");
}

/** As cli/inputs.py reads it: a flag again for each element of a list of plain values, JSON for what is nested. */
function cliCall(name, route, inputs) {
  const words = ["llmasos", "app", "run", name, route.name];
  for (const [input, value] of Object.entries(inputs)) {
    const flag = `--${input.replaceAll("_", "-")}`;
    const isPlainList = Array.isArray(value) && value.length > 0 && value.every((one) => typeof one !== "object");
    const elements = isPlainList ? value : [value];
    for (const one of elements) words.push(...cliWords(flag, one));
  }
  return words.map(shell).join(" ");
}

function cliWords(flag, value) {
  if (value === true) return [flag];
  const text = typeof value === "string" ? value : JSON.stringify(value);
  return [`${flag}=${text.startsWith("@") ? `@${text}` : text}`]; // one @ would name a file
}
