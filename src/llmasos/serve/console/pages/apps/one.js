/** One application: run it, what it may do, its log, its values. */

import { Dialog } from "../../components/dialog.js";
import { Form } from "../../components/form.js";
import { RunPanel } from "../../components/run.js";
import { toast } from "../../components/toast.js";
import { Attention, Badge, Button, Card, Check, Empty, Failure, Icon, KeyValues, Loaded, Page, Select, Tabs } from "../../components/ui.js";
import { ROOT, AbortError, ask, client, events, maybe } from "../../core/api.js";
import { bytes, clock, duration, moment, number } from "../../core/format.js";
import { useAction, useLoad, usePoll } from "../../core/hooks.js";
import { html, useEffect, useRef, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { go, href, segment } from "../../core/router.js";
import { act, at } from "./actions.js";
import { State } from "./installed.js";
import { Enforced, Grants } from "./sheet.js";
import { limitWords, need, place } from "./words.js";

const TABS = ["run", "about", "logs", "settings"];

export function One({ name, tab, inner, query, onChange }) {
  const state = usePoll((signal) => ask("GET", at(name), { signal }), 2500, [name]);
  const app = state.data;
  const shown = TABS.includes(tab) ? tab : "run";
  const hasSettings = Object.keys(app?.config ?? {}).length > 0;
  const tabs = TABS.filter((id) => id !== "settings" || hasSettings).map((id) => ({ id, label: t(`apps.${id}`) }));
  const reload = () => {
    state.reload();
    onChange();
  };
  const subtitle = html`<span class="row"><a href="#/apps">${t("nav.apps")}</a>${app && html`<${State} app=${app} /><span>${app.version}</span>`}</span>`;
  return html`<${Page} title=${app?.title || name} subtitle=${subtitle} actions=${app && html`<${Actions} app=${app} reload=${reload} />`}>
    ${app?.summary && html`<p class="muted">${app.summary}</p>`}
    ${app?.error && html`<${Failure} error=${app.error} retry=${reload} />`}
    <${Tabs} tabs=${tabs} active=${shown} onChange=${(id) => go(`/apps/app/${segment(name)}/${id}`)} label=${name} />
    ${shown === "run" && html`<${Run} name=${name} inner=${inner} query=${query} model=${app?.model} />`}
    ${shown === "logs" && html`<${AppLog} name=${name} />`}
    ${(shown === "about" || shown === "settings") &&
    html`<${Loaded} state=${state}>${(one) => (shown === "about" ? html`<${About} app=${one} reload=${reload} />` : html`<${Settings} app=${one} reload=${reload} />`)}<//>`}
  <//>`;
}

/** A route per tab; the document is what the form is drawn from. */
function Run({ name, inner, query, model }) {
  const base = `${ROOT}/apps/${segment(name)}`;
  const state = useLoad((signal) => ask("GET", `/apps/${segment(name)}/app.json`, { signal }), [name]);
  return html`<${Loaded} state=${state}>
    ${(app) => {
      const route = app.routes.find((one) => one.name === inner) ?? app.routes[0];
      const tabs = app.routes.map((one) => ({ id: one.name, label: (one.summary || one.name).replace(/\.$/, "") }));
      const chat = (model ?? app.chat?.model) && html`<p><a class="button" href=${href("/chat", { model: model ?? app.chat.model })}><${Icon} name="chat" size=${16} />${t("apps.chat_with")}</a></p>`;
      return html`<div class="stack">
        ${chat}
        ${app.routes.length > 1 && html`<div class="routes"><${Tabs} tabs=${tabs} active=${route.name} onChange=${(id) => go(`/apps/app/${segment(name)}/run/${segment(id)}`)} label=${t("apps.routes")} /></div>`}
        ${route ? html`<${RunPanel} key=${route.name} ...${{ base, name, route, query }} />` : !chat && html`<${Empty} icon="apps" title=${t("apps.no_routes")} />`}
      </div>`;
    }}
  <//>`;
}

function Actions({ app, reload }) {
  const [dialog, setDialog] = useState(null);
  const [run, busy] = useAction(async (action, more) => {
    const found = await act(app.name, action, more);
    reload();
    if (!found) return;
    const done = { update: found.version === app.version ? "apps.is_newest" : "apps.updated", rollback: "apps.rolled_back" }[action];
    if (done) toast(t(done, { version: found.version }), { tone: "ok" });
  });
  const runs = ["running", "starting", "waiting"].includes(app.state);
  return html`
    ${runs
      ? html`<${Button} small icon="stop" busy=${busy} onClick=${() => run("stop")}>${t("word.stop")}<//>`
      : html`<${Button} small icon="play" busy=${busy} disabled=${app.state === "damaged"} onClick=${() => run("start")}>${t("apps.start")}<//>`}
    ${app.state === "running" && html`<${Button} small kind="quiet" icon="retry" disabled=${busy} onClick=${() => run("restart")}>${t("apps.restart")}<//>`}
    <${Button} small kind="quiet" icon="download" disabled=${busy} onClick=${() => run("update")}>${t("apps.update")}<//>
    ${app.versions.length > 1 && html`<${Button} small kind="quiet" icon="left" disabled=${busy} onClick=${() => setDialog("rollback")}>${t("apps.rollback")}<//>`}
    <${Button} small kind="quiet" icon="trash" disabled=${busy} onClick=${() => setDialog("remove")}>${t("apps.uninstall")}<//>
    ${dialog === "rollback" && html`<${Rollback} app=${app} onClose=${() => setDialog(null)} onChoose=${(version) => run("rollback", { version })} />`}
    ${dialog === "remove" && html`<${Remove} app=${app} onClose=${() => setDialog(null)} />`}
  `;
}

function Rollback({ app, onClose, onChoose }) {
  const others = app.versions.filter((one) => one !== app.version);
  const [version, setVersion] = useState(others.at(-1));
  const choose = () => {
    onClose();
    onChoose(version);
  };
  const footer = html`<span class="grow" /><${Button} onClick=${onClose}>${t("word.cancel")}<//><${Button} kind="primary" onClick=${choose}>${t("apps.rollback")}<//>`;
  return html`<${Dialog} title=${t("apps.rollback_title", { name: app.name })} onClose=${onClose} footer=${footer}>
    <${Select} options=${others} value=${version} onChange=${setVersion} aria-label=${t("apps.version")} />
  <//>`;
}

