/** One route of an application: its form, its examples, a run of it, the same call elsewhere. */

import { APIError, AbortError, client, errorText, key as apiKey } from "../core/api.js";
import { duration } from "../core/format.js";
import { html, useEffect, useMemo, useRef, useState } from "../core/html.js";
import { t } from "../core/i18n.js";
import { modifier } from "../core/keys.js";
import { setQuery } from "../core/router.js";
import { Code } from "./code.js";
import { Form, JsonInput } from "./form.js";
import { Result } from "./result.js";
import { Draft, check, complete, key, placed } from "./schema.js";
import { callSnippets, methodOf } from "./snippets.js";
import { Badge, Button, Progress, Tabs } from "./ui.js";

const MAX_LINK = 8000; // characters of inputs in the URL; longer ones would make links that programs cut

/** `base`: the application's URL; `name`: what it is called here; `query`: of the page's URL (`in`: inputs, `job`). */
export function RunPanel({ base, name, route, query }) {
  const [values, setValues] = useState(() => fromLink(query.in) ?? {});
  const [generation, setGeneration] = useState(0); // another one: the fields begin anew
  const [asJson, setAsJson] = useState(false);
  const [errors, setErrors] = useState(new Map());
  const [showCode, setShowCode] = useState(false);
  const run = useRun(base, route, query.job);
  const sent = useMemo(() => complete(route.input, values, route.input) ?? {}, [values, route]);

  useLink(sent, Object.keys(values).length > 0 || Boolean(query.in), query.in, (linked) => fill(linked));
  const change = (next) => {
    setValues(next);
    if (errors.size) setErrors(new Map());
  };
  const fill = (next) => {
    change(next);
    setGeneration((n) => n + 1);
  };
  const output = useRef(null);
  const start = (mode) => {
    const wrong = check(route.input, sent, route.input);
    setErrors(told(wrong));
    if (wrong.length) return focusFirstWrong();
    output.current?.scrollIntoView({ block: "nearest" });
    run.start(mode, sent, (problem) => setErrors(placed(problem, route.input, sent, route.input)));
  };
  useEffect(() => {
    if (errors.size) focusFirstWrong();
  }, [errors]);
  const onKey = (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") {
      event.preventDefault();
      start("now");
    }
  };
  const submit = (event) => {
    event.preventDefault();
    start("now");
  };
  const hasInputs = Object.keys(route.input.properties ?? {}).length > 0;
  return html`<div class="run-panel">
    <form class="run-form" data-route=${route.name} onSubmit=${submit} onKeyDown=${onKey} novalidate aria-label=${route.summary || route.name}>
      ${route.description && html`<p class="run-words">${route.description}</p>`}
      <${Examples} examples=${route.examples} onFill=${fill} />
      ${asJson
        ? html`<${JsonInput} value=${values} onChange=${(next) => change(next ?? {})} control=${{ "aria-label": t("form.as_json"), id: "f-json" }} />`
        : html`<${Form} key=${generation} schema=${route.input} values=${values instanceof Draft ? {} : values} onChange=${change} errors=${errors} />`}
      <div class="row run-buttons">
        ${run.busy
          ? html`<${Button} kind="danger" icon="stop" onClick=${run.stop}>${t("form.stop")}<//>`
          : html`<${Button} type="submit" kind="primary" icon="play" title=${`${modifier} Enter`}>${t("form.run")}<//>`}
        <${Button} kind="quiet" disabled=${run.busy} onClick=${() => start("job")}>${t("form.background")}<//>
        <span class="grow"></span>
        ${hasInputs && html`<${Button} kind="quiet" small onClick=${() => fill({})}>${t("form.clear")}<//>
        <${Button} kind="quiet" small aria-pressed=${String(asJson)} onClick=${() => setAsJson(!asJson)}>JSON<//>`}
        <${Button} kind="quiet" small aria-pressed=${String(showCode)} onClick=${() => setShowCode(!showCode)}>${t("form.code")}<//>
      </div>
      <${Hints} route=${route} />
      ${showCode && html`<${Snippets} call=${{ base, name, route, inputs: sent, hasKey: Boolean(apiKey.value) }} />`}
    </form>
    <section class="run-output" ref=${output} aria-live="polite" aria-label=${t("form.result")} aria-busy=${String(run.busy)}>
      <${Outcome} ...${run} route=${route} />
    </section>
  </div>`;
}

/** A call in one of its ways: {state, busy, value, text, error, job, seconds, start, stop}. */
function useRun(base, route, jobInLink) {
  const [run, setRun] = useState({ state: "idle" });
  const controller = useRef(null);
  const put = (fields) => setRun((old) => ({ ...old, ...fields }));
  const within = async (work, onWrong) => {
    controller.current?.abort();
    const own = (controller.current = new AbortController());
    const began = performance.now();
    setRun({ state: "running" });
    const end = (fields) => controller.current === own && put({ ...fields, seconds: (performance.now() - began) / 1000 });
    try {
      end({ state: "done", ...(await work(own.signal)) });
    } catch (error) {
      if (error instanceof AbortError) return end({ state: "stopped" });
      end({ state: "failed", error });
      if (error instanceof APIError && Array.isArray(error.detail)) onWrong?.(error.detail);
    }
  };
  const followed = async (id, signal) => {
    let job;
    for await (job of client().apps.follow(base, id, { signal })) put({ job });
    if (job.state === "cancelled") throw new AbortError(job.state);
    return { value: job.result, job };
  };
  const start = (mode, inputs, onWrong) => {
    const { apps } = client();
    const options = { method: methodOf(route) };
    if (mode === "job") {
      return within(async (signal) => {
        const job = await apps.start(base, route.path, inputs, { ...options, signal });
        setQuery({ job: job.id });
        return followed(job.id, signal);
      }, onWrong);
    }
    setQuery({ job: null });
    return within(async (signal) => {
      if (!route.stream) return { value: await apps.run(base, route.path, inputs, { ...options, signal }) };
      const { joins } = route.stream;
      const items = [];
      for await (const item of apps.stream(base, route.path, inputs, { ...options, signal })) {
        items.push(item);
        put({ value: whole(items, joins), isLive: true });
      }
      return { value: whole(items, joins), isLive: false };
    }, onWrong);
  };
  useEffect(() => {
    if (jobInLink && run.state === "idle") within((signal) => followed(jobInLink, signal));
    return () => controller.current?.abort();
  }, []);
  const stop = async () => {
    if (run.job?.state === "running") await client().apps.cancel(base, run.job.id).catch(() => {});
    controller.current?.abort();
  };
  return { ...run, busy: run.state === "running", start, stop };
}

/** The elements of a stream together, as the server puts them. */
function whole(items, joins) {
  return joins || (items.length > 0 && items.every((one) => typeof one === "string")) ? items.join("") : [...items];
}

function Outcome({ state, value, isLive, error, job, seconds, route }) {
  if (state === "idle") return html`<p class="muted run-idle">${t("form.idle")}</p>`;
  const took = seconds === undefined ? null : html`<span class="muted">${duration(seconds)}</span>`;
  const tone = { done: "ok", failed: "bad", stopped: "warn", running: "accent" }[state];
  const hasValue = value !== undefined && (state !== "failed" || isLive);
  return html`<div class="row">
      <${Badge} tone=${tone}>${t(`form.state_${state}`)}<//>${took}
      ${job && html`<code class="muted truncate">${job.id}</code>`}
      ${Array.isArray(value) && route.stream && html`<span class="muted">${t("form.elements", { n: value.length })}</span>`}
    </div>
    ${state === "running" && job && html`<${Progress} value=${job.progress} label=${job.message || t("form.state_running")} />`}
    ${state === "running" && job?.message && html`<p class="muted">${job.message}</p>`}
    ${state === "running" && !job && value === undefined && html`<${Progress} value=${null} label=${t("form.state_running")} />`}
    ${error && html`<${Problem} error=${error} />`}
    ${hasValue && html`<${Result} value=${value} live=${state === "running" && isLive && typeof value === "string"} wanted=${route.hints.output} />`}`;
}

function Problem({ error }) {
  const list = Array.isArray(error.detail) ? error.detail : [];
  return html`<div class="problem" role="alert">
    <p>${error.status ? html`<code>${error.status}</code> ` : ""}${errorText(error)}</p>
    ${list.length > 1 && html`<ul>${list.map((one, i) => html`<li key=${i}><code>${one.loc?.slice(1).join(".")}</code> ${one.msg}</li>`)}</ul>`}
    ${error.requestId && html`<p class="muted small">${error.requestId}</p>`}
  </div>`;
}

function Examples({ examples, onFill }) {
  if (!examples.length) return null;
  const label = (example, i) => {
    const text = Object.values(example).map((one) => (typeof one === "object" ? JSON.stringify(one) : String(one))).join(" · ");
    return text.length > 48 ? `${text.slice(0, 46)}…` : text || `${i + 1}`;
  };
  return html`<div class="row examples" role="group" aria-label=${t("form.examples")}>
    <span class="muted">${t("form.examples")}</span>
    ${examples.map((one, i) => html`<button type="button" key=${i} class="chip truncate" onClick=${() => onFill(structuredClone(one))}>${label(one, i)}</button>`)}
  </div>`;
}

function Hints({ route }) {
  const { hints } = route;
  const said = [
    hints.destructive && html`<${Badge} tone="warn">${t("form.destructive")}<//>`,
    hints.read_only && html`<${Badge}>${t("form.read_only")}<//>`,
    hints.tool && html`<${Badge}>${t("form.tool")}<//>`,
  ].filter(Boolean);
  return html`<div class="row muted small"><code>${route.methods.join(" ")} ${route.path}</code>${said}</div>`;
}

