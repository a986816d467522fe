/** Getting an answer, piece by piece: plain, or by an agent that may call tools. */

import { AbortError, ask, client, errorText, events } from "../../core/api.js";
import { agentFields, agentInput, fieldsOf, messagesOf, toolsOf } from "./request.js";

/** An answer in the making: what it is, when it came, how to end it. */
export const emptyAnswer = (model) => ({ model, content: "", reasoning: "", calls: [], state: "running", stats: {} });

/** `onChange` is called when `answer` has changed, at most once a frame. */
export async function answerTo(chat, userId, answer, { second = false, signal, onChange }) {
  const clock = new Clock(answer.stats);
  const tell = paced(onChange);
  try {
    const tools = toolsOf(chat.settings);
    const messages = messagesOf(chat, userId, second);
    if (tools.length) await agentAnswer(chat, messages, tools, answer, clock, { signal, tell });
    else await plainAnswer(messages, fieldsOf(chat.settings), answer, clock, { signal, tell });
    if (answer.state === "running") answer.state = "done";
  } catch (e) {
    failed(answer, e, signal);
  }
  clock.end(!answer.calls.length);
  tell.now();
}

function failed(answer, e, signal) {
  answer.state = e instanceof AbortError || signal.aborted ? "stopped" : "failed";
  if (answer.state === "failed") answer.error = e instanceof SyntaxError ? e.message : errorText(e);
}

class Clock {
  #start = performance.now();
  constructor(stats) {
    this.stats = stats;
  }
  piece() {
    this.stats.ttft ??= (performance.now() - this.#start) / 1000;
  }
  /** `isOne`: it is one answer; tokens of several, and tools between them, give no speed. */
  end(isOne) {
    this.stats.seconds = (performance.now() - this.#start) / 1000;
    const { tokens, ttft, seconds } = this.stats;
    if (isOne && tokens > 1 && seconds > ttft) this.stats.speed = (tokens - 1) / (seconds - ttft);
  }
}

function paced(onChange) {
  let timer = null;
  const tell = () => (timer ??= setTimeout(tell.now, 50)); // drawing Markdown for each token would take most of the time
  tell.now = () => {
    clearTimeout(timer);
    timer = null;
    onChange();
  };
  return tell;
}

async function plainAnswer(messages, fields, answer, clock, { signal, tell }) {
  const options = { model: answer.model, ...fields, stream_options: { include_usage: true }, signal };
  for await (const chunk of client().streamChat(messages, options)) {
    const delta = chunk.choices[0]?.delta ?? {};
    const reasoning = delta.reasoning_content ?? "";
    if (chunk.text || reasoning) clock.piece();
    answer.content += chunk.text;
    answer.reasoning += reasoning;
    answer.finish = chunk.choices[0]?.finish_reason ?? answer.finish;
    if (chunk.usage) Object.assign(answer.stats, { tokens: chunk.usage.completion_tokens, prompt: chunk.usage.prompt_tokens });
    tell();
  }
}

const RUNS = "/llmasos/v1/agents/runs";

async function agentAnswer(chat, messages, tools, answer, clock, how) {
  const fields = agentFields(answer.model, messages, chat.settings, tools);
  await follow(RUNS, { input: agentInput(messages), ...fields, stream: true }, answer, clock, how);
}

/** Goes on after the person has said what becomes of the calls: {id: {approve} | {result}}. */
export async function decide(answer, decisions, { signal, onChange }) {
  const clock = new Clock(answer.stats);
  const tell = paced(onChange);
  answer.state = "running";
  try {
    await follow(`${RUNS}/${encodeURIComponent(answer.run)}/continue`, { decisions, stream: true }, answer, clock, { signal, tell });
    if (answer.state === "running") answer.state = "done";
  } catch (e) {
    failed(answer, e, signal);
  }
  clock.end(!answer.calls.length);
  tell.now();
}

export const cancelRun = (answer) => ask("POST", `${RUNS}/${encodeURIComponent(answer.run)}/cancel`).catch(() => {});

async function follow(path, body, answer, clock, { signal, tell }) {
  for await (const { data } of events("POST", path, { body, signal })) {
    if (data === "[DONE]") break;
    const event = JSON.parse(data);
    if (event.error) throw Object.assign(new Error(event.error.message ?? String(event.error)), event.error);
    if (event.text) clock.piece();
    if (event.type === "answer.delta") answer.content += event.text;
    if (event.type === "reasoning.delta") answer.reasoning += event.text;
    if (event.run?.id) answer.run = event.run.id;
    if (event.call) keepCall(answer, event.call);
    if (event.type === "call.started") answer.content = ""; // what stood before a call is a note of the model's to itself
    if (event.type === "run.done") ended(answer, event.run);
    tell();
  }
}

function keepCall(answer, call) {
  const at = answer.calls.findIndex((one) => one.id === call.id);
  answer.calls = at < 0 ? [...answer.calls, call] : answer.calls.with(at, call);
}

function ended(answer, run) {
  for (const step of run.steps) for (const call of step.calls) keepCall(answer, call);
  Object.assign(answer.stats, { tokens: run.output_tokens, prompt: run.prompt_tokens });
  answer.pending = run.pending;
  answer.own = run.tools.filter((tool) => tool.source === "client").map((tool) => tool.name);
  if (run.state === "requires_action") answer.state = "waits";
  if (run.state === "done") answer.content = run.text || answer.content;
  if (run.state === "cancelled") answer.state = "stopped";
  if (run.stop || run.error) Object.assign(answer, { state: "failed", error: (run.stop ?? run.error).message });
}

/** Passages of a knowledge base for a question. */
export async function passagesFor(base, query, signal) {
  const found = await ask("POST", `/llmasos/v1/knowledge/${encodeURIComponent(base)}/search`, { body: { query: query.slice(0, 10_000), k: 4 }, signal });
  return found.data.map(({ text, citation, path }) => ({ text, citation, path }));
}
