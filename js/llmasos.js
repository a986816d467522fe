// @ts-self-types="./llmasos.d.ts"
/**
 * LLMasOS for JavaScript: one module, no dependency, for Node.js >= 18, Deno and browsers.
 *
 *     import { LLMasOS } from "llmasos";
 *     const client = new LLMasOS({ baseURL: "http://127.0.0.1:8000/v1" });
 *     console.log((await client.chat("Hello!", { model: "smollm2-135m-instruct" })).text);
 *
 * Fields of requests and answers have the names that they have on the wire (`max_tokens`, `finish_reason`); what belongs
 * to this module is in camel case. Types and what each call takes: llmasos.d.ts.
 */

export const DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1";

const RETRIED = new Set([408, 409, 429, 500, 502, 503, 504, 529]);
const NOT_DONE = new Set([408, 409, 429, 503, 529]); // statuses that say that the server has not done the work
const MAX_WAIT = 60_000; // ms; a server that asks for a longer pause gets no retry: the caller should decide
const MAX_TIMER = 2 ** 31 - 1; // ms; timers fire at once beyond it

// ------------------------------------------------------------------------------------------------------------- errors

/** Base of every error that this module makes. */
export class LLMasOSError extends Error {
  constructor(message, options) {
    super(message, options);
    this.name = this.constructor.kind ?? "LLMasOSError";
  }
}

/** The server said no. `status` is 0 for an error inside a stream; `retryAfter` is in seconds. */
export class APIError extends LLMasOSError {
  static kind = "APIError";
  constructor(message, { status = 0, code, param, type, requestId, retryAfter, detail, body } = {}) {
    super(message);
    Object.assign(this, { status, code, param, type, requestId, retryAfter, detail, body });
  }
}
/** 400, 413, 415, 422: a value is refused; `param` names it. */
export class BadRequestError extends APIError {
  static kind = "BadRequestError";
}
/** 401: the server does not know the key. */
export class AuthenticationError extends APIError {
  static kind = "AuthenticationError";
}
/** 403: the key may not do this. */
export class PermissionDeniedError extends APIError {
  static kind = "PermissionDeniedError";
}
/** 404, 410: there is no such model, file, ... */
export class NotFoundError extends APIError {
  static kind = "NotFoundError";
}
/** 429: too much was asked in a while. */
export class RateLimitError extends APIError {
  static kind = "RateLimitError";
}
/** 502, 503, 504, 529: the server is busy or stopping, or its model died (`code` "model_crashed"). */
export class UnavailableError extends APIError {
  static kind = "UnavailableError";
}
/** There was no answer, or it broke off. */
export class ConnectionError extends LLMasOSError {
  static kind = "ConnectionError";
}
/** The server was silent for longer than `timeout`. */
export class TimeoutError extends ConnectionError {
  static kind = "TimeoutError";
}
/** The caller's signal, or `stream.abort()`, ended the request. */
export class AbortError extends LLMasOSError {
  static kind = "AbortError";
}
/** A tool loop could not go on; `messages` is the conversation so far. */
export class ToolLoopError extends LLMasOSError {
  static kind = "ToolLoopError";
  constructor(message, { messages, ...options }) {
    super(message, options);
    this.messages = messages;
  }
}
/** The model still called tools after `maxSteps` answers. */
export class ToolLimitError extends ToolLoopError {
  static kind = "ToolLimitError";
}
/** The `run` of the tool `tool` threw; `cause` is what it threw. */
export class ToolError extends ToolLoopError {
  static kind = "ToolError";
  constructor(message, { tool, ...options }) {
    super(message, options);
    this.tool = tool;
  }
}

/** Codes of errors inside a stream after which the same request may be sent again. */
const UNAVAILABLE = new Set(["model_crashed", "queue_full", "stopping"]);

function errorType(status, code) {
  if (!status) return UNAVAILABLE.has(code) ? UnavailableError : APIError;
  if ([400, 413, 415, 422].includes(status)) return BadRequestError;
  if ([502, 503, 504, 529].includes(status)) return UnavailableError;
  const types = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    410: NotFoundError,
    429: RateLimitError,
  };
  return types[status] ?? APIError;
}

/** The typed error of an error body of any usual shape: OpenAI's, a problem document, Ollama's, plain text. */
function apiError(status, text, headers) {
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    body = undefined; // a proxy's page; its text is the message
  }
  const found = body?.error?.message ? body.error : typeof body?.error === "string" ? { message: body.error } : body;
  const isText = typeof found?.message === "string" || typeof found?.detail === "string";
  const said = isText ? (found.message ?? found.detail) : text.replace(/\s+/g, " ").slice(0, 300);
  const message = [said || "no reason given", found?.hint].filter(Boolean).join(" ");
  return new (errorType(status, found?.code))(status ? `${status}: ${message}` : message, {
    status,
    code: found?.code ?? undefined,
    param: found?.param ?? undefined,
    type: found?.type,
    detail: found?.detail,
    body,
    requestId: headers?.get("x-request-id") ?? undefined,
    retryAfter: retryAfter(headers),
  });
}

/** Seconds that the server asks to wait (RFC 9110, section 10.2.3: seconds or a date), if it says. */
function retryAfter(headers) {
  const value = headers?.get("retry-after")?.trim();
  if (!value) return undefined;
  const seconds = Number(value);
  if (Number.isFinite(seconds)) return Math.max(0, seconds);
  const date = Date.parse(value);
  return Number.isNaN(date) ? undefined : Math.max(0, (date - Date.now()) / 1000);
}

// ------------------------------------------------------------------------------------------------- server-sent events

/**
 * Server-sent events from bytes (WHATWG HTML, section 9.2.6): feed it pieces of any size; each call returns the events
 * that became complete. An event without its closing blank line is dropped at the end, as the standard says.
 */
