/** A small server that behaves as the model's name says; it also hands out the module and the checks to browsers. */

import { readFile } from "node:fs/promises";
import { createServer } from "node:http";

const PAGES = {
  "/": ["text/html", "data:,<!doctype html><title>checks</title>"],
  "/llmasos.js": ["text/javascript", new URL("../llmasos.js", import.meta.url)],
  "/suite.js": ["text/javascript", new URL("suite.js", import.meta.url)],
};
const head = (object) => ({ id: "c1", object, created: 1, model: "m" });

function answer(content, more = {}) {
  const message = { role: "assistant", content, ...more };
  const choices = [{ index: 0, message, finish_reason: more.tool_calls ? "tool_calls" : "stop" }];
  return { ...head("chat.completion"), choices, usage: { prompt_tokens: 3, completion_tokens: 2, total_tokens: 5 } };
}

function delta(fields, finish_reason = null) {
  return { ...head("chat.completion.chunk"), choices: [{ index: 0, delta: fields, finish_reason }] };
}

function ended(index) {
  const chunk = delta({ content: `${index}` }, "stop");
  return { ...chunk, choices: [{ ...chunk.choices[0], index, text: `${index}` }] }; // of either kind
}

const event = (data, name) => `${name ? `event: ${name}\n` : ""}data: ${JSON.stringify(data)}\n\n`;

function toolCalls(...calls) {
  return calls.map(([name, given], i) => ({
    id: `call_${i}`,
    type: "function",
    function: { name, arguments: typeof given === "string" ? given : JSON.stringify(given) },
  }));
}

