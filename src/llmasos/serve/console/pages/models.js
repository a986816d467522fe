/** Models: on the server's disk, in its memory, and those that can be pulled. */

import { confirm } from "../components/dialog.js";
import { Icon } from "../components/icon.js";
import { toast } from "../components/toast.js";
import { Attention, Badge, Button, Calm, Card, Empty, IconButton, Input, Loaded, Page, Progress, Table, Tabs } from "../components/ui.js";
import { client } from "../core/api.js";
import { ago, bytes, percent } from "../core/format.js";
import { useAction, useLoad, usePoll } from "../core/hooks.js";
import { html, useState } from "../core/html.js";
import { t } from "../core/i18n.js";
import { useCommands } from "../core/keys.js";
import { go, href, segment, setQuery } from "../core/router.js";
import { LoadBar, One, StateBadge } from "./models/one.js";

export const styles = ["pages/models.css"];

const TABS = ["installed", "running", "catalog"];
const OPEN = ["waiting", "running", "paused", "failed"];

async function look(signal) {
  const { native } = client();
  const [installed, status, pulls] = await Promise.all([native.models({ signal }), native.status({ signal }), native.pulls({ signal })]);
  return { installed, status, pulls };
}

export default function Models({ route }) {
  const state = usePoll(look, 2000, []);
  const tab = TABS.includes(route.query.tab) ? route.query.tab : "installed";
  const { installed = [], status = [], pulls = [] } = state.data ?? {};
  const running = status.filter((one) => one.state !== "absent");
  const tabs = [
    { id: "installed", label: t("models.installed"), count: state.data && installed.length },
    { id: "running", label: t("models.running"), count: state.data && running.length },
    { id: "catalog", label: t("models.catalog") },
  ];
  const show = (id) => setQuery({ tab: id === "installed" ? null : id });
  useCommands([...TABS.map((id) => ({ id: `models-${id}`, label: t(`models.show_${id}`), run: () => show(id) })),
    { id: "models-pull", label: t("models.pull_other"), keys: "p", run: () => { show("catalog"); setTimeout(() => document.getElementById("pull-ref")?.focus(), 100); } }], [t("models.installed")]);
  const open = route.path[0];
  return html`<${Page} title=${t("nav.models")}>
    <${Loaded} state=${state}>${() => html`
      <${Wants} ...${{ installed, status, pulls, reload: state.reload }} />
      <${Pulls} pulls=${pulls} reload=${state.reload} />
      <${Tabs} tabs=${tabs} active=${tab} onChange=${show} label=${t("nav.models")} />
      ${tab === "installed" && html`<${Installed} models=${installed} status=${status} reload=${state.reload} onCatalog=${() => show("catalog")} />`}
      ${tab === "running" && html`<${Running} status=${status} reload=${state.reload} />`}
      ${tab === "catalog" && html`<${Catalog} pulls=${pulls} reload=${state.reload} query=${route.query.q ?? ""} />`}
    `}<//>
    ${open && html`<${One} key=${open} name=${open} installed=${installed.find((one) => one.name === open)} status=${status.find((one) => one.name === open)}
      reload=${state.reload} onClose=${() => go("/models", route.query)} />`}
  <//>`;
}