export class EventParser {
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true }); // bytes that are not UTF-8 become U+FFFD
  #isStart = true;
  #line = "";
  #skipNewline = false; // a piece ended with \r: a \n at the start of the next belongs to it
  #data = [];
  #event = "";
  #id = "";

  feed(bytes) {
    let text = this.#decoder.decode(bytes, { stream: true });
    if (!text) return [];
    if (this.#isStart && text[0] === "\ufeff") text = text.slice(1); // here, as Deno's decoder drops it anywhere
    this.#isStart = false;
    if (this.#skipNewline && text[0] === "\n") text = text.slice(1);
    this.#skipNewline = text.endsWith("\r");
    const lines = text.split(/\r\n|\r|\n/);
    lines[0] = this.#line + lines[0];
    this.#line = lines.pop();
    return lines.map((line) => this.#read(line)).filter(Boolean);
  }

  #read(line) {
    if (!line) return this.#dispatch();
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + (line[colon + 1] === " " ? 2 : 1));
    if (name === "data") this.#data.push(value);
    else if (name === "event") this.#event = value;
    else if (name === "id" && !value.includes("\0")) this.#id = value;
    return undefined;
  }

  #dispatch() {
    const [data, event] = [this.#data, this.#event];
    [this.#data, this.#event] = [[], ""];
    return data.length ? { data: data.join("\n"), event: event || "message", id: this.#id } : undefined;
  }
}

// ----------------------------------------------------------------------------------------------------------- requests

/** Ends one request when a signal says so or when the server is silent for too long, and knows which of them it was. */
class Guard {
  #controller = new AbortController();
  #release = [];
  #timedOut = false;

  constructor(signals, timeout) {
    this.timeout = timeout;
    this.signal = this.#controller.signal;
    for (const signal of signals.filter(Boolean)) {
      const abort = () => this.#controller.abort(signal.reason);
      if (signal.aborted) abort();
      signal.addEventListener("abort", abort);
      this.#release.push(() => signal.removeEventListener("abort", abort));
    }
  }

  /** Wait for the server to do one thing. */
  async wait(work) {
    const expire = () => {
      this.#timedOut = true;
      this.#controller.abort();
    };
    const timer = this.timeout > 0 && this.timeout <= MAX_TIMER ? setTimeout(expire, this.timeout) : undefined;
    try {
      return await work();
    } catch (cause) {
      throw this.error(cause);
    } finally {
      clearTimeout(timer);
    }
  }

  error(cause) {
    const code = cause?.cause?.code;
    const silent = this.#timedOut || code === "UND_ERR_HEADERS_TIMEOUT" || code === "UND_ERR_BODY_TIMEOUT";
    if (silent) return new TimeoutError("The server was silent for too long; see the option `timeout`.", { cause });
    if (this.signal.aborted) return new AbortError("The request was ended by its caller.", { cause });
    if (cause instanceof LLMasOSError) return cause;
    const reason = cause?.cause?.message || cause?.message || String(cause);
    return new ConnectionError(`There was no answer, or it broke off: ${reason}.`, { cause });
  }

  /** End the request, which changes nothing once it is complete, and let go of the signals. */
  close() {
    for (const release of this.#release) release();
    this.#controller.abort();
  }
}

function sleep(ms, signals) {
  return new Promise((resolve, reject) => {
    const given = signals.filter(Boolean);
    const done = (finish, value) => {
      clearTimeout(timer);
      for (const signal of given) signal.removeEventListener("abort", abort);
      finish(value);
    };
    const abort = () => done(reject, new AbortError("The request was ended by its caller."));
    const timer = setTimeout(() => done(resolve), ms);
    for (const signal of given) signal.addEventListener("abort", abort);
    if (given.some((signal) => signal.aborted)) abort();
  });
}

/** Can the server not have begun to work? Browsers don't say why there was no connection. */
function neverSent(error) {
  const code = error.cause?.cause?.code;
  return ["ECONNREFUSED", "ENOTFOUND", "EAI_AGAIN", "UND_ERR_CONNECT_TIMEOUT"].includes(code);
}

/** HTTP to one server, with retries, for routes that have no method. `path` may be a whole URL. */
export class Http {
  constructor({ baseURL = DEFAULT_BASE_URL, apiKey, timeout = 600_000, maxRetries = 2, fetch, headers = {} } = {}) {
    this.baseURL = String(baseURL).replace(/\/+$/, "");
    this.root = this.baseURL.replace(/\/v1$/, "");
    this.timeout = timeout;
    this.maxRetries = maxRetries;
    this.fetch = fetch ?? ((...request) => globalThis.fetch(...request)); // browsers want to be asked as the global's
    const key = apiKey ?? keyFromEnvironment();
    this.headers = { ...(key ? { authorization: `Bearer ${key}` } : {}), ...headers };
  }

  /** An answer of 2xx with the guard that its body is to be read under. */
  async open(method, path, { body, query, headers, signals = [], once = false } = {}) {
    const url = (/^https?:/.test(path) ? path : this.baseURL + path) + queryOf(query);
    const own = url.startsWith(`${this.root}/`); // another server must not see this one's key
    const sent = { ...(own ? this.headers : {}), accept: "application/json", ...headers };
    const isJson = body !== undefined && !(body instanceof FormData || body instanceof Blob);
    if (isJson) sent["content-type"] = "application/json";
    const payload = isJson ? JSON.stringify(body) : body;
    for (let attempt = 0; ; attempt++) {
      const guard = new Guard(signals, this.timeout);
      let error;
      try {
        const options = { method, headers: sent, body: payload, signal: guard.signal };
        const response = await guard.wait(() => this.fetch(url, options));
        if (response.ok) return { response, guard };
        error = apiError(response.status, await guard.wait(() => response.text()), response.headers);
      } catch (e) {
        error = e;
      }
      guard.close();
      const pause = attempt < this.maxRetries && this.#again(error, method, once) ? waitBefore(attempt, error) : undefined;
      if (pause === undefined) throw error;
      await sleep(pause, signals);
    }
  }

  #again(error, method, once) {
    if (error instanceof APIError) return (once ? NOT_DONE : RETRIED).has(error.status);
    if (error instanceof TimeoutError || !(error instanceof ConnectionError)) return false;
    return method === "GET" || neverSent(error);
  }

  async json(method, path, options) {
    const { response, guard } = await this.open(method, path, options);
    try {
      const text = await guard.wait(() => response.text());
      return text ? parsed(text) : undefined;
    } finally {
      guard.close();
    }
  }

  async blob(method, path, options) {
    const { response, guard } = await this.open(method, path, options);
    try {
      return await guard.wait(() => response.blob());
    } finally {
      guard.close();
    }
  }

  /** Server-sent events; leaving the loop ends the request. */
  async *events(method, path, options = {}) {
    const headers = { accept: "text/event-stream", ...options.headers };
    const { response, guard } = await this.open(method, path, { ...options, headers });
    const parser = new EventParser();
    const reader = response.body?.getReader();
    try {
      while (reader) {
        const { done, value } = await guard.wait(() => reader.read());
        if (done) return;
        yield* parser.feed(value);
      }
    } finally {
      guard.close();
      reader?.cancel().catch(() => {}); // it is over, whatever it says
    }
  }
}

/** Milliseconds before retry number `attempt`: as asked, else 0.5 s doubling to 8 s, less up to a quarter. */
function waitBefore(attempt, error) {
  if (error.retryAfter !== undefined) return error.retryAfter * 1000 <= MAX_WAIT ? error.retryAfter * 1000 : undefined;
  return Math.min(8000, 500 * 2 ** attempt) * (0.75 + Math.random() / 4);
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new APIError(`The answer is not JSON: ${text.slice(0, 80)} (does baseURL end in /v1?)`, {});
  }
}

function queryOf(query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== undefined && value !== null);
  const pairs = given.flatMap(([name, value]) => [value].flat().map((one) => [name, String(one)]));
  return pairs.length ? `?${new URLSearchParams(pairs)}` : "";
}

