/** Runs of agents, step by step: what the model said, which tools it called, what came back, and how long each took. */

import { Code } from "../../components/code.js";
import { confirm } from "../../components/dialog.js";
import { Markdown } from "../../components/markdown.js";
import { Attention, Badge, Button, Calm, Card, Details, Empty, Failure, KeyValues, Loaded, Table } from "../../components/ui.js";
import { ask } from "../../core/api.js";
import { ago, duration, moment, number } from "../../core/format.js";
import { useAction, usePoll } from "../../core/hooks.js";
import { html } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { href, segment } from "../../core/router.js";
import { TONES, timeline } from "./facts.js";

const pathOf = (id, more = "") => `/llmasos/v1/agents/runs/${segment(id)}${more}`;
const State = ({ run }) => html`<${Badge} tone=${TONES[run.state]}>${t(`activity.state_${run.state}`)}<//>`;

export function Traces({ state, rest }) {
  if (rest[0]) return html`<${OneRun} key=${rest[0]} id=${rest[0]} />`;
  return html`<${Loaded} state=${state}>
    ${({ runs }) => (runs?.length ? html`<${Runs} runs=${runs} />` : html`<${Calm}>${t("activity.no_runs")}<//>`)}
  <//>`;
}

function Runs({ runs }) {
  const columns = [
    { key: "state", label: t("word.state"), render: (run) => html`<${State} run=${run} />` },
    { key: "input", label: t("activity.asked"), width: "50%", render: (run) => html`<a class="clamp" href=${href(`/activity/traces/${segment(run.id)}`)}>${run.input || run.id}</a>` },
    { key: "model", label: t("word.model"), render: (run) => run.model },
    { key: "created", label: t("word.time"), narrow: false, render: (run) => html`<time datetime=${run.created} title=${moment(run.created)}>${ago(run.created)}</time>` },
  ];
  return html`<${Table} columns=${columns} rows=${runs} label=${t("activity.traces")} />`;
}

function OneRun({ id }) {
  const state = usePoll((signal) => ask("GET", pathOf(id), { signal }), 2000, [id]);
  return html`<${Loaded} state=${state}>${(run) => html`<${Run} run=${run} reload=${state.reload} />`}<//>`;
}

function Run({ run, reload }) {
  const [cancel, busy] = useAction(async () => {
    if (!(await confirm({ title: t("activity.end_run"), action: t("activity.end"), danger: true }))) return;
    await ask("POST", pathOf(run.id, "/cancel"));
    reload();
  });
  const isOpen = run.state === "running" || run.state === "requires_action";
  const actions = html`<${State} run=${run} />${isOpen && html`<${Button} small kind="danger" icon="stop" busy=${busy} onClick=${cancel}>${t("activity.end")}<//>`}`;
  const asked = run.messages.slice(0, run.num_given).findLast((one) => one.role === "user")?.content;
  const pairs = [
    [t("word.model"), run.model],
    [t("activity.tokens"), `${number(run.prompt_tokens)} → ${number(run.output_tokens)}`],
    [t("activity.took"), duration(run.seconds)],
    [t("activity.created"), moment(run.created)],
    ["id", html`<code>${run.id}</code>`],
  ];
  return html`<div class="stack">
    <${Card} title=${run.agent} actions=${actions}>
      ${asked && html`<blockquote class="asked">${typeof asked === "string" ? asked : JSON.stringify(asked)}</blockquote>`}
      ${run.stop && html`<${Attention}>${run.stop.message}<//>`}
      ${run.error && html`<${Failure} error=${[run.error.message, run.error.hint].filter(Boolean).join(" ")} />`}
      ${run.notices.map((text) => html`<${Attention} key=${text} tone="accent">${text}<//>`)}
      ${run.text && html`<${Markdown} text=${run.text} />`}
      <${KeyValues} pairs=${pairs} />
    <//>
    <${Timeline} run=${run} />
    ${run.steps.length ? run.steps.map((step) => html`<${Step} key=${step.number} step=${step} pending=${run.pending} />`) : html`<${Empty} icon="clock" title=${t("activity.no_steps")} />`}
    ${run.state === "requires_action" && html`<${Approvals} run=${run} reload=${reload} />`}
  </div>`;
}

function Timeline({ run }) {
  const bar = ({ left, width }) => ({ left: `${left * 100}%`, width: `${Math.min(width, 1 - left) * 100}%` });
  return html`<div class="timeline" aria-hidden="true">
    ${timeline(run).map(
      (step) => html`<div key=${step.number} class="timeline-row">
        <div class="timeline-step" style=${bar(step)} title=${String(step.number)}></div>
        ${step.calls.map((call, i) => html`<div key=${i} class="timeline-call" style=${bar(call)} title=${call.name}></div>`)}
      </div>`,
    )}
  </div>`;
}

function Step({ step, pending }) {
  const words = step.kind === "summary" ? t("activity.step_summary") : t("activity.step", { n: number(step.number) });
  return html`<${Card} title=${words} actions=${html`<span class="muted small numbers">${duration(step.seconds)} · ${number(step.prompt_tokens)} → ${number(step.output_tokens)}</span>`}>
    ${step.num_hidden > 0 && html`<p class="muted small">${t("activity.hidden", { n: step.num_hidden })}</p>`}
    ${step.reasoning && html`<${Details} summary=${t("activity.reasoning")}><div class="plain-text">${step.reasoning}</div><//>`}
    ${step.text && html`<div class="plain-text">${step.text}</div>`}
    ${step.calls.map((call) => html`<${Call} key=${call.id} call=${call} isWaiting=${pending.includes(call.id)} />`)}
    ${step.finish_reason === "length" && html`<${Attention}>${t("activity.cut")}<//>`}
  <//>`;
}

function Call({ call, isWaiting }) {
  const tone = isWaiting ? "warn" : call.is_error || call.approval === "denied" ? "bad" : "ok";
  const summary = html`<span class="row call"><code>${call.name}</code><${Badge} tone=${tone}>${isWaiting ? t("activity.waits") : call.is_error ? t("activity.state_failed") : duration(call.seconds)}<//>
    ${["approved", "always", "denied"].includes(call.approval) && html`<span class="muted small">${t(`activity.approval_${call.approval}`)}</span>`}</span>`;
  return html`<${Details} summary=${summary} open=${isWaiting || call.is_error}>
    <${Code} text=${pretty(call.arguments)} label=${t("activity.arguments")} />
    ${call.result !== null && html`<${Code} text=${pretty(call.result)} label=${t("form.result")} />`}
  <//>`;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function Approvals({ run, reload }) {
  const waiting = run.steps.flatMap((step) => step.calls).filter((call) => run.pending.includes(call.id));
  const [decide, busy] = useAction(async (approve) => {
    const decisions = Object.fromEntries(waiting.map((call) => [call.id, { approve }]));
    await ask("POST", pathOf(run.id, "/continue"), { body: { decisions } });
    reload();
  });
  if (!waiting.length) return null;
  const names = waiting.map((call) => call.name).join(", ");
  return html`<${Attention} action=${html`<${Button} small busy=${busy} onClick=${() => decide(false)}>${t("activity.deny")}<//><${Button} small kind="primary" busy=${busy} onClick=${() => decide(true)}>${t("activity.approve")}<//>`}>
    ${t("activity.may_call", { names })}
  <//>`;
}
