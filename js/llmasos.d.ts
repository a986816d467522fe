/** Types of llmasos.js. Fields of requests and answers are those of the wire; unknown ones pass through. */

export const DEFAULT_BASE_URL: string;

// errors

export class LLMasOSError extends Error {}

/** The server said no. `status` is 0 for an error inside a stream; `retryAfter` is in seconds. */
export class APIError extends LLMasOSError {
  readonly status: number;
  /** The server's stable name for what happened, e.g. "context_length_exceeded" or "model_crashed". */
  readonly code?: string;
  /** The field that is wrong. */
  readonly param?: string;
  readonly type?: string;
  /** What the server's log has the request under. */
  readonly requestId?: string;
  readonly retryAfter?: number;
  /** Of an application's problem document: each wrong input. */
  readonly detail?: unknown;
  /** The whole answer, if it was JSON. */
  readonly body?: unknown;
}
export class BadRequestError extends APIError {}
export class AuthenticationError extends APIError {}
export class PermissionDeniedError extends APIError {}
export class NotFoundError extends APIError {}
export class RateLimitError extends APIError {}
export class UnavailableError extends APIError {}
export class ConnectionError extends LLMasOSError {}
export class TimeoutError extends ConnectionError {}
export class AbortError extends LLMasOSError {}
export class ToolLoopError extends LLMasOSError {
  /** The conversation so far. */
  readonly messages: Message[];
}
export class ToolLimitError extends ToolLoopError {}
export class ToolError extends ToolLoopError {
  /** The tool that threw `cause`. */
  readonly tool: string;
}

// server-sent events

export interface ServerSentEvent {
  data: string;
  event: string;
  id: string;
}
export class EventParser {
  feed(bytes: Uint8Array): ServerSentEvent[];
}

// options

export interface Options {
  /** Where the OpenAI API of the server is; it usually ends in /v1. */
  baseURL?: string | URL;
  /** Default: LLMASOS_API_KEY of the environment, where there is one. */
  apiKey?: string;
  /** The longest silence of the server in milliseconds, before and within an answer. Default 600,000; 0: no limit. */
  timeout?: number;
  /** How often to ask again after 408, 409, 429, 5xx or a connection that never was. Default 2. */
  maxRetries?: number;
  /** Default: the global one. */
  fetch?: typeof globalThis.fetch;
  /** Sent with each request. */
  headers?: Record<string, string>;
}

export interface CallOptions {
  /** Ends the request; the call then throws AbortError. */
  signal?: AbortSignal;
}

/** Fields that chat and text completions share. */
export interface SamplingFields extends CallOptions {
  model: string;
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  max_tokens?: number;
  n?: number;
  seed?: number;
  stop?: string | string[];
  presence_penalty?: number;
  frequency_penalty?: number;
  repetition_penalty?: number;
  logit_bias?: Record<string, number>;
  priority?: number;
  user?: string;
  stream_options?: { include_usage?: boolean };
  structured_outputs?: Record<string, unknown>;
  [field: string]: unknown;
}

export interface ChatFields extends SamplingFields {
  max_completion_tokens?: number;
  logprobs?: boolean;
  top_logprobs?: number;
  response_format?:
    | { type: "text" | "json_object" }
    | { type: "json_schema"; json_schema: { name?: string; schema: object; strict?: boolean } };
  tools?: ToolDefinition[];
  tool_choice?: "none" | "auto" | "required" | { type: "function"; function: { name: string } };
  parallel_tool_calls?: boolean;
}

// answers

export interface ToolCall {
  id: string;
  type: "function";
  /** `arguments` is JSON text as the model wrote it. */
  function: { name: string; arguments: string };
}

export interface ToolDefinition {
  type: "function";
  function: { name: string; description?: string; parameters?: object; strict?: boolean };
}

export interface Message {
  role: "system" | "developer" | "user" | "assistant" | "tool";
  content?: string | null | Array<{ type: string; [field: string]: unknown }>;
  name?: string;
  tool_calls?: ToolCall[];
  tool_call_id?: string;
  reasoning_content?: string | null;
  [field: string]: unknown;
}
export type Messages = string | Message[];

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  prompt_tokens_details?: { cached_tokens?: number } | null;
  completion_tokens_details?: { reasoning_tokens?: number } | null;
}