function Remove({ app, onClose }) {
  const [data, setData] = useState(false);
  const [remove, busy] = useAction(async () => {
    await ask("DELETE", at(app.name), { query: { data } });
    onClose();
    toast(t("apps.removed", { name: app.name }), { tone: "ok" });
    go("/apps");
  });
  const footer = html`<span class="grow" /><${Button} onClick=${onClose} autofocus>${t("word.cancel")}<//><${Button} kind="danger" busy=${busy} onClick=${remove}>${t("apps.uninstall")}<//>`;
  return html`<${Dialog} title=${t("apps.uninstall_title", { name: app.name })} onClose=${onClose} footer=${footer}>
    <p>${t("apps.uninstall_text")}</p>
    <${Check} label=${t("apps.delete_data")} hint=${t("apps.delete_data_hint")} value=${data} onChange=${setData} />
  <//>`;
}

function About({ app, reload }) {
  const { use, last_exit: exit } = app;
  const facts = [
    [t("apps.version"), app.version],
    [t("apps.versions"), app.versions.length > 1 ? app.versions.join(", ") : null],
    [t("apps.license"), app.license],
    [t("apps.publisher"), app.publisher ? html`<code class="break">${app.publisher}</code>` : t("apps.unsigned")],
    [t("apps.source"), app.source && html`<span class="break">${place(app.source)}</span>`],
    [t("apps.installed_at"), app.installed && moment(app.installed)],
    [t("apps.as_model"), app.model && html`<code>${app.model}</code>`],
    ...Object.entries(app.models ?? {}).map(([name, wanted]) => [t("apps.needs_model", { name }), need(wanted)]),
  ];
  const now = use && [
    [t("apps.since"), moment(use.started)],
    [t("apps.calls_total"), `${number(use.calls)}${use.running_calls ? ` (${t("apps.calls_now", { n: use.running_calls })})` : ""}`],
    [t("apps.limit_memory"), of(use.memory, app.limits.memory, bytes)],
    [t("apps.cpu_time"), duration(use.cpu_seconds)],
    [t("apps.limit_processes"), of(use.processes, app.limits.processes, number)],
    [t("apps.limit_disk"), of(use.disk, app.limits.disk, bytes)],
  ];
  return html`<div class="about">
    <${Card} title=${t("apps.permissions")}><${Grants} all=${app.permissions} /><${Enforced} rows=${app.enforced} /><//>
    <div class="stack">
      ${exit && html`<${Exit} exit=${exit} retryAt=${app.retry_at} />`}
      <${Card} title=${t("apps.now")}>${now ? html`<${KeyValues} pairs=${now} />` : html`<p class="muted">${t(app.state === "idle" ? "apps.idle_hint" : "apps.not_running")}</p>`}<//>
      <${Usage} app=${app} />
      <${Card} title=${t("apps.limits")}><${KeyValues} pairs=${limitWords(app.limits)} /><//>
      <${Card} title=${t("apps.details")}><${KeyValues} pairs=${facts} /><//>
    </div>
  </div>`;
}

const of = (value, limit, shown) => (limit ? `${shown(value)} / ${shown(limit)}` : shown(value));