/** Starts listening on a free loopback port: {url, close}. */
export async function startFakeServer() {
  const seen = []; // one entry per request: {method, path, body, headers, closed}
  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

  const server = createServer(async (request, response) => {
    const url = new URL(request.url, "http://fake");
    if (request.method === "GET" && PAGES[url.pathname]) {
      const [type, source] = PAGES[url.pathname];
      response.writeHead(200, { "content-type": `${type}; charset=utf-8` });
      return response.end(source instanceof URL ? await readFile(source) : source.slice("data:,".length));
    }
    if (url.pathname === "/seen") return json(response, 200, seen);
    const parts = [];
    for await (const part of request) parts.push(part);
    const text = Buffer.concat(parts).toString();
    const isJson = request.headers["content-type"] === "application/json";
    const entry = { method: request.method, path: request.url, body: isJson ? JSON.parse(text) : text };
    entry.headers = request.headers;
    entry.closed = false;
    response.on("close", () => (entry.closed = !response.writableFinished));
    seen.push(entry);
    const route = `${request.method} ${url.pathname}`;
    if (route === "POST /v1/chat/completions") return chat(entry.body, response);
    return rest(route, entry, response);
  });

  function json(response, status, body, headers = {}) {
    response.writeHead(status, { "content-type": "application/json", "x-request-id": "req_1", ...headers });
    response.end(typeof body === "string" ? body : JSON.stringify(body));
  }

  async function events(response, pieces, end = true) {
    response.writeHead(200, { "content-type": "text/event-stream" });
    for (const piece of pieces) {
      response.write(piece);
      await pause(1);
    }
    if (end) response.end();
  }

  /** A stream in pieces of three bytes, so that characters and line ends are cut through. */
  function cut(...texts) {
    const bytes = Buffer.from(texts.join(""));
    return Array.from({ length: Math.ceil(bytes.length / 3) }, (_, i) => bytes.subarray(3 * i, 3 * i + 3));
  }

  const count = (model) => seen.filter((entry) => entry.body?.model === model).length;

  async function chat(body, response) {
    const { model, messages, stream } = body;
    const last = messages.at(-1).content;
    if (model.startsWith("status-")) {
      const [, status, retry] = model.split("-");
      const error = { message: "no such luck", type: "some_type", param: "model", code: "some_code" };
      return json(response, Number(status), { error }, retry ? { "retry-after": retry } : {});
    }
    if (model.startsWith("flaky") && count(model) === 1) return json(response, 503, "busy", { "retry-after": "0.01" });
    if (model === "page") return json(response, 200, "<html>hello</html>");
    if (model === "silent") return undefined;
    if (model === "tools") return useTools(body, response);
    if (model === "looping") return json(response, 200, answer(null, { tool_calls: toolCalls(["weather", {}]) }));
    if (!stream) return json(response, 200, answer(`${last}!`));
    if (model === "endless") {
      response.writeHead(200, { "content-type": "text/event-stream" });
      while (!response.destroyed) {
        response.write(event(delta({ content: "x" })));
        await pause(2);
      }
      return undefined;
    }
    if (model === "stuck") return events(response, [event(delta({ content: "a" }))], false);
    if (model === "cut-off") return events(response, [event(delta({ content: "a" }))]);
    if (model === "failing") {
      const error = { message: "the model died", type: "server_error", code: "model_crashed" };
      return events(response, [event(delta({ content: "a" })), event({ error })]);
    }
    if (model.startsWith("ends-")) {
      const ends = [...model.slice(5)].map((index) => (index === "D" ? "data: [DONE]\n\n" : event(ended(Number(index)))));
      return events(response, ends);
    }
    const pieces = [...`${last}!`].map((c) => event(delta({ content: c })));
    const usage = { ...head("chat.completion.chunk"), choices: [], usage: { total_tokens: 5 } };
    const closing = [event(delta({}, "stop")), event(usage), "data: [DONE]\n\n"];
    return events(response, cut("\ufeff: hello\r\n", event(delta({ role: "assistant" })), ...pieces, ...closing));
  }

  function useTools({ messages, stream }, response) {
    const results = messages.filter((message) => message.role === "tool");
    if (results.length) {
      const text = results.map((message) => message.content).join(" | ");
      if (!stream) return json(response, 200, answer(text));
      return events(response, [event(delta({ content: text }, "stop")), "data: [DONE]\n\n"]);
    }
    const asked = messages.at(-1).content;
    const calls = asked.startsWith("[") ? JSON.parse(asked) : [["weather", { city: "Bern" }], ["weather", { city: "Rome" }]];
    const tool_calls = toolCalls(...calls);
    if (!stream) return json(response, 200, answer(null, { tool_calls }));
    const pieces = tool_calls.flatMap((call, index) => [
      event(delta({ tool_calls: [{ index, id: call.id, type: "function", function: { name: call.function.name } }] })),
      ...[...call.function.arguments].map((c) => event(delta({ tool_calls: [{ index, function: { arguments: c } }] }))),
    ]);
    return events(response, [...pieces, event(delta({}, "tool_calls")), "data: [DONE]\n\n"]);
  }

  function rest(route, { body, path }, response) {
    const job = { id: "p1", model: "gpt2", state: "running", done: 1, total: 2 };
    const output = [{ type: "message", content: [{ type: "output_text", text: "Paris" }] }];
    const routes = {
      "POST /v1/completions": () =>
        body.model.startsWith("ends-")
          ? events(response, [...body.model.slice(5)].map((index) => event(ended(Number(index)))))
        : body.stream
          ? events(response, cut(...["a", "b"].map((text) => event({ choices: [{ index: 0, text }] })), "data: [DONE]\n\n"))
          : json(response, 200, { ...head("text_completion"), choices: [{ index: 0, text: "dog", finish_reason: "stop" }] }),
      "POST /v1/embeddings": () => json(response, 200, { object: "list", model: "m", data: [{ index: 0, embedding: [1, 2] }] }),
      "GET /v1/models": () => json(response, 200, { object: "list", data: [{ id: "echo", object: "model" }] }),
      "GET /v1/models/a%2Fb": () => json(response, 200, { id: "a/b", object: "model" }),
      "POST /v1/responses": () =>
        body.stream
          ? events(response, [
              event({ type: "response.output_text.delta", delta: "Pa" }, "response.output_text.delta"),
              event({ type: "response.output_text.delta", delta: "ris" }, "response.output_text.delta"),
              event({ type: "response.completed", response: { id: "r1", output } }, "response.completed"),
            ])
          : json(response, 200, { id: "r1", output }),
      "DELETE /v1/responses/r1": () => json(response, 200, { id: "r1", deleted: true }),
      "POST /v1/files": () => json(response, 200, { id: "f1", filename: /filename="([^"]*)"/.exec(body)[1] }),
      "GET /v1/files": () => json(response, 200, { data: [], has_more: false }),
      "GET /v1/files/f1/content": () => json(response, 200, '{"a": 1}\n{"b": 2}\n'),
      "POST /v1/batches": () => json(response, 500, { error: { message: "lost" } }),
      "GET /v1/batches/b1": () => {
        const asked = seen.filter((entry) => entry.path === "/v1/batches/b1").length;
        json(response, 200, { id: "b1", status: asked < 3 ? "in_progress" : "completed" });
      },
      "POST /v1/fine_tuning/jobs": () => json(response, 200, { id: "t1", status: "queued", asked: body }),
      "GET /v1/fine_tuning/jobs/t1": () => {
        const asked = seen.filter((entry) => entry.path === "/v1/fine_tuning/jobs/t1").length;
        json(response, 200, { id: "t1", status: asked < 3 ? "running" : "succeeded", fine_tuned_model: "ft:m::1" });
      },
      "GET /v1/fine_tuning/jobs": () => json(response, 200, { data: [{ id: "t1" }], has_more: false }),
      "POST /v1/fine_tuning/jobs/t1/pause": () => json(response, 200, { id: "t1", status: "paused" }),
      "POST /v1/fine_tuning/jobs/t1/resume": () => json(response, 200, { id: "t1", status: "queued" }),
      "POST /v1/fine_tuning/jobs/t1/cancel": () => json(response, 200, { id: "t1", status: "cancelled" }),
      "GET /v1/fine_tuning/jobs/t1/events": () =>
        path.includes("stream=true")
          ? events(response, [event({ id: "e1", message: "Step 1" }), event({ id: "e2", message: "made" })])
          : json(response, 200, { data: [{ id: "e2", message: "made" }], has_more: true }),
      "GET /v1/fine_tuning/jobs/t1/checkpoints": () => json(response, 200, { data: [{ step_number: 5 }] }),
      "GET /llmasos/v1/status": () => json(response, 200, { data: [{ name: "gpt2", state: "ready" }] }),
      "POST /llmasos/v1/keys": () => json(response, 201, { id: "k1", ...body, key: "sk-1" }),
      "GET /llmasos/v1/keys": () => json(response, 200, { data: [{ id: "k1" }] }),
      "PATCH /llmasos/v1/keys/k1": () => json(response, 200, { id: "k1", ...body }),
      "GET /llmasos/v1/usage": () => json(response, 200, { data: [{ requests: 3 }] }),
      "POST /llmasos/v1/pulls": () => json(response, 200, job),
      "GET /llmasos/v1/pulls/p1/events": () =>
        events(response, [event(job), event({ ...job, state: body === "" ? "done" : "", done: 2 })]),
      "POST /apps/notes/ask": () => json(response, 200, JSON.stringify(`${body.question}?`)),
      "GET /apps/notes/notes/a%20b": () => json(response, 200, '"kept"'),
      "POST /apps/notes/tell": () => events(response, [event("one"), event("two"), "event: done\ndata: {}\n\n"]),
      "POST /apps/notes/fail": () =>
        events(response, [event("one"), event({ status: 500, code: "bug", message: "It broke.", hint: "See the log." }, "error")]),
      "POST /apps/notes/wrong": () =>
        json(response, 422, { status: 422, code: "wrong_input", message: "a is missing.", detail: [{ loc: ["body", "a"] }] }),
    };
    const found = routes[route];
    return found ? found() : json(response, 404, { error: { message: `There is no ${route}.`, code: "not_found" } });
  }

  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    close: () => {
      server.closeAllConnections();
      return new Promise((resolve) => server.close(resolve));
    },
  };
}