export interface TokenLogprob {
  token: string;
  logprob: number;
  bytes?: number[] | null;
  top_logprobs?: TokenLogprob[];
}

export type FinishReason = "stop" | "length" | "tool_calls" | "content_filter" | "function_call";

export interface ChatCompletion {
  id: string;
  object: "chat.completion";
  created: number;
  model: string;
  choices: Array<{
    index: number;
    message: {
      role: "assistant";
      content: string | null;
      reasoning_content?: string | null;
      refusal?: string | null;
      tool_calls?: ToolCall[];
    };
    finish_reason: FinishReason | null;
    logprobs?: { content?: TokenLogprob[] | null } | null;
  }>;
  usage?: Usage | null;
  /** The first choice's text. */
  readonly text: string;
}

export interface ChatCompletionChunk {
  id: string;
  object: "chat.completion.chunk";
  created: number;
  model: string;
  choices: Array<{
    index: number;
    delta: {
      role?: "assistant";
      content?: string | null;
      reasoning_content?: string | null;
      tool_calls?: Array<{ index: number; id?: string; type?: "function"; function?: { name?: string; arguments?: string } }>;
    };
    finish_reason: FinishReason | null;
    logprobs?: { content?: TokenLogprob[] | null } | null;
  }>;
  usage?: Usage | null;
  /** What this chunk adds to the first choice's text. */
  readonly text: string;
}

export interface TextCompletion {
  id: string;
  object: "text_completion";
  created: number;
  model: string;
  choices: Array<{ index: number; text: string; finish_reason: FinishReason | null; logprobs?: object | null }>;
  usage?: Usage | null;
  readonly text: string;
}

export interface EmbeddingList {
  object: "list";
  model: string;
  data: Array<{ object: "embedding"; index: number; embedding: number[] }>;
  usage?: { prompt_tokens: number; total_tokens: number };
}

export interface Model {
  id: string;
  object: "model";
  created: number;
  owned_by: string;
  context_length?: number | null;
  parent?: string | null;
}

export interface RerankList {
  model: string;
  /** The best first. */
  results: Array<{ index: number; relevance_score: number; document?: { text: string } | null }>;
  /** How the scores were made: a head that reads both texts, or how alike their embeddings are. */
  method: "cross-encoder" | "cosine";
  [field: string]: unknown;
}

export interface ScoreList {
  model: string;
  data: Array<{ index: number; score: number }>;
  method: "cross-encoder" | "cosine";
  [field: string]: unknown;
}

/** What is not declared field by field: as the server sends it. */
export interface Body {
  [field: string]: any;
}

/**
 * The pieces of an answer; the request begins with the first `next()`. `break` or `abort()` ends it. It can be read once.
 */
export class Stream<Piece, Whole> implements AsyncIterable<Piece> {
  [Symbol.asyncIterator](): AsyncGenerator<Piece, void, undefined>;
  /** The text alone, in pieces. */
  readonly text: AsyncGenerator<string, void, undefined>;
  /** The whole answer; reads what was not read yet. */
  final(): Promise<Whole>;
  abort(): void;
}

// tools

export interface Tool<Arguments = any> {
  name: string;
  description?: string;
  /** JSON Schema of the arguments. */
  parameters?: object;
  strict?: boolean;
  /** Text goes back to the model as it is, anything else as JSON. */
  run(given: Arguments, context: { signal?: AbortSignal; call: ToolCall }): unknown;
}

export interface RunToolsOptions extends Omit<ChatFields, "tools"> {
  messages: Messages;
  tools: Tool[];
  /** Answers of the model, at most; then ToolLimitError. Default 10. */
  maxSteps?: number;
  /** Answers are streamed, and this sees their chunks. */
  onChunk?(chunk: ChatCompletionChunk): void;
}

export interface ToolRun {
  text: string;
  completion: ChatCompletion;
  /** The whole conversation, with calls and results. */
  messages: Message[];
  steps: number;
}

// namespaces

export interface Page<Item> {
  data: Item[];
  has_more?: boolean;
  first_id?: string | null;
  last_id?: string | null;
}
export interface PageOptions extends CallOptions {
  limit?: number;
  after?: string;
  order?: "asc" | "desc";
  purpose?: string;
}