function Exit({ exit, retryAt }) {
  return html`<${Card} title=${t("apps.last_exit")}>
    <p class="row"><${Badge} tone=${exit.reason === "exited" && !exit.code ? undefined : "bad"}>${exit.reason}${exit.code ? ` ${exit.code}` : ""}<//><span class="muted">${moment(exit.at)}</span></p>
    ${retryAt && html`<${Attention}>${t("apps.retry_at", { time: clock(retryAt) })}<//>`}
    ${exit.log.length > 0 && html`<pre class="log short" tabindex="0">${exit.log.join("\n")}</pre>`}
  <//>`;
}

/** Tokens of the last days by the application's own key. */
function Usage({ app }) {
  const since = new Date(Date.now() - 7 * 86400_000).toISOString().slice(0, 10);
  const state = useLoad((signal) => (app.key_id ? maybe(client().access.usage({ key_id: app.key_id, since, signal })) : Promise.resolve(null)), [app.key_id]);
  const rows = (state.data ?? []).filter((row) => row.key_id === app.key_id);
  if (!rows.length) return null;
  const sum = (name) => rows.reduce((total, row) => total + (row[name] ?? 0), 0);
  const pairs = [
    [t("apps.requests"), number(sum("requests"))],
    [t("apps.prompt_tokens"), number(sum("prompt_tokens"))],
    [t("apps.output_tokens"), number(sum("output_tokens"))],
  ];
  return html`<${Card} title=${t("apps.usage_week")}><${KeyValues} pairs=${pairs} /><//>`;
}

/** The values that a user sets, as a form: its entries are written as a schema. */
function Settings({ app, reload }) {
  const [values, setValues] = useState({});
  const [save, busy] = useAction(async () => {
    await ask("PATCH", at(app.name), { body: { config: values } });
    setValues({});
    toast(t("apps.saved"), { tone: "ok" });
    reload();
  });
  const schema = { type: "object", properties: {}, required: [] };
  for (const [name, entry] of Object.entries(app.config)) {
    schema.properties[name] = entrySchema(entry);
    if (entry.required && !entry.is_set) schema.required.push(name);
  }
  const submit = (event) => {
    event.preventDefault();
    save();
  };
  return html`<form class="stack settings" onSubmit=${submit}>
    <${Form} schema=${schema} values=${values} onChange=${setValues} prefix="c" />
    <div class="row"><${Button} type="submit" kind="primary" busy=${busy} disabled=${!Object.keys(values).length}>${t("word.save")}<//></div>
  </form>`;
}

function entrySchema({ type, label, description, default: initial, value, choices, minimum, maximum, is_set: isSet }) {
  const words = [label, description, type === "secret" && isSet ? t("apps.secret_set") : ""].filter(Boolean).join(" · ");
  const common = { description: words || undefined, default: value ?? initial ?? undefined };
  if (type === "number") return { type: "number", minimum: minimum ?? undefined, maximum: maximum ?? undefined, ...common };
  if (type === "bool") return { type: "boolean", ...common };
  if (type === "choice") return { enum: choices, ...common };
  return { type: "string", maxLength: maximum ?? 120, format: type === "secret" ? "password" : undefined, ...common };
}

function AppLog({ name }) {
  const [lines, setLines] = useState([]);
  const [error, setError] = useState(null);
  const [text, setText] = useState("");
  const box = useRef(null);
  useEffect(() => {
    const { signal, ...ended } = abortable();
    setLines([]);
    const read = async () => {
      for await (const event of events("GET", at(name, "/logs"), { query: { follow: true, limit: 500 }, signal })) {
        const line = JSON.parse(event.data);
        setLines((old) => [...old, line].slice(-2000));
      }
    };
    read().catch((e) => signal.aborted || e instanceof AbortError || setError(e));
    return ended.abort;
  }, [name]);
  useEffect(() => {
    if (box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [lines]);
  const shown = lines.filter((line) => line.text.toLowerCase().includes(text.toLowerCase()));
  return html`<div class="stack">
    <input class="input" type="search" value=${text} placeholder=${t("apps.filter")} aria-label=${t("apps.filter")} onInput=${(event) => setText(event.target.value)} />
    ${error && html`<${Failure} error=${error} />`}
    <div class="log mono" ref=${box} tabindex="0" role="log" aria-live="off" aria-label=${t("apps.logs")}>
      ${!shown.length && html`<p class="muted">${t("apps.no_log")}</p>`}
      ${shown.map((line, i) => html`<div key=${i} class=${`log-line log-${line.stream}`}><span class="muted">${clock(line.time)}</span> ${line.text}</div>`)}
    </div>
  </div>`;
}

function abortable() {
  const controller = new AbortController();
  return { signal: controller.signal, abort: () => controller.abort() };
}