function keyFromEnvironment() {
  try {
    return globalThis.process?.env?.LLMASOS_API_KEY;
  } catch {
    return undefined; // Deno without the permission to read it
  }
}

const id = encodeURIComponent;

// ------------------------------------------------------------------------------------------------------------ streams

/** `text` as a property that JSON and `Object.keys` don't see. */
function withText(object, text) {
  return Object.defineProperty(object, "text", { get: () => text(object) ?? "", configurable: true });
}

const first = ({ choices }) => choices.find(({ index }) => !index); // a chunk may be of another one
const chatText = (answer) => first(answer)?.message?.content;
const deltaText = (chunk) => first(chunk)?.delta?.content;
const completionText = (answer) => first(answer)?.text;
const responseText = (answer) =>
  (answer.output ?? [])
    .flatMap((item) => (item.type === "message" ? item.content : []))
    .map((part) => part.text ?? "")
    .join("");

/**
 * The pieces of an answer, as an async iterator; the request begins with the first `next()`. `break` or `abort()` ends
 * it. `for await (const piece of stream.text)` gives the text alone; `await stream.final()` the whole answer.
 */
export class Stream {
  #controller = new AbortController();
  #pieces;
  #joiner;
  #state = "new"; // then "running", "complete" or "ended"

  constructor(open, joiner) {
    this.#pieces = () => open(this.#controller.signal);
    this.#joiner = joiner;
  }

