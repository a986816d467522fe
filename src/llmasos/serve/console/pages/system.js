/** System: the machine over time, what is loaded, who may use it, its settings and their check. */

import { Chart } from "../components/chart.js";
import { Attention, Badge, Calm, Card, Icon, KeyValues, Loaded, Page, Table, Tabs } from "../components/ui.js";
import { ask } from "../core/api.js";
import { bytes, duration, moment, number, percent } from "../core/format.js";
import { useLoad } from "../core/hooks.js";
import { html, useEffect } from "../core/html.js";
import { t } from "../core/i18n.js";
import { go, href, segment } from "../core/router.js";
import { useSignal } from "../core/store.js";
import { StateBadge } from "./models/one.js";
import { reload, samples, system, watchSystem } from "./system/history.js";
import { Keys } from "./system/keys.js";

export const styles = ["pages/models.css", "pages/system.css"];

const VIEWS = { overview: Overview, keys: Keys, doctor: Doctor };

export default function System({ route }) {
  const at = VIEWS[route.path[0]] ? route.path[0] : "overview";
  const tabs = Object.keys(VIEWS).map((id) => ({ id, label: t(`system.${id}`) }));
  const View = VIEWS[at];
  const logs = html`<a class="button" href=${href("/activity/logs")}><${Icon} name="activity" size=${16} />${t("system.logs")}</a>`;
  return html`<${Page} title=${t("nav.system")} actions=${logs}>
    <${Tabs} tabs=${tabs} active=${at} onChange=${(id) => go(id === "overview" ? "/system" : `/system/${id}`)} label=${t("nav.system")} />
    <${View} key=${at} />
  <//>`;
}

/** What is scarce on this machine. */
function warnings(data, status) {
  const found = [];
  if (data.disk_free < 5e9) found.push(t("system.little_disk", { free: bytes(data.disk_free) }));
  for (const one of data.devices) {
    if (one.memory_free !== null && one.memory_free < one.memory_total * 0.06) found.push(t("system.little_memory", { device: one.name, free: bytes(one.memory_free) }));
  }
  for (const one of status) if (one.state === "failed") found.push(`${one.name}: ${one.last_error}`);
  return found;
}

function Overview() {
  const state = useSignal(system);
  const seen = useSignal(samples);
  useEffect(watchSystem, []);
  return html`<${Loaded} state=${{ ...state, reload }}>${(data) => {
    const times = seen.map((one) => one.time);
    const lacks = warnings(data, state.status);
    return html`<div class="stack">
      ${lacks.length ? lacks.map((text) => html`<${Attention} key=${text}>${text}<//>`) : html`<${Calm} />`}
      <div class="grid charts">
        <${Graph} title=${t("system.cpu")} now=${percent(data.cpu_percent / 100)} about=${t("system.cores", { n: data.cpu_cores })} times=${times} values=${seen.map((one) => one.cpu)} max=${100} format=${(n) => `${n} %`} />
        ${data.devices.map((one) => {
          const used = one.memory_free === null ? null : one.memory_total - one.memory_free;
          return html`<${Graph} key=${one.name} title=${t(one.name === "cpu" ? "system.memory" : "system.gpu_memory", { name: one.name })} now=${bytes(used)} about=${t("system.of", { total: bytes(one.memory_total), kind: one.name === "cpu" ? "" : one.kind })}
            times=${times} values=${seen.map((sample) => sample.devices[one.name] ?? null)} max=${one.memory_total} format=${bytes} />`;
        })}
        <${Graph} title=${t("system.speed")} now=${t("system.per_second", { n: number(seen.at(-1)?.speed ?? 0, 1) })} about=${t("system.all_models")} times=${times} values=${seen.map((one) => one.speed)} format=${(n) => number(n, 1)} />
        <${Graph} title=${t("system.disk")} now=${bytes(data.disk_free)} about=${data.home} times=${times} values=${seen.map((one) => one.disk)} format=${bytes} />
      </div>
      <${LoadedModels} status=${state.status} />
      <${Card} title=${t("system.server")}><${KeyValues} pairs=${[
        [t("system.version"), `LLMasOS ${data.version} · Python ${data.python} · torch ${data.torch}`],
        [t("system.platform"), data.platform],
        [t("system.device"), `${data.device}, ${data.dtype}`],
        ...data.devices.filter((one) => one.budget_bytes).map((one) => [t("system.budget", { name: one.name }), bytes(one.budget_bytes)]),
        [t("system.up"), html`<span title=${moment(data.started)}>${duration(data.uptime_seconds)}</span>`],
        [t("system.own_memory"), bytes(data.memory_rss)],
        [t("system.home"), html`<code>${data.home}</code>`],
        [t("system.offline"), t(data.offline ? "word.yes" : "word.no")],
      ]} /><//>
    </div>`;
  }}<//>`;
}

