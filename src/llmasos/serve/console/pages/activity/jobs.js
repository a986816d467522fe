/** Jobs of all kinds: work that goes on without its request. */

import { confirm } from "../../components/dialog.js";
import { Result } from "../../components/result.js";
import { Attention, Badge, Button, Calm, Card, Failure, KeyValues, Loaded, Progress, Table, Tabs } from "../../components/ui.js";
import { ask } from "../../core/api.js";
import { ago, moment, percent } from "../../core/format.js";
import { useAction } from "../../core/hooks.js";
import { html } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { href, segment, setQuery } from "../../core/router.js";
import { TONES, isActive } from "./facts.js";
import { Training } from "./training.js";

const KINDS = ["pull", "task_batch", "pipeline", "fine_tuning", "package_check", "app"];
const kindOf = (job) => (KINDS.includes(job.kind) ? t(`activity.kind_${job.kind}`) : job.kind);
export const jobName = (job) => `${kindOf(job)} ${job.name}`;
const pathOf = (job, action = "") => `/llmasos/v1/jobs/${segment(job.id)}${action && `/${action}`}`;

export function Jobs({ state, rest, query }) {
  if (state.data && state.data.jobs === null) return html`<${Attention}>${t("activity.no_jobs_here")}<//>`;
  return html`<${Loaded} state=${state}>
    ${({ jobs }) => {
      const one = rest[0] && jobs.find((job) => job.id === rest[0]);
      if (rest[0]) return html`<${OneJob} job=${one} reload=${state.reload} />`;
      const kinds = [...new Set(jobs.map((job) => job.kind))];
      const shown = jobs.filter((job) => !query.kind || job.kind === query.kind);
      const tabs = [{ id: "", label: t("word.all") }, ...kinds.map((id) => ({ id, label: kindOf({ kind: id }) }))];
      return html`<div class="stack">
        ${kinds.length > 1 && html`<${Tabs} tabs=${tabs} active=${query.kind ?? ""} onChange=${(kind) => setQuery({ kind })} label=${t("activity.kind")} />`}
        <${JobTable} jobs=${shown} reload=${state.reload} empty=${html`<${Calm}>${t("activity.no_jobs")}<//>`} />
      </div>`;
    }}
  <//>`;
}

export function JobTable({ jobs, reload, empty }) {
  const columns = [
    { key: "state", label: t("word.state"), render: (job) => html`<${State} job=${job} />` },
    { key: "name", label: t("activity.job"), render: (job) => html`<a href=${href(`/activity/jobs/${segment(job.id)}`)}>${job.name || job.id}</a><div class="muted small">${kindOf(job)}</div>` },
    { key: "progress", label: t("word.progress"), width: "34%", render: (job) => html`<${HowFar} job=${job} />` },
    { key: "updated", label: t("activity.changed"), narrow: false, render: (job) => html`<time datetime=${job.updated} title=${moment(job.updated)}>${ago(job.updated)}</time>` },
    { key: "actions", align: "end", render: (job) => html`<${Actions} job=${job} reload=${reload} small />` },
  ];
  return html`<${Table} columns=${columns} rows=${jobs} empty=${empty} label=${t("activity.jobs")} />`;
}

const State = ({ job }) => html`<${Badge} tone=${TONES[job.state]}>${t(`activity.state_${job.state}`)}<//>`;

function HowFar({ job }) {
  if (job.error) return html`<span class="field-error break">${job.error.message}</span>`;
  const hasBar = isActive(job) || (job.state === "paused" && job.progress !== null);
  return html`<div class="stack how-far">
    ${hasBar && html`<${Progress} value=${job.progress} label=${jobName(job)} tone=${job.state === "paused" ? "warn" : undefined} />`}
    <span class="muted small truncate">${hasBar && job.progress !== null ? `${percent(job.progress)} ` : ""}${job.message}</span>
  </div>`;
}

function Actions({ job, reload, small }) {
  const [act, busy] = useAction(async (action) => {
    const question = { title: t("activity.cancel_job"), text: t("activity.cancel_job_text", { name: jobName(job) }), action: t("activity.cancel"), danger: true };
    if (action === "cancel" && !(await confirm(question))) return;
    await ask("POST", pathOf(job, action));
    reload();
  });
  const goesOn = isActive(job);
  const canResume = job.state === "paused" || (job.state === "failed" && job.can_pause);
  const button = (action, icon) =>
    html`<${Button} small=${small} kind="quiet" icon=${icon} disabled=${busy} aria-label=${`${t(`activity.${action}`)} ${job.name}`} onClick=${() => act(action)}>${t(`activity.${action}`)}<//>`;
  return html`<div class="row nowrap job-actions">
    ${goesOn && job.can_pause && button("pause", "pause")}${canResume && button("resume", "play")}
    ${(goesOn || canResume) && button("cancel", "close")}
  </div>`;
}

function OneJob({ job, reload }) {
  if (!job) return html`<${Attention}>${t("activity.job_gone")}<//>`;
  const pairs = [
    [t("activity.kind"), kindOf(job)],
    ["id", html`<code>${job.id}</code>`],
    [t("activity.created"), moment(job.created)],
    [t("activity.changed"), moment(job.updated)],
  ];
  return html`<${Card} title=${job.name || job.id} actions=${html`<${State} job=${job} /><${Actions} job=${job} reload=${reload} small />`}>
    <${HowFar} job=${{ ...job, error: null }} />
    ${job.error && html`<${Failure} error=${[job.error.message, job.error.hint].filter(Boolean).join(" ")} />`}
    ${job.kind === "fine_tuning" && html`<${Training} key=${`${job.id} ${isActive(job)}`} job=${job} />`}
    <${KeyValues} pairs=${pairs} />
    ${job.result !== null && job.result !== undefined && html`<h3>${t("form.result")}</h3><${Result} value=${job.result} />`}
  <//>`;
}