export interface ResponseFields extends CallOptions {
  model: string;
  input: string | Array<Record<string, unknown>>;
  instructions?: string;
  previous_response_id?: string;
  store?: boolean;
  [field: string]: unknown;
}
export interface ResponseBody extends Body {
  id: string;
  status: string;
  output: Array<Record<string, any>>;
  /** All of the answer's text. */
  readonly text: string;
}
export interface ResponseEvent extends Body {
  type: string;
  /** What this event adds to the answer's text. */
  readonly text: string;
}
export interface Responses {
  create(options: ResponseFields): Promise<ResponseBody>;
  stream(options: ResponseFields): Stream<ResponseEvent, ResponseBody>;
  follow(id: string, options?: CallOptions & { starting_after?: number }): Stream<ResponseEvent, ResponseBody>;
  inputItems(id: string, options?: PageOptions): Promise<Page<Body>>;
  /** How many tokens the input would be. */
  countTokens(options: ResponseFields): Promise<number>;
  /** A background response once it is over, however it ended; asked for every `interval` milliseconds (1000). */
  wait(id: string, options?: CallOptions & { interval?: number }): Promise<ResponseBody>;
  retrieve(id: string, options?: CallOptions): Promise<ResponseBody>;
  delete(id: string, options?: CallOptions): Promise<Body>;
  cancel(id: string, options?: CallOptions): Promise<ResponseBody>;
}

export interface ConversationFields extends CallOptions {
  items?: Array<Record<string, unknown>>;
  metadata?: Record<string, string> | null;
}
export interface Conversations {
  create(options?: ConversationFields): Promise<Body>;
  retrieve(id: string, options?: CallOptions): Promise<Body>;
  update(id: string, options: ConversationFields): Promise<Body>;
  delete(id: string, options?: CallOptions): Promise<Body>;
  addItems(id: string, items: Array<Record<string, unknown>>, options?: CallOptions): Promise<Page<Body>>;
  items(id: string, options?: PageOptions): Promise<Page<Body>>;
  item(id: string, item: string, options?: CallOptions): Promise<Body>;
  deleteItem(id: string, item: string, options?: CallOptions): Promise<Body>;
}

export interface FileObject extends Body {
  id: string;
  filename: string;
  bytes: number;
  purpose: string;
}
export interface Files {
  /** `purpose` is "batch" where none is given. */
  upload(
    content: Blob | Uint8Array<ArrayBuffer> | ArrayBuffer | string,
    options?: CallOptions & { filename?: string; purpose?: string },
  ): Promise<FileObject>;
  list(options?: PageOptions): Promise<Page<FileObject>>;
  retrieve(id: string, options?: CallOptions): Promise<FileObject>;
  content(id: string, options?: CallOptions): Promise<Blob>;
  delete(id: string, options?: CallOptions): Promise<Body>;
}

export interface Batch extends Body {
  id: string;
  status: "validating" | "failed" | "in_progress" | "finalizing" | "completed" | "expired" | "cancelling" | "cancelled";
  output_file_id?: string | null;
  error_file_id?: string | null;
  request_counts?: { total: number; completed: number; failed: number };
}
export interface Batches {
  create(
    options: CallOptions & {
      input_file_id: string;
      endpoint: string;
      completion_window?: string;
      metadata?: Record<string, string>;
    },
  ): Promise<Batch>;
  retrieve(id: string, options?: CallOptions): Promise<Batch>;
  list(options?: PageOptions): Promise<Page<Batch>>;
  cancel(id: string, options?: CallOptions): Promise<Batch>;
  /** The batch once it is over, however it ended; asked for every `interval` milliseconds (2000). */
  wait(id: string, options?: CallOptions & { interval?: number }): Promise<Batch>;
}

