/** What the server does at this moment, and what waits for somebody. */

import { confirm } from "../../components/dialog.js";
import { Attention, Badge, Button, Calm, Card, Loaded, Table } from "../../components/ui.js";
import { client } from "../../core/api.js";
import { duration, number } from "../../core/format.js";
import { useAction } from "../../core/hooks.js";
import { html } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { href, segment } from "../../core/router.js";
import { TONES, isActive, wanting } from "./facts.js";
import { JobTable, jobName } from "./jobs.js";

export function Now({ state }) {
  return html`<${Loaded} state=${state}>${(data) => html`<${Everything} ...${data} reload=${state.reload} />`}<//>`;
}

function Everything({ requests, jobs, runs, faults, reload }) {
  const open = wanting({ jobs, runs, faults });
  const active = (jobs ?? []).filter(isActive);
  const working = (runs ?? []).filter((run) => run.state === "running");
  const isIdle = !requests.length && !active.length && !working.length;
  return html`<div class="stack">
    ${open.map((one, i) => html`<${Wanting} key=${i} ...${one} />`)}
    ${isIdle && !open.length && html`<${Calm}>${t("activity.calm")}<//>`}
    ${isIdle && open.length > 0 && html`<p class="muted">${t("activity.idle")}</p>`}
    ${requests.length > 0 && html`<${Card} title=${t("activity.requests", { n: requests.length })}><${Requests} requests=${requests} reload=${reload} /><//>`}
    ${active.length > 0 && html`<${Card} title=${t("activity.jobs")}><${JobTable} jobs=${active} reload=${reload} /><//>`}
    ${working.length > 0 &&
    html`<${Card} title=${t("activity.traces")}>
      ${working.map((run) => html`<a key=${run.id} class="truncate" href=${href(`/activity/traces/${segment(run.id)}`)}>${run.input || run.id}</a>`)}
    <//>`}
  </div>`;
}

function Wanting({ what, job, run, line }) {
  if (what === "approval") {
    const link = href(`/activity/traces/${segment(run.id)}`);
    return html`<${Attention} action=${html`<a href=${link}>${t("word.open")}</a>`}>${t("activity.wants_approval", { name: run.agent })}<//>`;
  }
  if (what === "error") {
    const link = href("/activity/logs", { level: "error" });
    return html`<${Attention} tone="bad" action=${html`<a href=${link}>${t("activity.logs")}</a>`}>${t("activity.wants_error")} ${line.message.slice(0, 200)}<//>`;
  }
  const link = href(`/activity/jobs/${segment(job.id)}`);
  const text = t(`activity.wants_${what}`, { name: jobName(job) });
  return html`<${Attention} tone=${what === "failed" ? "bad" : "warn"} action=${html`<a href=${link}>${t("word.open")}</a>`}>${text} ${job.error?.message ?? ""}<//>`;
}

function Requests({ requests, reload }) {
  const [cancel] = useAction(async (id) => {
    if (!(await confirm({ title: t("activity.end_request"), text: t("activity.end_request_text"), action: t("activity.end"), danger: true }))) return;
    await client().native.cancelRequest(id);
    reload();
  });
  const columns = [
    { key: "state", label: t("word.state"), render: (row) => html`<${Badge} tone=${TONES[row.state]}>${t(`activity.state_${row.state}`)}<//>` },
    { key: "route", label: t("activity.route"), render: (row) => html`<code>${row.route}</code>` },
    { key: "model", label: t("word.model"), render: (row) => row.model ?? "–" },
    { key: "key", label: t("activity.key"), render: (row) => row.key ?? "–", narrow: false },
    { key: "tokens", label: t("activity.tokens"), align: "end", render: (row) => `${number(row.num_prompt_tokens)} → ${number(row.num_output_tokens)}` },
    { key: "age", label: t("activity.age"), align: "end", render: (row) => duration(row.age_seconds) },
    { key: "actions", render: (row) => html`<${Button} small kind="quiet" icon="stop" aria-label=${`${t("activity.end")} ${row.id}`} onClick=${() => cancel(row.id)}>${t("activity.end")}<//>` },
  ];
  return html`<${Table} columns=${columns} rows=${requests} label=${t("activity.requests", { n: requests.length })} />`;
}