const Graph = ({ title, now, about, ...chart }) => html`<${Card}>
  <div class="row"><h2 class="grow">${title}</h2><strong class="numbers">${now}</strong></div>
  <${Chart} ...${chart} lines=${[{ label: title, values: chart.values }]} label=${title} />
  <div class="small muted truncate" title=${about}>${about}</div>
<//>`;

function LoadedModels({ status }) {
  const total = (sizes) => Object.values(sizes).reduce((a, b) => a + b, 0);
  const up = status.filter((one) => one.state !== "absent");
  const columns = [
    { key: "name", label: t("word.model"), render: (one) => html`<a class="strong" href=${href(`/models/${segment(one.name)}`, { tab: "running" })}>${one.name}</a>` },
    { key: "state", label: t("word.state"), render: (one) => html`<${StateBadge} one=${one} />` },
    { key: "memory", label: t("models.memory"), align: "end", render: (one) => bytes(total(one.measured_bytes) || total(one.predicted_bytes)) },
    { key: "busy", label: t("models.requests"), align: "end", render: (one) => one.busy + one.waiting },
    { key: "tokens", label: t("models.generated"), align: "end", narrow: false, render: (one) => number(one.num_generated_tokens) },
  ];
  return html`<${Card} title=${t("models.running")}>
    <${Table} columns=${columns} rows=${up} label=${t("models.running")} empty=${html`<p class="muted">${t("models.none_running")}</p>`} />
  <//>`;
}

const CHECKS = { ok: "ok", warning: "warn", error: "bad" };

function Doctor() {
  const state = useLoad((signal) => ask("GET", "/llmasos/v1/doctor", { signal }), []);
  return html`<${Loaded} state=${state}>${({ checks, sandbox, settings }) => {
    const wrong = checks.filter((one) => one.status !== "ok");
    const open = sandbox.filter((one) => !one.by.length);
    return html`<div class="stack">
      ${wrong.length || open.length ? html`
        ${wrong.map((one) => html`<${Attention} key=${one.name} tone=${CHECKS[one.status]}>${t(`system.check_${one.name}`)}: ${one.detail}<//>`)}
        ${open.length > 0 && html`<${Attention}>${t("system.not_enforced", { what: open.map((one) => t(`system.what_${one.what}`)).join(", ") })}<//>`}` : html`<${Calm} />`}
      <div class="halves">
        <div class="stack"><${Card} title=${t("system.checks")}><${KeyValues} pairs=${checks.map((one) => [t(`system.check_${one.name}`), html`<${Badge} tone=${CHECKS[one.status]}>${t(`system.status_${one.status}`)}<//> ${one.detail}`])} /><//>
  <${Card} title=${t("system.settings")}><p class="muted small">${t("system.settings_hint")}</p>
          <${KeyValues} pairs=${Object.entries(settings).map(([name, value]) => [html`<code>${name}</code>`, value || html`<span class="muted">–</span>`])} /><//></div>
        <${Card} title=${t("system.sandbox")}><p class="muted small">${t("system.sandbox_hint")}</p>
          <${KeyValues} pairs=${sandbox.map((one) => [t(`system.what_${one.what}`), one.by.length ? html`<${Badge} tone="ok">${one.by.map((by) => t(`system.by_${by}`)).join(", ")}<//>` : html`<${Badge} tone="warn">${t("apps.not_enforced")}<//> <span class="small muted">${t(`system.why_${one.why}`)}</span>`])} /><//>
      </div>
    </div>`;
  }}<//>`;
}