export interface FineTuningJob extends Body {
  id: string;
  model: string;
  status: "validating_files" | "queued" | "running" | "paused" | "succeeded" | "failed" | "cancelled";
  fine_tuned_model?: string | null;
  training_file: string;
  trained_tokens?: number | null;
  result_files?: string[];
  error?: { code: string; message: string; param?: string | null } | null;
}
export interface FineTuningEvent extends Body {
  id: string;
  created_at: number;
  level: "info" | "warn" | "error";
  message: string;
  type: "message" | "metrics";
  data?: Record<string, unknown> | null;
}
export interface FineTuningCheckpoint extends Body {
  id: string;
  fine_tuned_model_checkpoint: string;
  step_number: number;
  metrics: { step: number; train_loss?: number | null; valid_loss?: number | null };
  /** Whether it can be asked. */
  served: boolean;
}
export interface FineTuning {
  create(
    options: CallOptions & {
      model: string;
      training_file: string;
      validation_file?: string;
      suffix?: string;
      seed?: number;
      hyperparameters?: {
        n_epochs?: number | "auto";
        batch_size?: number | "auto";
        learning_rate_multiplier?: number | "auto";
      };
      metadata?: Record<string, string>;
      /** Of a run, e.g. `{ tuning: "full", lora: { r: 8 } }`. */
      options?: Record<string, unknown>;
    },
  ): Promise<FineTuningJob>;
  retrieve(id: string, options?: CallOptions): Promise<FineTuningJob>;
  list(options?: PageOptions): Promise<Page<FineTuningJob>>;
  /** End it for good; checkpoints stay. */
  cancel(id: string, options?: CallOptions): Promise<FineTuningJob>;
  /** Save it, and stop until it is resumed. */
  pause(id: string, options?: CallOptions): Promise<FineTuningJob>;
  /** Go on with a paused or failed one. */
  resume(id: string, options?: CallOptions): Promise<FineTuningJob>;
  events(id: string, options?: PageOptions): Promise<Page<FineTuningEvent>>;
  /** Every event, the oldest first, as they come, until nothing more happens to the job by itself. */
  follow(id: string, options?: CallOptions): AsyncGenerator<FineTuningEvent, void, void>;
  checkpoints(id: string, options?: PageOptions): Promise<Page<FineTuningCheckpoint>>;
  /** The job once it is over or paused, however it ended; asked for every `interval` milliseconds (2000). */
  wait(id: string, options?: CallOptions & { interval?: number }): Promise<FineTuningJob>;
}

export interface ModelStatus extends Body {
  name: string;
  state: "absent" | "loading" | "ready" | "failed" | "stopping";
  /** How far a load is; `done` of `total` bytes of its phase. */
  loading?: {
    phase: "plan" | "room" | "start" | "download" | "check" | "unpack" | "load";
    done: number;
    total?: number | null;
    seconds: number;
    expected_seconds?: number | null;
  } | null;
  pinned: boolean;
  busy: number;
  waiting: number;
}
export interface PullJob extends Body {
  id: string;
  model: string;
  name: string;
  state: "waiting" | "running" | "paused" | "done" | "failed" | "cancelled";
  /** Bytes. */
  done: number;
  total?: number | null;
  message: string;
  error?: string | null;
}
export interface Agents {
  run(input: string | Body[], options: CallOptions & { model: string; [field: string]: unknown }): Promise<Body>;
  stream(
    input: string | Body[],
    options: CallOptions & { model: string; [field: string]: unknown },
  ): AsyncGenerator<Body, void, undefined>;
  goOn(id: string, decisions: Record<string, Body>, options?: CallOptions): Promise<Body>;
  streamOn(id: string, decisions: Record<string, Body>, options?: CallOptions): AsyncGenerator<Body, void, undefined>;
  runs(options?: CallOptions & { limit?: number }): Promise<Body[]>;
  get(id: string, options?: CallOptions): Promise<Body>;
  cancel(id: string, options?: CallOptions): Promise<Body>;
  delete(id: string, options?: CallOptions): Promise<unknown>;
  tools(options?: CallOptions): Promise<Body[]>;
  conversations(options?: CallOptions & { query?: string; limit?: number }): Promise<Body[]>;
}