  async *[Symbol.asyncIterator]() {
    if (this.#state !== "new") throw new LLMasOSError("A stream can be read once.");
    this.#state = "running";
    try {
      for await (const piece of this.#pieces()) {
        this.#joiner.add(piece);
        yield piece;
      }
      this.#state = "complete";
    } finally {
      if (this.#state !== "complete") this.#state = "ended";
    }
  }

  get text() {
    const pieces = this;
    return (async function* () {
      for await (const piece of pieces) if (piece.text) yield piece.text;
    })();
  }

  /** The whole answer; reads what was not read yet. */
  async final() {
    if (this.#state === "new") for await (const _ of this);
    if (this.#state !== "complete") throw new LLMasOSError("The stream was not read to its end.");
    return this.#joiner.whole();
  }

  abort() {
    this.#controller.abort();
  }
}

/** Chunks of a chat put together to the answer that would have come without a stream. */
class ChatJoiner {
  #head = {};
  #choices = [];

  add({ choices, ...head }) {
    this.#head = { ...this.#head, ...Object.fromEntries(Object.entries(head).filter(([, value]) => value !== null)) };
    for (const { index, delta, ...rest } of choices) {
      this.#choices[index] ??= { index, message: { role: "assistant", content: null }, finish_reason: null, logprobs: null };
      const choice = this.#choices[index];
      if (rest.finish_reason) choice.finish_reason = rest.finish_reason;
      for (const [name, value] of Object.entries(rest.logprobs ?? {})) {
        choice.logprobs ??= {};
        if (value) choice.logprobs[name] = [...(choice.logprobs[name] ?? []), ...value];
      }
      this.#addDelta(choice.message, delta);
    }
  }

  #addDelta(message, { tool_calls, role, ...texts }) {
    for (const [name, value] of Object.entries(texts)) {
      if (typeof value === "string") message[name] = (message[name] ?? "") + value;
    }
    for (const { index, id, function: call } of tool_calls ?? []) {
      message.tool_calls ??= [];
      const whole = (message.tool_calls[index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
      if (id) whole.id = id;
      if (call?.name) whole.function.name = call.name;
      whole.function.arguments += call?.arguments ?? "";
    }
  }

  whole() {
    return withText({ ...this.#head, object: "chat.completion", choices: this.#choices.filter(Boolean) }, chatText);
  }
}

class CompletionJoiner {
  #head = {};
  #choices = [];

  add({ choices, ...head }) {
    this.#head = { ...this.#head, ...Object.fromEntries(Object.entries(head).filter(([, value]) => value !== null)) };
    for (const { index, text, finish_reason } of choices) {
      const choice = (this.#choices[index] ??= { index, text: "", finish_reason: null });
      choice.text += text ?? "";
      choice.finish_reason = finish_reason ?? choice.finish_reason;
    }
  }

  whole() {
    return withText({ ...this.#head, choices: this.#choices.filter(Boolean) }, completionText);
  }
}

/** The last event of a stream carries the whole: `pick` takes it out. */
class LastJoiner {
  #whole;
  constructor(pick) {
    this.pick = pick;
  }
  add(event) {
    this.#whole = this.pick(event) ?? this.#whole;
  }
  whole() {
    return this.#whole;
  }
}

/** JSON of an event; an error that was sent inside the stream is thrown. */
function eventBody(event) {
  const body = parsed(event.data);
  if (event.event === "error" || body?.type === "error" || body?.error) throw apiError(0, event.data);
  return body;
}

const brokenOff = () => new ConnectionError("The stream ended before the answer was complete.");

// ------------------------------------------------------------------------------------------------------------- client

/** What a call takes beside the fields of its body. */
function split({ signal, stream, ...fields } = {}) {
  if (stream) throw new TypeError("`stream: true` is said by calling the method for streams, e.g. streamChat().");
  return { signals: [signal], body: fields };
}

function numChoices({ n, prompt }) {
  const isOne = !Array.isArray(prompt) || typeof prompt[0] === "number";
  return (n ?? 1) * (isOne ? 1 : prompt.length);
}

const turns = (messages) => (typeof messages === "string" ? [{ role: "user", content: messages }] : messages);

/** A client of one LLMasOS server, or of any server that speaks OpenAI's protocol. */
export class LLMasOS {
  #http;

  constructor(options) {
    this.#http = new Http(options);
    this.baseURL = this.#http.baseURL;
    this.responses = new Responses(this.#http);
    this.conversations = new Conversations(this.#http);
    this.files = new Files(this.#http);
    this.batches = new Batches(this.#http);
    this.fineTuning = new FineTuning(this.#http);
    this.native = new Native(this.#http);
    this.agents = new Agents(this.#http);
    this.access = new AccessControl(this.#http);
    this.apps = new Apps(this.#http);
    this.jobs = new Jobs(this.#http);
    this.tasks = new Tasks(this.#http);
    this.knowledge = new Knowledge(this.#http);
    this.packages = new Packages(this.#http);
  }

  #post(path, fields, options) {
    const { signals, body } = split(options);
    return this.#http.json("POST", path, { body: { ...fields, ...body }, signals });
  }

  async chat(messages, options) {
    return withText(await this.#post("/chat/completions", { messages: turns(messages) }, options), chatText);
  }

  streamChat(messages, options) {
    const fields = { messages: turns(messages) };
    return this.#stream("/chat/completions", fields, options, deltaText, new ChatJoiner());
  }

  /** Continue a text (or token ids, or several). */
  async complete(prompt, options) {
    return withText(await this.#post("/completions", { prompt }, options), completionText);
  }

  streamComplete(prompt, options) {
    return this.#stream("/completions", { prompt }, options, completionText, new CompletionJoiner());
  }

  #stream(path, fields, options, text, joiner) {
    const { signals, body } = split(options);
    const http = this.#http;
    return new Stream(async function* (ended) {
      const request = { body: { ...fields, ...body, stream: true }, signals: [...signals, ended] };
      const open = new Set(Array(numChoices(request.body)).keys()); // not every server says [DONE]
      let complete = false;
      for await (const event of http.events("POST", path, request)) {
        if (event.data.trim() === "[DONE]") {
          complete = true;
          continue;
        }
        const chunk = withText(eventBody(event), text);
        for (const { index, finish_reason } of chunk.choices) if (finish_reason) open.delete(index);
        yield chunk;
      }
      if (!complete && open.size) throw brokenOff();
    }, joiner);
  }

  embed(input, options) {
    return this.#post("/embeddings", { input }, options);
  }

  /** The models that the server has. */
  async models({ signal } = {}) {
    return (await this.#http.json("GET", "/models", { signals: [signal] })).data;
  }

  model(name, { signal } = {}) {
    return this.#http.json("GET", `/models/${id(name)}`, { signals: [signal] });
  }

  rerank(query, documents, options) {
    return this.#post("/rerank", { query, documents }, options);
  }

  score(text_1, text_2, options) {
    return this.#post("/score", { text_1, text_2 }, options);
  }

  /** Token ids of a text, or of messages as the model's template writes them. */
  tokenize(input, options) {
    const fields = typeof input === "string" ? { prompt: input } : { messages: input };
    return this.#post(`${this.#http.root}/tokenize`, fields, options);
  }

  async detokenize(tokens, options) {
    return (await this.#post(`${this.#http.root}/detokenize`, { tokens }, options)).prompt;
  }

  async countTokens(input, options) {
    return (await this.tokenize(input, options)).count;
  }

  /**
   * Let the model call tools until it answers: {text, completion, messages, steps}. Calls of one answer run at once.
   * What `run` returns goes back as text, or as JSON where it is none. Throws ToolLimitError after `maxSteps` answers,
   * ToolError when a tool throws. Arguments that are no JSON object and names of no tool are told to the model.
   */
  async runTools({ messages, tools, maxSteps = 10, onChunk, signal, ...fields }) {
    const named = new Map(tools.map((tool) => [tool.name, tool]));
    if (named.size < tools.length) throw new TypeError("Two tools have the same name.");
    const described = tools.map(({ name, description, parameters, strict }) => ({
      type: "function",
      function: { name, description, parameters: parameters ?? { type: "object", properties: {} }, strict },
    }));
    const conversation = [...turns(messages)];
    const options = { ...fields, tools: described, signal };
    for (let steps = 1; steps <= maxSteps; steps++) {
      const completion = await this.#answer(conversation, options, onChunk);
      const message = completion.choices[0].message;
      conversation.push(message);
      const calls = message.tool_calls ?? [];
      if (!calls.length) return { text: message.content ?? "", completion, messages: conversation, steps };
      conversation.push(...(await Promise.all(calls.map((call) => runTool(call, named, conversation, signal)))));
    }
    const message = `The model still called tools after ${maxSteps} answers; see maxSteps.`;
    throw new ToolLimitError(message, { messages: conversation });
  }

  async #answer(messages, options, onChunk) {
    if (!onChunk) return this.chat(messages, options);
    const stream = this.streamChat(messages, options);
    for await (const chunk of stream) onChunk(chunk);
    return stream.final();
  }
}

async function runTool(call, named, messages, signal) {
  const { name, arguments: text } = call.function;
  const reply = (content) => ({ role: "tool", tool_call_id: call.id, content });
  const tool = named.get(name);
  if (!tool) return reply(`Error: there is no tool ${JSON.stringify(name)}; there are: ${[...named.keys()].join(", ")}.`);
  let given;
  try {
    given = JSON.parse(text || "{}");
  } catch (e) {
    return reply(`Error: the arguments are not JSON: ${e.message}`);
  }
  if (given === null || typeof given !== "object" || Array.isArray(given)) {
    return reply("Error: the arguments are not a JSON object.");
  }
  try {
    const result = await tool.run(given, { signal, call });
    return reply(typeof result === "string" ? result : (JSON.stringify(result) ?? "null"));
  } catch (cause) {
    const reason = cause?.message ?? String(cause);
    throw new ToolError(`The tool ${JSON.stringify(name)} failed: ${reason}`, { tool: name, messages, cause });
  }
}

class Namespace {
  constructor(http) {
    Object.defineProperty(this, "http", { value: http });
  }
}

const ENDED_RESPONSES = new Set(["response.completed", "response.incomplete", "response.failed"]);

/** OpenAI's Responses: answers that the server keeps, so that the next one can go on from them. */
class Responses extends Namespace {
  async create(options) {
    const { signals, body } = split(options);
    return withText(await this.http.json("POST", "/responses", { body, signals, once: true }), responseText);
  }

  /** Events of the protocol (`type` says which); `text` of each is what it adds to the answer's text. */
  stream(options) {
    const { signals, body } = split(options);
    return this.#stream("POST", "/responses", { body: { ...body, stream: true }, signals, once: true });
  }

  /** The events of one begun with stream({background: true}): those after number `starting_after`, then those to come. */
  follow(name, { signal, ...query } = {}) {
    return this.#stream("GET", `/responses/${id(name)}`, { query: { ...query, stream: true }, signals: [signal] });
  }

  #stream(method, path, options) {
    const http = this.http;
    const text = (event) => (event.type === "response.output_text.delta" ? event.delta : "");
    const pick = (event) => (ENDED_RESPONSES.has(event.type) ? withText(event.response, responseText) : undefined);
    return new Stream(async function* (ended) {
      let complete = false;
      for await (const event of http.events(method, path, { ...options, signals: [...options.signals, ended] })) {
        if (event.data.trim() === "[DONE]") continue;
        const found = withText(eventBody(event), text);
        complete ||= ENDED_RESPONSES.has(found.type);
        yield found;
      }
      if (!complete) throw brokenOff();
    }, new LastJoiner(pick));
  }

  async retrieve(name, { signal } = {}) {
    return withText(await this.http.json("GET", `/responses/${id(name)}`, { signals: [signal] }), responseText);
  }

  delete(name, { signal } = {}) {
    return this.http.json("DELETE", `/responses/${id(name)}`, { signals: [signal] });
  }

  inputItems(name, { signal, ...query } = {}) {
    return this.http.json("GET", `/responses/${id(name)}/input_items`, { query, signals: [signal] });
  }

  async countTokens(options) {
    const { signals, body } = split(options);
    return (await this.http.json("POST", "/responses/input_tokens", { body, signals })).input_tokens;
  }

  /** A background response once it is over, however it ended; asked for every `interval` ms. */
  async wait(name, { interval = 1000, signal } = {}) {
    for (;;) {
      const response = await this.retrieve(name, { signal });
      if (response.status !== "queued" && response.status !== "in_progress") return response;
      await sleep(interval, [signal]);
    }
  }

  async cancel(name, { signal } = {}) {
    return withText(await this.http.json("POST", `/responses/${id(name)}/cancel`, { signals: [signal] }), responseText);
  }
}

/** What responses can go on from and add to (`conversation: id`). */
class Conversations extends Namespace {
  #ask(method, path, { signal, ...more } = {}) {
    return this.http.json(method, `/conversations${path}`, { ...more, signals: [signal] });
  }

  create({ signal, ...body } = {}) {
    return this.#ask("POST", "", { body, signal, once: true });
  }

  retrieve(name, options) {
    return this.#ask("GET", `/${id(name)}`, options);
  }

  update(name, { signal, ...body }) {
    return this.#ask("POST", `/${id(name)}`, { body, signal });
  }

  delete(name, options) {
    return this.#ask("DELETE", `/${id(name)}`, options);
  }

  addItems(name, items, { signal } = {}) {
    return this.#ask("POST", `/${id(name)}/items`, { body: { items }, signal, once: true });
  }

  /** One page, the newest first. */
  items(name, { signal, ...query } = {}) {
    return this.#ask("GET", `/${id(name)}/items`, { query, signal });
  }

  item(name, item, options) {
    return this.#ask("GET", `/${id(name)}/items/${id(item)}`, options);
  }

  deleteItem(name, item, options) {
    return this.#ask("DELETE", `/${id(name)}/items/${id(item)}`, options);
  }
}

class Files extends Namespace {
  /** `content`: a Blob or File, bytes, or text. */
  upload(content, { filename, purpose = "batch", signal } = {}) {
    const body = new FormData();
    const blob = content instanceof Blob ? content : new Blob([content]);
    body.append("purpose", purpose);
    body.append("file", blob, filename ?? blob.name ?? "file.jsonl");
    return this.http.json("POST", "/files", { body, signals: [signal], once: true });
  }

  list({ signal, ...query } = {}) {
    return this.http.json("GET", "/files", { query, signals: [signal] });
  }

  retrieve(name, { signal } = {}) {
    return this.http.json("GET", `/files/${id(name)}`, { signals: [signal] });
  }

  /** The bytes, as a Blob: `await (await client.files.content(id)).text()`. */
  content(name, { signal } = {}) {
    return this.http.blob("GET", `/files/${id(name)}/content`, { signals: [signal], headers: { accept: "*/*" } });
  }

  delete(name, { signal } = {}) {
    return this.http.json("DELETE", `/files/${id(name)}`, { signals: [signal] });
  }
}

const ENDED_BATCHES = new Set(["completed", "failed", "expired", "cancelled"]);

class Batches extends Namespace {
  create({ completion_window = "24h", ...options }) {
    const { signals, body } = split(options);
    return this.http.json("POST", "/batches", { body: { completion_window, ...body }, signals, once: true });
  }

  retrieve(name, { signal } = {}) {
    return this.http.json("GET", `/batches/${id(name)}`, { signals: [signal] });
  }

  list({ signal, ...query } = {}) {
    return this.http.json("GET", "/batches", { query, signals: [signal] });
  }

  cancel(name, { signal } = {}) {
    return this.http.json("POST", `/batches/${id(name)}/cancel`, { signals: [signal] });
  }

  /** The batch once it is over, however it ended; asked for every `interval` ms. */
  async wait(name, { interval = 2000, signal } = {}) {
    for (;;) {
      const batch = await this.retrieve(name, { signal });
      if (ENDED_BATCHES.has(batch.status)) return batch;
      await sleep(interval, [signal]);
    }
  }
}

const ENDED_TRAINING = new Set(["paused", "succeeded", "failed", "cancelled"]);
const TRAINING = "/fine_tuning/jobs";

/** Models trained on uploaded files (purpose "fine-tune"). */
class FineTuning extends Namespace {
  /** `hyperparameters` and `options` (of a run, LLMasOS's own) beside OpenAI's fields. */
  create({ hyperparameters, options: llmasos, ...options }) {
    const { signals, body } = split(options);
    const method = hyperparameters && { type: "supervised", supervised: { hyperparameters } };
    return this.http.json("POST", TRAINING, { body: { method, llmasos, ...body }, signals, once: true });
  }

  retrieve(name, { signal } = {}) {
    return this.http.json("GET", `${TRAINING}/${id(name)}`, { signals: [signal] });
  }

  list({ signal, ...query } = {}) {
    return this.http.json("GET", TRAINING, { query, signals: [signal] });
  }

  /** End it for good; checkpoints stay. */
  cancel(name, options) {
    return this.#act(name, "cancel", options);
  }

  /** Save it, and stop until it is resumed. */
  pause(name, options) {
    return this.#act(name, "pause", options);
  }

  /** Go on with a paused or failed one. */
  resume(name, options) {
    return this.#act(name, "resume", options);
  }

  events(name, { signal, ...query } = {}) {
    return this.http.json("GET", `${TRAINING}/${id(name)}/events`, { query, signals: [signal] });
  }

  /** Every event, the oldest first, as they come, until nothing more happens to the job by itself. */
  async *follow(name, { signal } = {}) {
    const path = `${TRAINING}/${id(name)}/events?stream=true`;
    for await (const event of this.http.events("GET", path, { signals: [signal] })) yield eventBody(event);
  }

  checkpoints(name, { signal, ...query } = {}) {
    return this.http.json("GET", `${TRAINING}/${id(name)}/checkpoints`, { query, signals: [signal] });
  }

  /** The job once it is over or paused, however it ended; asked for every `interval` ms. */
  async wait(name, { interval = 2000, signal } = {}) {
    for (;;) {
      const job = await this.retrieve(name, { signal });
      if (ENDED_TRAINING.has(job.status)) return job;
      await sleep(interval, [signal]);
    }
  }

  #act(name, action, { signal } = {}) {
    return this.http.json("POST", `${TRAINING}/${id(name)}/${action}`, { signals: [signal] });
  }
}

/** LLMasOS's own API: what the server does with its models, and pulls, requests, logs. */
class Native extends Namespace {
  #ask(method, path, { signal, ...more } = {}) {
    return this.http.json(method, this.#url(path), { ...more, signals: [signal] });
  }

  #url(path) {
    return `${this.http.root}/llmasos/v1/${path}`;
  }

  async #list(path, options) {
    return (await this.#ask("GET", path, options)).data;
  }

  /** The models on the server's disk. */
  models(options) {
    return this.#list("models", options);
  }

  model(name, options) {
    return this.#ask("GET", `models/${id(name)}`, options);
  }

  /** Delete a model from the server's disk. */
  remove(name, options) {
    return this.#ask("DELETE", `models/${id(name)}`, options);
  }

  /** Models that can be pulled by name, with every word of `query` in their facts. */
  catalog({ query, signal } = {}) {
    return this.#list("catalog", { query: { query }, signal });
  }

  /** The models that are loaded, loading or failed, and those that were unloaded, with why. */
  status(options) {
    return this.#list("status", options);
  }

  /** Answers when the model is ready. */
  load(model, { signal, ...fields } = {}) {
    return this.#ask("POST", "load", { body: { model, ...fields }, signal });
  }

  unload(model, { signal, ...fields } = {}) {
    return this.#ask("POST", "unload", { body: { model, ...fields }, signal });
  }

  /** A pinned model is never unloaded to make room, nor by time. */
  pin(model, pinned = true, { signal } = {}) {
    return this.#ask("POST", "pin", { body: { model, pinned }, signal });
  }

  /** What the model would cost on the server, before a byte is fetched. */
  plan(model, { signal, ...fields } = {}) {
    return this.#ask("POST", "plan", { body: { model, ...fields }, signal });
  }

  /** Begin a pull and return its job at once. */
  startPull(model, { signal, ...fields } = {}) {
    return this.#ask("POST", "pulls", { body: { model, ...fields }, signal, once: true });
  }

  /** Begin a pull: its job, each time that it moves. Leaving the iterator leaves the pull running. */
  async *pull(model, options = {}) {
    const { id: name } = await this.startPull(model, options);
    yield* this.followPull(name, options);
  }

  /** A job until it is done, paused or cancelled; throws APIError if it fails. */
  async *followPull(name, { signal } = {}) {
    let job;
    for await (const event of this.http.events("GET", this.#url(`pulls/${id(name)}/events`), { signals: [signal] })) {
      yield (job = eventBody(event));
    }
    if (job?.state === "failed") throw new APIError(`${job.model} could not be pulled: ${job.error}`, { code: job.error_code });
    if (!job || job.state === "waiting" || job.state === "running") throw brokenOff();
  }

  pulls(options) {
    return this.#list("pulls", options);
  }

  pausePull(name, options) {
    return this.#ask("POST", `pulls/${id(name)}/pause`, options);
  }

  resumePull(name, options) {
    return this.#ask("POST", `pulls/${id(name)}/resume`, options);
  }

  /** Give a pull up; the bytes that are there are deleted. */
  cancelPull(name, options) {
    return this.#ask("POST", `pulls/${id(name)}/cancel`, options);
  }

  /** The requests that the server works on. */
  requests(options) {
    return this.#list("requests", options);
  }

  cancelRequest(name, options) {
    return this.#ask("POST", `requests/${id(name)}/cancel`, options);
  }

  /** The latest lines of the log, oldest first; with `follow` also those to come. */
  async *logs({ signal, ...query } = {}) {
    if (!query.follow) return yield* await this.#list("logs", { query, signal });
    for await (const event of this.http.events("GET", this.#url("logs"), { query, signals: [signal] })) {
      yield eventBody(event);
    }
  }

  system(options) {
    return this.#ask("GET", "system", options);
  }

  /** Installed applications that the key may use. */
  apps(options) {
    return this.#list("apps", options);
  }

  app(name, options) {
    return this.#ask("GET", `apps/${id(name)}`, options);
  }

  /** `accept`: that of the permission sheet, or true; without it an APIError of status 409 has the sheet in its body. */
  installApp(reference, { signal, ...fields } = {}) {
    return this.#ask("POST", "apps", { body: { reference, ...fields }, signal, once: true });
  }

  /** `action`: start, stop, restart, update or rollback. */
  changeApp(name, action, { signal, ...fields } = {}) {
    return this.#ask("POST", `apps/${id(name)}/${id(action)}`, { body: fields, signal, once: true });
  }

  /** Set its values; null takes one away. */
  configureApp(name, config, { signal } = {}) {
    return this.#ask("PATCH", `apps/${id(name)}`, { body: { config }, signal });
  }

  /** `data`: its own folder and its values, too. */
  uninstallApp(name, { data, signal } = {}) {
    return this.#ask("DELETE", `apps/${id(name)}`, { query: { data }, signal });
  }

  /** What it has printed, and what the server did with it: the latest lines, as text. */
  async appLog(name, { limit, signal } = {}) {
    const path = `/llmasos/v1/apps/${id(name)}/logs`;
    const blob = await this.http.blob("GET", `${this.http.root}${path}`, { query: { limit }, signals: [signal], headers: { accept: "*/*" } });
    return blob.text();
  }

  /** The latest lines, then those to come. */
  async *followAppLog(name, { limit, signal } = {}) {
    const query = { follow: true, limit };
    for await (const event of this.http.events("GET", this.#url(`apps/${id(name)}/logs`), { query, signals: [signal] })) {
      yield eventBody(event);
    }
  }
}

/** Agents on the server: runs, what they wait for, their traces. */
class Agents extends Namespace {
  #ask(method, path, { signal, ...more } = {}) {
    return this.http.json(method, `${this.http.root}/llmasos/v1/${path}`, { ...more, signals: [signal] });
  }

  async *#events(path, body, signal) {
    const url = `${this.http.root}/llmasos/v1/${path}`;
    for await (const event of this.http.events("POST", url, { body: { ...body, stream: true }, signals: [signal] })) {
      yield eventBody(event);
    }
  }

  /** The run, ended or waiting (`requires_action`). */
  run(input, { signal, ...fields }) {
    return this.#ask("POST", "agents/runs", { body: { input, ...fields }, signal, once: true });
  }

  /** What happens, as it happens; the last event has the run. Leaving the iterator ends the run. */
  stream(input, { signal, ...fields }) {
    return this.#events("agents/runs", { input, ...fields }, signal);
  }

  /** Go on with a run that waits: `decisions` by the id of the call. */
  goOn(name, decisions, { signal } = {}) {
    return this.#ask("POST", `agents/runs/${id(name)}/continue`, { body: { decisions }, signal, once: true });
  }

  streamOn(name, decisions, { signal } = {}) {
    return this.#events(`agents/runs/${id(name)}/continue`, { decisions }, signal);
  }

  /** Your runs, the newest first. */
  async runs({ signal, ...query } = {}) {
    return (await this.#ask("GET", "agents/runs", { query, signal })).data;
  }

  get(name, options) {
    return this.#ask("GET", `agents/runs/${id(name)}`, options);
  }

  cancel(name, options) {
    return this.#ask("POST", `agents/runs/${id(name)}/cancel`, options);
  }

  delete(name, options) {
    return this.#ask("DELETE", `agents/runs/${id(name)}`, options);
  }

  /** Tools of the server, to be named by their `source`. */
  async tools(options) {
    return (await this.#ask("GET", "agents/tools", options)).data;
  }

  /** Stored conversations, the last changed first, or those that `query` finds. */
  async conversations({ signal, ...query } = {}) {
    return (await this.#ask("GET", "conversations", { query, signal })).data;
  }
}

/** Who may use the server: keys, usage, the audit log. */
class AccessControl extends Namespace {
  #ask(method, path, more) {
    return this.http.json(method, `${this.http.root}/llmasos/v1/${path}`, more);
  }

  /** A new key; its text is in this answer (`key`) and never told again. */
  createKey(name, { signal, ...fields } = {}) {
    return this.#ask("POST", "keys", { body: { name, ...fields }, signals: [signal], once: true });
  }

  async keys({ signal } = {}) {
    return (await this.#ask("GET", "keys", { signals: [signal] })).data;
  }

  key(name, { signal } = {}) {
    return this.#ask("GET", `keys/${id(name)}`, { signals: [signal] });
  }

  /** What is left out stays; null takes a limit away. */
  updateKey(name, { signal, ...fields } = {}) {
    return this.#ask("PATCH", `keys/${id(name)}`, { body: fields, signals: [signal] });
  }

  revokeKey(name, { signal } = {}) {
    return this.#ask("DELETE", `keys/${id(name)}`, { signals: [signal] });
  }

  /** Per day, key and model; `since` and `until` are days, YYYY-MM-DD. */
  async usage({ signal, ...query } = {}) {
    return (await this.#ask("GET", "usage", { query, signals: [signal] })).data;
  }

  /** One page, the newest first. */
  audit({ signal, ...query } = {}) {
    return this.#ask("GET", "audit", { query, signals: [signal] });
  }
}

const ownUrl = ({ http }, path) => `${http.root}/llmasos/v1/${path}`;
const ownApi = ({ http }, method, path, { signal, ...more } = {}) =>
  http.json(method, ownUrl({ http }, path), { ...more, signals: [signal] });
const asBlob = (content) => (content instanceof Blob ? content : new Blob([content]));
const idPath = (path) => path.split("/").map(id).join("/");

/** Work of the server that goes on without its request: pulls, batches of tasks, pipelines, training, checks of packages. */
class Jobs extends Namespace {
  /** The caller's, with the scope `manage` everybody's; the latest first. */
  async list({ kind, signal } = {}) {
    return (await ownApi(this, "GET", "jobs", { query: { kind }, signal })).data;
  }

  get(name, options) {
    return ownApi(this, "GET", `jobs/${id(name)}`, options);
  }

  /** The job at each change until it is done, paused or cancelled; throws APIError if it fails. */
  async *follow(name, { signal } = {}) {
    let job;
    for await (const event of this.http.events("GET", ownUrl(this, `jobs/${id(name)}/events`), { signals: [signal] })) {
      yield (job = eventBody(event));
    }
    if (job?.state === "failed") {
      throw new APIError(`The job ${job.id} (${job.name}) failed: ${job.error?.message}`, { code: job.error?.code });
    }
    if (!job || job.state === "queued" || job.state === "running") throw brokenOff();
  }

  /** The job when nothing more happens to it by itself; throws APIError if it fails. */
  async wait(name, options) {
    let last;
    for await (const job of this.follow(name, options)) last = job;
    return last;
  }

  pause(name, options) {
    return ownApi(this, "POST", `jobs/${id(name)}/pause`, options);
  }

  resume(name, options) {
    return ownApi(this, "POST", `jobs/${id(name)}/resume`, options);
  }

  /** End it for good; what there is of its result stays. */
  cancel(name, options) {
    return ownApi(this, "POST", `jobs/${id(name)}/cancel`, options);
  }
}

/** Summarise, translate, classify ..., also over many inputs. */
class Tasks extends Namespace {
  /** With the JSON Schemas of inputs and outputs. */
  async list(options) {
    return (await ownApi(this, "GET", "tasks", options)).data;
  }

  /** The task's output. */
  run(task, { signal, ...inputs } = {}) {
    return ownApi(this, "POST", `tasks/${id(task)}`, { body: inputs, signal });
  }

  /** The task for each of `lines`, or of an uploaded file, as a job. */
  batch(task, { signal, ...fields } = {}) {
    return ownApi(this, "POST", "tasks/batch", { body: { task, ...fields }, signal, once: true });
  }

  /** The steps of a pipeline, as a job. */
  pipeline(pipeline, inputs = {}, { signal, ...fields } = {}) {
    return ownApi(this, "POST", "tasks/pipeline", { body: { pipeline, inputs, ...fields }, signal, once: true });
  }
}

/** Knowledge bases: documents in, passages and answers out. */
class Knowledge extends Namespace {
  async list(options) {
    return (await ownApi(this, "GET", "knowledge", options)).data;
  }

  create(name, { signal, ...fields } = {}) {
    return ownApi(this, "POST", "knowledge", { body: { name, ...fields }, signal });
  }

  get(name, options) {
    return ownApi(this, "GET", `knowledge/${id(name)}`, options);
  }

  /** With all documents. */
  delete(name, options) {
    return ownApi(this, "DELETE", `knowledge/${id(name)}`, options);
  }

  async documents(name, options) {
    return (await ownApi(this, "GET", `knowledge/${id(name)}/documents`, options)).data;
  }

  /** Add or replace the document `path`. `content`: a Blob or File, bytes, or text. */
  add(name, path, content, { signal } = {}) {
    return ownApi(this, "PUT", `knowledge/${id(name)}/documents/${idPath(path)}`, { body: asBlob(content), signal });
  }

  remove(name, path, options) {
    return ownApi(this, "DELETE", `knowledge/${id(name)}/documents/${idPath(path)}`, options);
  }

  /** The best passages first. */
  async search(name, query, { signal, ...fields } = {}) {
    return (await ownApi(this, "POST", `knowledge/${id(name)}/search`, { body: { query, ...fields }, signal })).data;
  }

  /** The answer and the passages that it rests on. */
  ask(name, question, { signal, ...fields } = {}) {
    return ownApi(this, "POST", `knowledge/${id(name)}/ask`, { body: { question, ...fields }, signal });
  }

  /** The same in pieces: the passages, the text as it comes, the whole. */
  async *streamAsk(name, question, { signal, ...fields } = {}) {
    const body = { question, ...fields, stream: true };
    let last;
    for await (const event of this.http.events("POST", ownUrl(this, `knowledge/${id(name)}/ask`), { body, signals: [signal] })) {
      yield (last = eventBody(event));
    }
    if (last?.type !== "done") throw brokenOff();
  }
}

/** The server's index of packages. */
class Packages extends Namespace {
  /** All that it has. */
  index(options) {
    return ownApi(this, "GET", "index/index.json", options);
  }

  /** Have a package checked and, if it passes, published as OWNER/NAME: a job, whose result is the report. */
  publish(content, { owner, signal }) {
    return ownApi(this, "POST", `index/packages/${id(owner)}`, { body: asBlob(content), signal, once: true });
  }

  /** What the checks said of OWNER/NAME. */
  report(name, version, options) {
    return ownApi(this, "GET", `index/reports/${idPath(name)}/${id(version)}`, options);
  }

  /** Take a version of OWNER/NAME out of every choice but the exact one. */
  yank(name, version, reason, { signal } = {}) {
    return ownApi(this, "POST", "index/yank", { body: { name, version, reason }, signal });
  }
}

/** A Blob or bytes as a data: URL, in which form applications take files; anything else as it is. */
async function fileText(value) {
  const blob = ArrayBuffer.isView(value) || value instanceof ArrayBuffer ? new Blob([value]) : value;
  if (!(blob instanceof Blob)) return value;
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let binary = "";
  for (let i = 0; i < bytes.length; i += 0x8000) binary += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  const name = blob.name ? `;name=${id(blob.name)}` : "";
  return `data:${blob.type}${name};base64,${btoa(binary)}`;
}

/** Routes of applications. `app`: the URL that `app.run()` printed, or the name of one under /apps of the server. */
class Apps extends Namespace {
  /** The route's result; a stream's elements come as one array. */
  async run(app, route, args = {}, { method = "POST", signal } = {}) {
    return this.http.json(method, ...(await this.#call(app, route, args, method, [signal])));
  }

  /** The elements of a route that streams, as an async iterator. */
  async *stream(app, route, args = {}, { method = "POST", signal, onProgress } = {}) {
    let complete = false;
    for await (const event of this.http.events(method, ...(await this.#call(app, route, args, method, [signal])))) {
      if (event.event === "done") complete = true;
      else if (event.event === "progress") onProgress?.(parsed(event.data));
      else yield eventBody(event);
    }
    if (!complete) throw brokenOff();
  }

  /** Begin a call that goes on by itself: its job. */
  async start(app, route, args = {}, { method = "POST", signal } = {}) {
    const [url, options] = await this.#call(app, route, args, method, [signal]);
    return this.http.json(method, url, { ...options, headers: { prefer: "respond-async" } });
  }

  /** The application's jobs, the latest first. */
  jobs(app, { signal } = {}) {
    return this.http.json("GET", `${this.#base(app)}/jobs`, { signals: [signal] });
  }

  job(app, name, { signal } = {}) {
    return this.http.json("GET", `${this.#base(app)}/jobs/${id(name)}`, { signals: [signal] });
  }

  cancel(app, name, { signal } = {}) {
    return this.http.json("DELETE", `${this.#base(app)}/jobs/${id(name)}`, { signals: [signal] });
  }

  /** A job at each change, until it is over; throws APIError if it fails. */
  async *follow(app, name, { signal } = {}) {
    let job;
    for await (const event of this.http.events("GET", `${this.#base(app)}/jobs/${id(name)}/events`, { signals: [signal] })) {
      if (event.event !== "done") yield (job = parsed(event.data));
    }
    if (job?.state === "failed") throw apiError(job.error.status, JSON.stringify(job.error));
    if (!job || job.state === "running") throw brokenOff();
  }

  /** The job when it is over; throws APIError if it fails. */
  async wait(app, name, options) {
    let last;
    for await (const job of this.follow(app, name, options)) last = job;
    return last;
  }

  #base(app) {
    return /^https?:/.test(app) ? app.replace(/\/+$/, "") : `${this.http.root}/apps/${id(app)}`;
  }

  async #call(app, route, args, method, signals) {
    const base = this.#base(app);
    const rest = {};
    for (const [name, value] of Object.entries(args)) {
      rest[name] = Array.isArray(value) ? await Promise.all(value.map(fileText)) : await fileText(value);
    }
    const path = route.replace(/\{(\w+)\}/g, (_, name) => {
      if (!(name in rest)) throw new TypeError(`The route ${route} wants ${name}.`);
      const value = rest[name];
      delete rest[name];
      return id(value);
    });
    const inputs = method === "GET" || method === "DELETE" ? { query: rest } : { body: rest };
    return [`${base}/${path.replace(/^\/+/, "")}`, { ...inputs, signals, once: true }];
  }
}
