/** Every route of the live OpenAPI document: look, fill in, send, read. */

import { Code } from "../../components/code.js";
import { Form } from "../../components/form.js";
import { Json } from "../../components/json.js";
import { Draft } from "../../components/schema.js";
import { curl } from "../../components/snippets.js";
import { Badge, Button, Details, Empty, Input, KeyValues, Loaded, Tabs, TextArea, classes } from "../../components/ui.js";
import { ROOT, ask, key as apiKey, reachable, keyWanted } from "../../core/api.js";
import { bytes, duration } from "../../core/format.js";
import { useLoad } from "../../core/hooks.js";
import { html, useEffect, useMemo, useRef, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { useCommands } from "../../core/keys.js";
import { href, segment, setQuery } from "../../core/router.js";
import { EventParser } from "../../llmasos.js";
import { able } from "./models.js";
import { bodySchema, found, groupsOf, operationsOf, parameterSchema, requestSnippets, sampleBody, urlOf } from "./openapi.js";

const KEPT_EVENTS = 500;

export function Endpoints({ query, rest, models }) {
  const state = useLoad((signal) => ask("GET", "/openapi.json", { signal }), []);
  return html`<${Loaded} state=${state}>
    ${(document) => html`<${Explorer} ...${{ document, query, models }} wanted=${rest.join("/")} />`}
  <//>`;
}

const link = (one) => href(`/playground/endpoints/${one.method.toLowerCase()}/${segment(one.path.slice(1))}`);

function Explorer({ document: openapi, query, wanted, models }) {
  const operations = useMemo(() => operationsOf(openapi), [openapi]);
  const search = query.q ?? "";
  const shown = found(operations, search);
  const groups = groupsOf(shown);
  const at = operations.find((one) => one.id === wanted.replace("/", " /"));
  const box = useRef(null);
  useCommands([{ id: "endpoints-search", label: t("playground.search"), keys: "/", run: () => box.current?.focus() }], []);
  return html`<div class=${classes("split explorer", at && "has-choice")}>
    <nav class="stack endpoint-list" aria-label=${t("playground.endpoints")}>
      <${Input} type="search" inputRef=${box} value=${search} onChange=${(q) => setQuery({ q })} placeholder=${t("playground.search")} aria-label=${t("playground.search")} />
      ${groups.map(
        (group) => html`<section key=${group}>
          <h2 class="small muted">${group === "other" || group === "apps" ? t(`playground.group_${group}`) : group}</h2>
          <ul>
            ${shown
              .filter((one) => one.group === group)
              .map(
                (one) => html`<li key=${one.id}>
                  <a href=${link(one)} title=${one.summary} aria-current=${one === at ? "true" : undefined}><${Method} name=${one.method} /><code class="truncate">${one.path}</code></a>
                </li>`,
              )}
          </ul>
        </section>`,
      )}
      ${!shown.length && html`<p class="muted">${t("playground.none_found")}</p>`}
    </nav>
    ${at
      ? html`<${Operation} key=${at.id} ...${{ ...at, document: openapi, models }} />`
      : html`<${Empty} icon="playground" title=${t("playground.choose", { n: operations.length })}>${t("playground.choose_hint")}<//>`}
  </div>`;
}

const Method = ({ name }) => html`<span class=${`method method-${name.toLowerCase()}`}>${name === "DELETE" ? "DEL" : name}</span>`;

function Operation({ method, path, operation, document: openapi, models }) {
  const names = { chat: able(models, "chat", "completion")[0]?.id, embed: able(models, "embeddings")[0]?.id };
  const schema = bodySchema(operation);
  const first = useMemo(() => sampleBody(path, operation, openapi, names), [names.chat, names.embed]);
  const [values, setValues] = useState({});
  const [text, setText] = useState(null);
  const [asForm, setAsForm] = useState(false);
  const sending = useSending();
  const parameters = useMemo(() => parameterSchema(operation), [operation]);
  const body = text ?? (first === undefined ? "" : JSON.stringify(first, null, 2));
  const parsed = parse(body);
  const { url, missing } = urlOf(ROOT, path, operation, values);
  const wrong = schema && parsed instanceof Draft ? t("form.wrong_json") : missing.length ? t("playground.missing", { names: missing.join(", ") }) : "";
  const request = { method, url, body: schema && body.trim() ? parsed : undefined, hasKey: Boolean(apiKey.value) };
  const stream = request.body?.stream === true || /\/events$/.test(path) || values.follow === true;
  const submit = (event) => {
    event?.preventDefault();
    if (!wrong) sending.send(request);
  };
  const onKey = (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") submit(event);
  };
  const words = operation.description?.trim();
  return html`<div class="stack operation">
    <header class="stack operation-head">
      <div class="row"><a class="back" href="#/playground/endpoints">←<span class="visually-hidden">${t("playground.endpoints")}</span></a><${Method} name=${method} /><h2 class="mono break">${path}</h2></div>
      <p>${marked(operation.summary ?? "")}</p>
      ${words && words !== operation.summary && html`<p class="muted">${marked(words)}</p>`}
    </header>
    <form class="stack" onSubmit=${submit} onKeyDown=${onKey} novalidate>
      ${Object.keys(parameters.properties).length > 0 &&
      html`<${Form} schema=${parameters} root=${openapi} values=${values} onChange=${setValues} prefix="p" />`}
      ${schema &&
      html`<div class="field">
        <div class="row"><label class="label grow" for="body">${t("playground.body")}</label>
          <${Button} kind="quiet" small aria-pressed=${String(asForm)} disabled=${parsed instanceof Draft} onClick=${() => setAsForm(!asForm)}>${t("playground.form")}<//>
          <${Button} kind="quiet" small onClick=${() => setText(null)}>${t("word.reset")}<//>
        </div>
        ${asForm && !(parsed instanceof Draft)
          ? html`<${Form} schema=${schema} root=${openapi} values=${parsed ?? {}} onChange=${(next) => setText(JSON.stringify(next, null, 2))} prefix="b" />`
          : html`<${TextArea} id="body" class="mono" rows=${4} maxRows=${24} spellcheck="false" value=${body} onChange=${setText} aria-invalid=${parsed instanceof Draft ? "true" : undefined} />`}
      </div>`}
      <div class="row">
        ${sending.busy
          ? html`<${Button} kind="danger" icon="stop" onClick=${sending.stop}>${t("form.stop")}<//>`
          : html`<${Button} type="submit" kind="primary" icon="send" disabled=${Boolean(wrong)}>${t("playground.send")}<//>`}
        ${wrong && html`<span class="field-error">${wrong}</span>`}
      </div>
    </form>
    <${Answer} ...${sending} />
    <${Elsewhere} request=${request} stream=${stream} />
    <${Details} summary=${t("playground.schema")}>
      <${Json} open=${1} value=${{ body: schema, responses: operation.responses }} />
    <//>
  </div>`;
}

/** Words in backquotes as code. */
const marked = (text) => text.split(/`([^`]+)`/).map((part, i) => (i % 2 ? html`<code key=${i}>${part}</code>` : part));

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return new Draft(text);
  }
}

function Elsewhere({ request, stream }) {
  const [at, setAt] = useState("curl");
  const texts = { curl: curl({ ...request, stream }), ...requestSnippets({ ...request, stream }) };
  const tabs = [
    { id: "curl", label: "curl" },
    { id: "python", label: "Python" },
    { id: "js", label: "JavaScript" },
  ];
  return html`<${Details} summary=${t("form.code")}>
    <${Tabs} tabs=${tabs} active=${at} onChange=${setAt} label=${t("form.code")} />
    <${Code} text=${texts[at]} label=${at} />
  <//>`;
}

/** One request at a time: its answer as it comes. */
function useSending() {
  const [answer, setAnswer] = useState(null);
  const controller = useRef(null);
  useEffect(() => () => controller.current?.abort(), []);
  const send = async ({ method, url, body }) => {
    const own = (controller.current = new AbortController());
    const began = performance.now();
    const seconds = () => (performance.now() - began) / 1000;
    const put = (fields) => setAnswer((old) => ({ ...old, ...fields, seconds: seconds() }));
    setAnswer({ busy: true });
    try {
      const headers = { ...(body === undefined ? {} : { "content-type": "application/json" }) };
      if (apiKey.value) headers.authorization = `Bearer ${apiKey.value}`;
      const sent = { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal: own.signal };
      const response = await fetch(url, sent);
      reachable.value = true;
      if (response.status === 401) keyWanted.value = true;
      put({ status: response.status, words: response.statusText, headers: [...response.headers], first: seconds() });
      await read(response, put);
    } catch (e) {
      put(own.signal.aborted ? { stopped: true } : { error: String(e.message ?? e) });
    }
    put({ busy: false });
  };
  return { answer, busy: answer?.busy ?? false, send, stop: () => controller.current?.abort() };
}

async function read(response, put) {
  const type = response.headers.get("content-type") ?? "";
  const isEvents = type.startsWith("text/event-stream");
  if (!isEvents && !/json|text|xml/.test(type) && type) {
    const blob = await response.blob();
    return put({ size: blob.size, blob: URL.createObjectURL(blob), type });
  }
  const [parser, decoder, reader] = [new EventParser(), new TextDecoder(), response.body.getReader()];
  let [text, size, events] = ["", 0, []];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    size += value.length;
    if (isEvents) events = [...events, ...parser.feed(value)].slice(-KEPT_EVENTS);
    else text += decoder.decode(value, { stream: true });
    put({ text, size, type, events: isEvents ? events : undefined });
  }
  return put({ text, size, type });
}