export interface Native {
  models(options?: CallOptions): Promise<Body[]>;
  model(name: string, options?: CallOptions): Promise<Body>;
  remove(name: string, options?: CallOptions): Promise<Body>;
  catalog(options?: CallOptions & { query?: string }): Promise<Body[]>;
  status(options?: CallOptions): Promise<ModelStatus[]>;
  load(model: string, options?: CallOptions & { pin?: boolean; /** Seconds; -1: until its room is needed. */ keep_alive?: number }): Promise<ModelStatus>;
  unload(model: string, options?: CallOptions & { force?: boolean }): Promise<ModelStatus>;
  pin(model: string, pinned?: boolean, options?: CallOptions): Promise<ModelStatus>;
  plan(
    model: string,
    options?: CallOptions & { context?: number; concurrency?: number; device?: string; dtype?: string },
  ): Promise<Body>;
  startPull(model: string, options?: CallOptions & { name?: string }): Promise<PullJob>;
  pull(model: string, options?: CallOptions & { name?: string }): AsyncGenerator<PullJob, void, undefined>;
  followPull(id: string, options?: CallOptions): AsyncGenerator<PullJob, void, undefined>;
  pulls(options?: CallOptions): Promise<PullJob[]>;
  pausePull(id: string, options?: CallOptions): Promise<PullJob>;
  resumePull(id: string, options?: CallOptions): Promise<PullJob>;
  cancelPull(id: string, options?: CallOptions): Promise<PullJob>;
  requests(options?: CallOptions): Promise<Body[]>;
  cancelRequest(id: string, options?: CallOptions): Promise<Body>;
  logs(
    options?: CallOptions & { follow?: boolean; level?: string; request_id?: string; limit?: number },
  ): AsyncGenerator<Body, void, undefined>;
  system(options?: CallOptions): Promise<Body>;
  apps(options?: CallOptions): Promise<Body[]>;
  app(name: string, options?: CallOptions): Promise<Body>;
  installApp(
    reference: string,
    options?: CallOptions & { index?: string[]; accept?: string | boolean; trust?: string },
  ): Promise<Body>;
  changeApp(
    name: string,
    action: "start" | "stop" | "restart" | "update" | "rollback",
    options?: CallOptions & { index?: string[]; accept?: string | boolean; trust?: string; version?: string },
  ): Promise<Body>;
  configureApp(name: string, config: Record<string, unknown>, options?: CallOptions): Promise<Body>;
  uninstallApp(name: string, options?: CallOptions & { data?: boolean }): Promise<Body>;
  appLog(name: string, options?: CallOptions & { limit?: number }): Promise<string>;
  followAppLog(name: string, options?: CallOptions & { limit?: number }): AsyncGenerator<Body, void, undefined>;
}

export interface KeyFields extends CallOptions {
  scopes?: Array<"inference" | "manage" | "publish">;
  models?: string[] | null;
  apps?: string[] | null;
  expires?: string | null;
  requests_per_minute?: number | null;
  tokens_per_minute?: number | null;
  requests_per_day?: number | null;
  tokens_per_day?: number | null;
  tokens_per_month?: number | null;
  max_parallel?: number | null;
  priority?: number;
  share_cache?: boolean;
}
export interface Key extends Body {
  id: string;
  name: string;
  state: "active" | "expired" | "revoked";
  scopes: Array<"inference" | "manage" | "publish">;
  created: string;
}
export interface UsageRecord {
  day: string;
  key_id: string | null;
  key_name: string | null;
  model: string | null;
  requests: number;
  errors: number;
  prompt_tokens: number;
  cached_tokens: number;
  output_tokens: number;
}
/** All but one's own usage needs a key with the scope "manage". */
export interface AccessControl {
  createKey(name: string, options?: KeyFields): Promise<Key & { key: string }>;
  keys(options?: CallOptions): Promise<Key[]>;
  key(id: string, options?: CallOptions): Promise<Key>;
  updateKey(id: string, options: KeyFields & { name?: string }): Promise<Key>;
  revokeKey(id: string, options?: CallOptions): Promise<Key>;
  usage(options?: CallOptions & { since?: string; until?: string; key?: string; model?: string }): Promise<UsageRecord[]>;
  audit(options?: CallOptions & { limit?: number; before?: number }): Promise<Page<Body>>;
}

