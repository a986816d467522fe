/** A training job: how its loss falls, the steps, what it told. */

import { Chart } from "../../components/chart.js";
import { Details, Failure, KeyValues } from "../../components/ui.js";
import { AbortError, events, key } from "../../core/api.js";
import { clock, number } from "../../core/format.js";
import { html, useEffect, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { segment } from "../../core/router.js";
import { useSignal } from "../../core/store.js";
import { curveOf } from "./facts.js";

const digits = (value) => number(value, 4);
const NOTES = 50;

/** All that has happened to a job, and what happens; a stream that breaks is begun again from the beginning. */
function useEvents(id) {
  const [found, setFound] = useState(null);
  const [error, setError] = useState(null);
  const [round, setRound] = useState(0);
  const inForce = useSignal(key);
  useEffect(() => {
    const controller = new AbortController();
    let all = [];
    let timer;
    const show = () => {
      timer = undefined;
      setFound(all.slice());
    };
    const follow = async () => {
      setError(null);
      for await (const { data } of events("GET", `/v1/fine_tuning/jobs/${segment(id)}/events`, { query: { stream: true }, signal: controller.signal })) {
        if (data === "[DONE]") break;
        all.push(JSON.parse(data));
        timer ??= setTimeout(show, 200); // the first ones are many
      }
      setFound(all);
    };
    follow().catch((e) => controller.signal.aborted || e instanceof AbortError || setError(e));
    return () => {
      clearTimeout(timer);
      controller.abort();
    };
  }, [id, round, inForce]);
  return { found, error, again: () => setRound((n) => n + 1) };
}

/** `key` it by the job and whether it goes on: a stream ends with its job. */
export function Training({ job }) {
  const { found, error, again } = useEvents(job.id);
  if (!found) return error ? html`<${Failure} error=${error} retry=${again} />` : null;
  const { steps, train, valid, last } = curveOf(found);
  const lines = [{ label: t("activity.loss_train"), values: train }, ...(valid.some((one) => one !== null) ? [{ label: t("activity.loss_valid"), values: valid }] : [])];
  const pairs = last && [
    [t("activity.train_step"), t("activity.train_step_of", { step: last.step, total: last.total_steps })],
    [t("activity.loss_train"), digits(last.train_loss)],
    [t("activity.loss_valid"), last.valid_loss === undefined ? null : digits(last.valid_loss)],
    [t("activity.learning_rate"), last.learning_rate?.toExponential(2)],
    [t("activity.trained_tokens"), number(last.trained_tokens)],
  ];
  const notes = found.filter((event) => event.type === "message").slice(-NOTES);
  return html`<div class="stack training">
    ${error && html`<${Failure} error=${error} retry=${again} />`}
    ${steps.length > 0
      ? html`<div class="row small curve-legend" aria-hidden="true">${lines.map((one, i) => html`<span key=${one.label}><i class=${`line-${i}`} />${one.label}</span>`)}</div>
          <${Chart} steps fitted times=${steps} lines=${lines} format=${digits} label=${t("activity.loss")} height=${180} />`
      : html`<p class="muted">${t("activity.no_steps_yet")}</p>`}
    ${pairs && html`<${KeyValues} pairs=${pairs} />`}
    <${Details} summary=${t("activity.told", { n: notes.length })}>
      <ul class="plain">${notes.map((event) => html`<li key=${event.id}><span class="muted small numbers">${clock(event.created_at * 1000)}</span> ${event.message}</li>`)}</ul>
    <//>
  </div>`;
}