function Answer({ answer, busy }) {
  const value = useMemo(() => (answer?.text && /json/.test(answer.type ?? "") && !busy ? parse(answer.text) : undefined), [answer?.text, busy]);
  if (!answer) return null;
  const { status, words, seconds, first, size, headers, events, text, error, stopped, blob, type } = answer;
  const tone = error || status >= 400 ? "bad" : stopped ? "warn" : status ? "ok" : "accent";
  return html`<section class="card answer" aria-live="polite" aria-busy=${String(busy)} aria-label=${t("playground.answer")}>
    <div class="row">
      <${Badge} tone=${tone}>${error ? t("form.state_failed") : stopped ? t("form.state_stopped") : status ? `${status} ${words}` : t("form.state_running")}<//>
      ${status && html`<span class="muted numbers">${duration(seconds)}${first !== undefined && seconds - first > 0.05 ? ` · ${t("playground.first", { time: duration(first) })}` : ""}${size !== undefined ? ` · ${bytes(size)}` : ""}</span>`}
    </div>
    ${error && html`<p class="field-error">${error}</p>`}
    ${events && html`<${Events} events=${events} />`}
    ${blob && html`<a href=${blob} download="answer">${t("form.download")} (${type})</a>`}
    ${!events && text && (value !== undefined && !(value instanceof Draft) ? html`<${Shown} value=${value} text=${text} />` : html`<${Code} text=${text} label=${t("playground.answer")} />`)}
    ${headers && html`<${Details} summary=${t("playground.headers")}><${KeyValues} pairs=${headers} /><//>`}
  </section>`;
}

function Shown({ value, text }) {
  const [raw, setRaw] = useState(false);
  const isShort = text.length < 4000;
  return html`<div class="row"><span class="grow"></span><${Button} small kind="quiet" aria-pressed=${String(raw)} onClick=${() => setRaw(!raw)}>JSON<//></div>
    ${raw ? html`<${Code} text=${JSON.stringify(value, null, 2)} label="JSON" />` : html`<${Json} value=${value} open=${isShort ? 6 : 2} />`}`;
}

/** What the usual protocols say in their events, put together, and the events themselves. */
function Events({ events }) {
  const bodies = events.map(({ data }) => parse(data));
  const said = bodies.map((one) => one?.choices?.[0]?.delta?.content ?? one?.choices?.[0]?.text ?? one?.delta?.text ?? (typeof one?.delta === "string" ? one.delta : "")).join("");
  return html`${said && html`<div class="plain-text">${said}</div>`}
    <${Details} summary=${t("playground.events", { n: events.length })} open=${!said}>
      <ol class="events mono small">
        ${events.slice(-200).map((one, i) => html`<li key=${i}>${one.event !== "message" && html`<b>${one.event}</b> `}${one.data}</li>`)}
      </ol>
    <//>`;
}