export interface Job<Result = any> {
  id: string;
  kind: string;
  name: string;
  state: "queued" | "running" | "paused" | "done" | "failed" | "cancelled";
  /** From 0 to 1; null where the kind does not tell. */
  progress: number | null;
  message: string;
  created: string;
  updated: string;
  result: Result;
  error: { code: string; message: string; hint: string } | null;
  can_pause: boolean;
}
export interface Jobs {
  list(options?: CallOptions & { kind?: string }): Promise<Job[]>;
  get(id: string, options?: CallOptions): Promise<Job>;
  follow(id: string, options?: CallOptions): AsyncGenerator<Job, void, undefined>;
  wait(id: string, options?: CallOptions): Promise<Job>;
  pause(id: string, options?: CallOptions): Promise<Job>;
  resume(id: string, options?: CallOptions): Promise<Job>;
  cancel(id: string, options?: CallOptions): Promise<Job>;
}

export interface TaskInfo extends Body {
  name: string;
  summary: string;
  input: any;
  output: any;
}
export interface Tasks {
  list(options?: CallOptions): Promise<TaskInfo[]>;
  run(task: string, options: CallOptions & { model: string; [input: string]: unknown }): Promise<any>;
  batch(
    task: string,
    options: CallOptions & { model: string; lines?: unknown[]; input_file_id?: string; parallel?: number },
  ): Promise<Job>;
  pipeline(pipeline: object, inputs?: object, options?: CallOptions & { model?: string }): Promise<Job>;
}

export interface Passage {
  text: string;
  score: number;
  path: string;
  title: string;
  headings: string[];
  page: number | null;
  start: number;
  end: number;
  citation: string;
}
export interface KnowledgeAnswer {
  answer: string;
  /** Numbers of passages, from 1. */
  citations: number[];
  passages: Passage[];
  /** "length": cut at max_tokens; citations may be missing. */
  finish_reason?: "stop" | "length";
}
export type KnowledgeEvent =
  | { type: "passages"; passages: Passage[] }
  | { type: "delta"; text: string }
  | { type: "done"; answer: KnowledgeAnswer };
export interface SearchFields extends CallOptions {
  k?: number;
  mode?: "hybrid" | "vector" | "text";
  /** A served cross-encoder. */
  rerank?: string;
}
export interface AskFields extends SearchFields {
  model: string;
  max_tokens?: number;
}
export interface Knowledge {
  list(options?: CallOptions): Promise<Body[]>;
  create(name: string, options?: CallOptions & { model?: string }): Promise<Body>;
  get(name: string, options?: CallOptions): Promise<Body>;
  delete(name: string, options?: CallOptions): Promise<void>;
  documents(name: string, options?: CallOptions): Promise<Body[]>;
  add(
    name: string,
    path: string,
    content: Blob | Uint8Array<ArrayBuffer> | ArrayBuffer | string,
    options?: CallOptions,
  ): Promise<Body>;
  remove(name: string, path: string, options?: CallOptions): Promise<void>;
  search(name: string, query: string, options?: SearchFields): Promise<Passage[]>;
  ask(name: string, question: string, options: AskFields): Promise<KnowledgeAnswer>;
  streamAsk(name: string, question: string, options: AskFields): AsyncGenerator<KnowledgeEvent, void, undefined>;
}

export interface PackageRelease {
  file: string;
  sha256: string;
  size: number;
  kind: string;
  summary: string;
  license: string;
  key_id: string | null;
  published: string;
  yanked: string | null;
}
export interface PackageReport {
  name: string;
  version: string;
  kind: string;
  sha256: string;
  checked: string;
  passed: boolean;
  checks: { name: string; outcome: "passed" | "warning" | "failed" | "skipped"; details: string[] }[];
}
export interface Packages {
  index(options?: CallOptions): Promise<{ format: number; apps: Record<string, Record<string, PackageRelease>> }>;
  publish(
    content: Blob | Uint8Array<ArrayBuffer> | ArrayBuffer,
    options: CallOptions & { owner: string },
  ): Promise<Job<PackageReport>>;
  report(name: string, version: string, options?: CallOptions): Promise<PackageReport>;
  yank(name: string, version: string, reason: string, options?: CallOptions): Promise<PackageRelease>;
}

