/** One model: what it needs for a context, what it does now, what can be done with it. */

import { Dialog, confirm } from "../../components/dialog.js";
import { toast } from "../../components/toast.js";
import { Attention, Badge, Button, Card, Failure, Field, KeyValues, Progress, Select, Slider, Spinner } from "../../components/ui.js";
import { client } from "../../core/api.js";
import { ago, bytes, duration, moment, number, percent } from "../../core/format.js";
import { useAction, useLoad } from "../../core/hooks.js";
import { html, useEffect, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { go, href } from "../../core/router.js";

const TONES = { ready: "ok", loading: "accent", stopping: "warn", failed: "bad" };

export const StateBadge = ({ one }) => {
  if (one.error) return html`<${Badge} tone="bad">${t("models.damaged")}<//>`;
  return html`<${Badge} tone=${TONES[one.state]}>${t(`models.state_${one.state}`)}<//>${one.pinned && html` <${Badge} tone="accent">${t("models.pinned")}<//>`}`;
};

export function LoadBar({ loading }) {
  if (!loading) return null;
  const share = loading.total ? loading.done / loading.total : loading.expected_seconds ? Math.min(0.97, loading.seconds / loading.expected_seconds) : null;
  return html`<div class="load-bar"><${Progress} value=${share} label=${t("models.state_loading")} /><span class="small muted">${loading.phase}</span></div>`;
}

export function One({ name, installed, status, reload, onClose }) {
  const [act, busy] = useAction(async (work) => (await work(client().native), reload()));
  const remove = async () => {
    const text = t("models.remove_text", { size: bytes(installed.size) });
    if (!(await confirm({ title: t("models.remove_named", { name }), text, action: t("word.delete"), danger: true }))) return;
    await act(async (native) => {
      const gone = await native.remove(name);
      toast(t("models.removed", { name, size: bytes(gone.freed_bytes) }), { tone: "ok" });
      onClose();
    });
  };
  const keep = (seconds) => act((native) => native.load(name, { keep_alive: Number(seconds) }));
  const isUp = status && status.state !== "absent" && status.state !== "failed";
  const pull = () => act(async (native) => {
    await native.startPull(name);
    onClose();
  });
  const footer = installed
    ? html`<${Button} kind="danger" icon="trash" disabled=${busy} onClick=${remove}>${t("word.delete")}<//><span class="grow" />
        ${isUp && html`<${Button} icon="pin" busy=${busy} onClick=${() => act((native) => native.pin(name, !status.pinned))}>${t(status.pinned ? "models.unpin_short" : "models.pin_short")}<//>
          <${Button} busy=${busy} onClick=${() => act((native) => native.unload(name))}>${t("models.unload")}<//>`}
        ${!isUp && html`<${Button} kind="primary" busy=${busy} disabled=${Boolean(installed.error)} onClick=${() => act((native) => native.load(name))}>${t("models.load")}<//>`}`
    : html`<span class="grow" /><${Button} kind="primary" icon="download" busy=${busy} onClick=${pull}>${t("models.pull")}<//>`;
  return html`<${Dialog} side title=${name} onClose=${onClose} footer=${footer}>
    ${installed?.error && html`<${Attention} tone="bad">${installed.error}<//>`}
    ${status?.last_error && html`<${Attention} tone="bad">${status.last_error}<//>`}
    <${Plan} name=${name} />
    ${isUp && html`<${Now} status=${status} />`}
    ${isUp && !status.pinned && html`<${Field} label=${t("models.keep")} hint=${t("models.keep_hint")}>
      <${Select} value=${String(status.keep_alive ?? -1)} onChange=${keep} disabled=${busy} options=${stays(status.keep_alive)} /><//>`}
    ${status?.why_evicted && html`<div><h3>${t("models.why_evicted")}</h3><p class="muted">${status.why_evicted}</p></div>`}
    ${installed && html`<${KeyValues} pairs=${[
      [t("models.use"), installed.use],
      [t("models.architecture"), installed.architecture],
      [t("models.format"), installed.format],
      [t("models.size"), bytes(installed.size)],
      [t("models.licence"), installed.licence],
      [t("models.source"), html`<code>${installed.source}</code>`],
      [t("models.since"), moment(installed.created)],
      [t("models.notice"), installed.notice],
    ]} />`}
    ${installed && installed.use !== "embedding" && html`<a class="button" href=${href("/chat", { model: name })}>${t("models.chat", { name })}</a>`}
  <//>`;
}

const Now = ({ status }) => html`<div><h3 class="row">${t("models.now")} <${StateBadge} one=${status} /></h3><${LoadBar} loading=${status.loading} />
  <${KeyValues} pairs=${[
    [t("models.memory"), Object.entries(status.measured_bytes).map(([device, n]) => `${bytes(n)} ${device}`).join(", ")],
    [t("models.predicted"), Object.entries(status.predicted_bytes).map(([device, n]) => `${bytes(n)} ${device}`).join(", ")],
    [t("models.context"), status.context_length && number(status.context_length)],
    [t("models.requests"), `${status.busy}${status.waiting ? ` + ${status.waiting}` : ""}`],
    [t("models.cache"), percent(status.kv_cache_usage)],
    [t("models.generated"), number(status.num_generated_tokens)],
    [t("models.load_time"), status.load_seconds && duration(status.load_seconds)],
    [t("models.until"), status.pinned ? t("models.pinned") : status.expires_at ? ago(status.expires_at) : t("models.stays")],
    [t("models.last_used"), status.last_used && ago(status.last_used)],
    [t("models.restarts"), status.restarts || null],
  ]} /></div>`;

const STAYS = [0, 60, 300, 1800, 3600, 86400];

/** How long a model may stay, in seconds, with what is in force. */
function stays(now) {
  const all = now === null || now === undefined || STAYS.includes(now) ? STAYS : [...STAYS, now].sort((a, b) => a - b);
  return [...all.map((value) => ({ value: String(value), label: value ? duration(value) : t("models.keep_none") })), { value: "-1", label: t("models.stays") }];
}

const NEXT = 350;

/** "Needs 5.1 of 7.4 GB" for the chosen context: at once by the last plan, a moment later by a new one. */
function Plan({ name }) {
  const [context, setContext] = useState(null);
  const [several, setSeveral] = useState("1");
  const [asked, setAsked] = useState({ context: null, several: 1 });
  useEffect(() => {
    const timer = setTimeout(() => setAsked({ context, several: Number(several) }), NEXT);
    return () => clearTimeout(timer);
  }, [context, several]);
  const fields = { concurrency: asked.several, ...(asked.context ? { context: asked.context } : {}) };
  const state = useLoad((signal) => client().native.plan(name, { ...fields, signal }), [name, asked.context, asked.several]);
  if (!state.data) return state.error ? html`<${Failure} error=${state.error} retry=${state.reload} />` : html`<div class="row muted"><${Spinner} /> ${t("models.planning")}</div>`;
  const plan = state.data;
  const now = context ?? plan.context;
  const cache = (plan.kv_cache_bytes / (plan.context * plan.concurrency)) * now * Number(several);
  const parts = [
    { id: "weights", bytes: plan.weights_bytes },
    { id: "kv", bytes: cache },
    { id: "work", bytes: plan.activation_bytes },
  ];
  const need = parts.reduce((sum, one) => sum + one.bytes, 0);
  const fits = need <= plan.memory_free;
  const whole = Math.max(need, plan.memory_free);
  return html`<${Card} class="plan">
    <div class="row"><strong class="grow" aria-live="polite">${t("models.needs", { need: bytes(need), free: bytes(plan.memory_free), device: plan.device })}</strong>
      ${state.loading && html`<${Spinner} />`}<${Badge} tone=${fits ? "ok" : "bad"}>${t(fits ? "models.fits" : "models.too_big")}<//></div>
    <div class="plan-bar" role="img" aria-label=${t("models.needs", { need: bytes(need), free: bytes(plan.memory_free), device: plan.device })}>
      ${parts.map((one) => html`<div key=${one.id} class=${`plan-${one.id} ${fits ? "" : "over"}`} style=${{ width: `${(one.bytes / whole) * 100}%` }} />`)}
    </div>
    <div class="row small legend">${parts.map((one) => html`<span key=${one.id}><i class=${`plan-${one.id}`} />${t(`models.part_${one.id}`)} ${bytes(one.bytes)}</span>`)}</div>
    <${Field} label=${html`<span class="grow">${t("models.context")}</span><span class="numbers">${t("models.context_tokens", { n: now })}</span>`}>
      <${Slider} min=${Math.min(128, plan.context_length)} max=${plan.context_length} step=${Math.min(128, plan.context_length)} value=${now} onChange=${setContext} />
    <//>
    <${Field} label=${t("models.at_once")} inline><${Select} value=${several} onChange=${setSeveral} options=${["1", "2", "4", "8", "16", "32"]} /><//>
    ${plan.download_bytes > 0 && html`<p class="small muted">${t("models.download", { size: bytes(plan.download_bytes), free: bytes(plan.disk_free) })}</p>`}
    ${!plan.fits_disk && html`<${Attention} tone="bad">${t("models.no_disk")}<//>`}
  <//>`;
}