const LANGUAGES = { curl: "curl", python: "Python", js: "JavaScript", cli: "CLI" };

export function Snippets({ call }) {
  const [at, setAt] = useState("curl");
  const texts = useMemo(() => callSnippets(call), [JSON.stringify(call)]);
  const tabs = Object.entries(LANGUAGES).map(([id, label]) => ({ id, label }));
  return html`<div class="snippets">
    <${Tabs} tabs=${tabs} active=${at} onChange=${setAt} />
    <${Code} text=${texts[at]} language=${{ js: "javascript", python: "python" }[at] ?? "shell"} label=${LANGUAGES[at]} />
  </div>`;
}

/** Complaints of `check` as texts by field. */
function told(wrong) {
  return new Map(wrong.map(({ path, problem, ...more }) => [key(path), [t(`form.wrong_${problem}`, more)]]));
}

function focusFirstWrong() {
  // After the next drawing: the complaint marks its field.
  setTimeout(() => document.querySelector('.run-form [aria-invalid="true"]')?.focus(), 50);
}

function fromLink(text) {
  try {
    const found = JSON.parse(text);
    return found && typeof found === "object" && !Array.isArray(found) ? found : undefined;
  } catch {
    return undefined; // a link cut in half
  }
}

/** Keeps the inputs in the URL, a moment after the last change; `onOther`: somebody has opened a link with others. */
function useLink(sent, isWanted, linked, onOther) {
  const text = JSON.stringify(sent);
  const written = useRef(linked ?? null);
  useEffect(() => {
    if (!isWanted) return undefined;
    const timer = setTimeout(() => {
      written.current = text === "{}" || text.length > MAX_LINK ? null : text;
      setQuery({ in: written.current });
    }, 300);
    return () => clearTimeout(timer);
  }, [text, isWanted]);
  useEffect(() => {
    if ((linked ?? null) === written.current) return;
    written.current = linked ?? null;
    onOther(fromLink(linked) ?? {});
  }, [linked]);
}