export interface RouteOptions extends CallOptions {
  /** Default POST. */
  method?: "GET" | "POST" | "PUT" | "PATCH" | "DELETE";
  /** Of a stream: gets what the function says of how far it is. */
  onProgress?: (progress: { done: number | null; message: string }) => void;
}
/** A call of an application on its way, or over. */
export interface AppJob<Result = any> {
  id: string;
  route: string;
  state: "running" | "done" | "failed" | "cancelled";
  created: string;
  updated: string;
  /** From 0 to 1, as the function says. */
  progress: number | null;
  message: string;
  /** Elements of a stream so far. */
  num_items: number;
  result: Result | null;
  error: Body | null;
}
export interface Apps {
  /** `app`: the URL that `app.run()` printed, or the name of one under /apps of the server. */
  run<Result = any>(app: string, route: string, args?: Record<string, unknown>, options?: RouteOptions): Promise<Result>;
  stream<Item = any>(
    app: string,
    route: string,
    args?: Record<string, unknown>,
    options?: RouteOptions,
  ): AsyncGenerator<Item, void, undefined>;
  start<Result = any>(
    app: string,
    route: string,
    args?: Record<string, unknown>,
    options?: RouteOptions,
  ): Promise<AppJob<Result>>;
  jobs(app: string, options?: CallOptions): Promise<AppJob[]>;
  job<Result = any>(app: string, id: string, options?: CallOptions): Promise<AppJob<Result>>;
  cancel<Result = any>(app: string, id: string, options?: CallOptions): Promise<AppJob<Result>>;
  follow<Result = any>(app: string, id: string, options?: CallOptions): AsyncGenerator<AppJob<Result>, void, undefined>;
  wait<Result = any>(app: string, id: string, options?: CallOptions): Promise<AppJob<Result>>;
}

export interface HttpOptions {
  body?: unknown;
  query?: Record<string, unknown>;
  headers?: Record<string, string>;
  signals?: (AbortSignal | undefined)[];
  /** Ask again only where the server has not begun to work. */
  once?: boolean;
}
/** HTTP to one server, for routes that have no method. `path` may be a whole URL. */
export class Http {
  constructor(options?: Options);
  readonly baseURL: string;
  readonly root: string;
  json<Answer = any>(method: string, path: string, options?: HttpOptions): Promise<Answer>;
  blob(method: string, path: string, options?: HttpOptions): Promise<Blob>;
  events(method: string, path: string, options?: HttpOptions): AsyncGenerator<ServerSentEvent, void, undefined>;
}

export class LLMasOS {
  constructor(options?: Options);
  readonly baseURL: string;
  readonly responses: Responses;
  readonly conversations: Conversations;
  readonly files: Files;
  readonly batches: Batches;
  readonly fineTuning: FineTuning;
  readonly native: Native;
  readonly agents: Agents;
  readonly access: AccessControl;
  readonly apps: Apps;
  readonly jobs: Jobs;
  readonly tasks: Tasks;
  readonly knowledge: Knowledge;
  readonly packages: Packages;

  chat(messages: Messages, options: ChatFields): Promise<ChatCompletion>;
  streamChat(messages: Messages, options: ChatFields): Stream<ChatCompletionChunk, ChatCompletion>;
  complete(prompt: string | string[] | number[] | number[][], options: SamplingFields): Promise<TextCompletion>;
  streamComplete(prompt: string | string[] | number[] | number[][], options: SamplingFields): Stream<TextCompletion, TextCompletion>;
  embed(
    input: string | string[] | number[] | number[][],
    options: CallOptions & { model: string; dimensions?: number; [field: string]: unknown },
  ): Promise<EmbeddingList>;
  models(options?: CallOptions): Promise<Model[]>;
  model(name: string, options?: CallOptions): Promise<Model>;
  rerank(
    query: string,
    documents: string[],
    options: CallOptions & { model: string; top_n?: number; return_documents?: boolean },
  ): Promise<RerankList>;
  score(text_1: string | string[], text_2: string | string[], options: CallOptions & { model: string }): Promise<ScoreList>;
  tokenize(
    input: string | Message[],
    options: CallOptions & { model: string; [field: string]: unknown },
  ): Promise<{ tokens: number[]; count: number; max_model_len: number }>;
  detokenize(tokens: number[], options: CallOptions & { model: string }): Promise<string>;
  countTokens(
    input: string | Message[],
    options: CallOptions & { model: string; [field: string]: unknown },
  ): Promise<number>;
  runTools(options: RunToolsOptions): Promise<ToolRun>;
}