/** What needs a decision; one line when nothing does. */
function Wants({ installed, status, pulls, reload }) {
  const damaged = installed.filter((one) => one.error);
  const failed = status.filter((one) => one.last_error && one.state !== "ready");
  const stuck = pulls.filter((one) => one.state === "failed" || one.state === "paused");
  const [load] = useAction(async (name) => (await client().native.load(name), reload()));
  if (!damaged.length && !failed.length && !stuck.length) return html`<${Calm} />`;
  return html`<div class="stack wants">
    ${damaged.map((one) => html`<${Attention} tone="bad" key=${one.name} action=${html`<a class="button button-small" href=${href(`/models/${segment(one.name)}`)}>${t("word.open")}</a>`}>${one.name}: ${one.error}<//>`)}
    ${failed.map((one) => html`<${Attention} tone="bad" key=${one.name} action=${html`<${Button} small icon="retry" onClick=${() => load(one.name)}>${t("word.retry")}<//>`}>${one.name}: ${one.last_error}<//>`)}
    ${stuck.length > 0 && html`<${Attention}>${t("models.stuck", { n: stuck.length })}<//>`}
  </div>`;
}

function Pulls({ pulls, reload }) {
  const shown = pulls.filter((one) => OPEN.includes(one.state));
  if (!shown.length) return null;
  return html`<${Card} title=${t("models.pulls")}>${shown.map((job) => html`<${Pull} key=${job.id} job=${job} reload=${reload} />`)}<//>`;
}

function Pull({ job, reload }) {
  const [act, busy] = useAction(async (what) => {
    const { native } = client();
    if (what === "cancel" && !(await confirm({ title: t("models.cancel_pull", { name: job.name }), text: t("models.cancel_pull_text"), action: t("models.give_up"), danger: true }))) return;
    await { pause: native.pausePull, resume: native.resumePull, cancel: native.cancelPull }[what].call(native, job.id);
    reload();
  });
  const goes = job.state === "running" || job.state === "waiting";
  const share = job.total ? job.done / job.total : goes ? null : 0;
  const figures = job.total ? `${bytes(job.done)} / ${bytes(job.total)} · ${percent(share)}` : "";
  return html`<div class="pull">
    <div class="row"><strong class="truncate">${job.name}</strong>
      <${Badge} tone=${{ failed: "bad", paused: "warn", running: "accent" }[job.state]}>${t(`models.pull_${job.state}`)}<//>
      <span class="grow small muted truncate">${job.message || job.file}</span>
      <span class="small muted numbers">${figures}</span>
      ${goes && html`<${IconButton} small icon="pause" label=${t("models.pause", { name: job.name })} disabled=${busy} onClick=${() => act("pause")} />`}
      ${!goes && html`<${IconButton} small icon="play" label=${t("models.resume", { name: job.name })} disabled=${busy} onClick=${() => act("resume")} />`}
      <${IconButton} small icon="close" label=${t("models.cancel_pull", { name: job.name })} disabled=${busy} onClick=${() => act("cancel")} />
    </div>
    <${Progress} value=${share} label=${job.name} tone=${{ failed: "bad", paused: "warn" }[job.state]} />
    ${job.error && html`<div class="field-error">${job.error}</div>`}
  </div>`;
}

function Installed({ models, status, reload, onCatalog }) {
  const empty = html`<${Empty} icon="models" title=${t("models.none")} action=${html`<${Button} kind="primary" icon="download" onClick=${onCatalog}>${t("models.to_catalog")}<//>`}>${t("models.none_hint")}<//>`;
  const columns = [
    { key: "name", label: t("word.name"), render: (one) => html`<a class="strong" href=${href(`/models/${segment(one.name)}`)}>${one.name}</a>
        <div class="small muted">${[one.architecture, one.format].filter(Boolean).join(" · ")}</div>` },
    { key: "use", label: t("models.use"), narrow: false, render: (one) => html`<${Badge}>${one.use ?? "–"}<//>` },
    { key: "state", label: t("word.state"), render: (one) => html`<${StateBadge} one=${status.find((other) => other.name === one.name) ?? one} />` },
    { key: "size", label: t("models.size"), align: "end", render: (one) => bytes(one.size) },
    { key: "actions", align: "end", render: (one) => html`<${Actions} one=${one} state=${status.find((other) => other.name === one.name)} reload=${reload} />` },
  ];
  return html`<${Table} columns=${columns} rows=${models} empty=${empty} label=${t("models.installed")} />`;
}

function Actions({ one, state, reload }) {
  const [act, busy] = useAction(async (work) => (await work(client().native), reload()));
  const isUp = state?.state === "ready" || state?.state === "loading";
  return html`<span class="row nowrap end-row">
    ${one.use !== "embedding" && !one.error && html`<a class="button button-small button-quiet icon-button" href=${href("/chat", { model: one.name })} aria-label=${t("models.chat", { name: one.name })} title=${t("models.chat", { name: one.name })}><${ChatIcon} /></a>`}
    ${isUp
      ? html`<${IconButton} small icon="pin" label=${t(state.pinned ? "models.unpin" : "models.pin", { name: one.name })} aria-pressed=${state.pinned ? "true" : "false"} disabled=${busy} onClick=${() => act((native) => native.pin(one.name, !state.pinned))} />
          <${Button} small busy=${busy} onClick=${() => act((native) => native.unload(one.name))}>${t("models.unload")}<//>`
      : html`<${Button} small busy=${busy} disabled=${Boolean(one.error)} onClick=${() => act((native) => native.load(one.name))}>${t("models.load")}<//>`}
  </span>`;
}

const ChatIcon = () => html`<${Icon} name="chat" size=${15} />`;

function Running({ status, reload }) {
  const up = status.filter((one) => one.state !== "absent");
  const gone = status.filter((one) => one.state === "absent" && one.why_evicted);
  const total = (sizes) => Object.values(sizes).reduce((a, b) => a + b, 0);
  const columns = [
    { key: "name", label: t("word.name"), render: (one) => html`<a class="strong" href=${href(`/models/${segment(one.name)}`)}>${one.name}</a><${LoadBar} loading=${one.loading} />` },
    { key: "state", label: t("word.state"), render: (one) => html`<${StateBadge} one=${one} />` },
    { key: "memory", label: t("models.memory"), align: "end", render: (one) => html`${bytes(total(one.measured_bytes) || total(one.predicted_bytes))}<div class="small muted">${Object.keys(one.predicted_bytes).join(", ")}</div>` },
    { key: "busy", label: t("models.requests"), align: "end", narrow: false, render: (one) => `${one.busy}${one.waiting ? ` + ${one.waiting}` : ""}` },
    { key: "cache", label: t("models.cache"), align: "end", narrow: false, render: (one) => percent(one.kv_cache_usage) },
    { key: "until", label: t("models.until"), narrow: false, render: (one) => (one.pinned ? t("models.pinned") : one.expires_at ? ago(one.expires_at) : t("models.stays")) },
    { key: "actions", align: "end", render: (one) => html`<${Actions} one=${one} state=${one} reload=${reload} />` },
  ];
  return html`<div class="stack">
    <${Table} columns=${columns} rows=${up} empty=${html`<${Empty} icon="models" title=${t("models.none_running")}>${t("models.none_running_hint")}<//>`} label=${t("models.running")} />
    ${gone.length > 0 && html`<${Card} title=${t("models.gone")}><ul class="plain">
      ${gone.map((one) => html`<li key=${one.name}><strong>${one.name}</strong> <span class="muted">${one.why_evicted}</span></li>`)}
    </ul><//>`}
  </div>`;
}

function Catalog({ pulls, reload, query }) {
  const state = useLoad((signal) => client().native.catalog({ query, signal }), [query, pulls.filter((one) => one.state === "done").length]);
  const [reference, setReference] = useState("");
  const [pull, busy] = useAction(async (model) => {
    await client().native.startPull(model);
    toast(t("models.pull_begun", { name: model }), { tone: "ok" });
    reload();
    return true;
  });
  const submit = async (event) => {
    event.preventDefault();
    if (await pull(reference.trim())) setReference("");
  };
  const goes = (name) => pulls.some((one) => one.name === name && OPEN.includes(one.state));
  const columns = [
    { key: "name", label: t("word.name"), render: (one) => html`<a class="strong" href=${href(`/models/${segment(one.name)}`, { tab: "catalog", q: query })}>${one.name}</a>
        <div class="small muted break">${one.upstream}</div>` },
    { key: "use", label: t("models.use"), render: (one) => html`<${Badge}>${one.use}<//>` },
    { key: "languages", label: t("models.languages"), narrow: false, render: (one) => html`<span class="small">${one.languages.slice(0, 4).join(", ")}${one.languages.length > 4 ? " …" : ""}</span>` },
    { key: "licence", label: t("models.licence"), narrow: false, render: (one) => html`<span class="small">${one.licence}</span>` },
    { key: "actions", align: "end", render: (one) => one.installed
        ? html`<${Badge} tone="ok">${t("models.here")}<//>`
        : html`<${Button} small icon="download" disabled=${busy || goes(one.name)} onClick=${() => pull(one.name)}>${t("models.pull")}<//>` },
  ];
  return html`<div class="stack">
    <div class="row catalog-bar">
      <${Input} type="search" class="grow" value=${query} onChange=${(q) => setQuery({ q })} placeholder=${t("models.search")} aria-label=${t("models.search")} />
      <form class="row nowrap grow" onSubmit=${submit}>
        <${Input} id="pull-ref" value=${reference} onChange=${setReference} placeholder=${t("models.reference")} aria-label=${t("models.reference")} />
        <${Button} type="submit" icon="download" busy=${busy} disabled=${!reference.trim()}>${t("models.pull")}<//>
      </form>
    </div>
    <${Loaded} state=${state}>${(found) => html`<${Table} columns=${columns} rows=${found} label=${t("models.catalog")} empty=${html`<${Empty} icon="search" title=${t("models.none_found")} />`} />`}<//>
  </div>`;
}
