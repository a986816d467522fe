/** Keys: who may use the server and how much; what they have used. */

import { Code } from "../../components/code.js";
import { Dialog, confirm } from "../../components/dialog.js";
import { Attention, Badge, Button, Check, Details, Empty, Field, IconButton, Input, Loaded, Select, Table } from "../../components/ui.js";
import { client } from "../../core/api.js";
import { ago, moment, number } from "../../core/format.js";
import { useAction, useLoad } from "../../core/hooks.js";
import { html, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";

const LIMITS = ["requests_per_minute", "tokens_per_minute", "requests_per_day", "tokens_per_day", "tokens_per_month", "max_parallel"];
const SCOPES = ["inference", "manage", "publish"];
const TONES = { active: "ok", expired: "warn", revoked: undefined };

async function look(signal) {
  const { access } = client();
  const since = new Date(Date.now() - 6 * 86_400_000).toISOString().slice(0, 10);
  const [keys, usage] = await Promise.all([access.keys({ signal }), access.usage({ since, signal })]);
  const used = {};
  for (const one of usage) {
    const sum = (used[one.key_id] ??= { requests: 0, tokens: 0 });
    sum.requests += one.requests;
    sum.tokens += one.prompt_tokens + one.output_tokens;
  }
  return { keys, used };
}

export function Keys() {
  const state = useLoad(look, []);
  const [making, setMaking] = useState(false);
  const [all, setAll] = useState(false);
  const [revoke, busy] = useAction(async (key) => {
    if (!(await confirm({ title: t("system.revoke_named", { name: key.name }), text: t("system.revoke_text"), action: t("system.revoke"), danger: true }))) return;
    await client().access.revokeKey(key.id);
    state.reload();
  });
  const limits = (key) => LIMITS.filter((name) => key[name]).map((name) => html`<${Badge} key=${name}>${number(key[name])} ${t(`system.short_${name}`)}<//> `);
  const columns = [
    { key: "name", label: t("word.name"), render: (key) => html`<strong>${key.name}</strong><div class="small muted mono">${key.id}</div>` },
    { key: "state", label: t("word.state"), render: (key) => html`<${Badge} tone=${TONES[key.state]}>${t(`system.key_${key.state}`)}<//>` },
    { key: "scopes", label: t("system.scopes"), render: (key) => key.scopes.join(", ") },
    { key: "limits", label: t("system.limits"), narrow: false, render: (key) => (LIMITS.some((name) => key[name]) ? limits(key) : html`<span class="muted">${t("word.none")}</span>`) },
    { key: "used", label: t("system.week"), align: "end", narrow: false, render: (key) => {
        const sum = state.data.used[key.id];
        return sum ? html`${t("system.requests", { n: sum.requests })}<div class="small muted">${t("system.tokens", { n: sum.tokens })}</div>` : "–";
      } },
    { key: "last", label: t("system.last_used"), narrow: false, render: (key) => (key.last_used ? html`<span title=${moment(key.last_used)}>${ago(key.last_used)}</span>` : t("word.never")) },
    { key: "actions", align: "end", render: (key) => key.state === "active" && html`<${IconButton} small icon="trash" label=${t("system.revoke_named", { name: key.name })} disabled=${busy} onClick=${() => revoke(key)} />` },
  ];
  return html`<div class="stack">
    <div class="row"><p class="muted grow">${t("system.keys_hint")}</p>
      <${Check} label=${t("system.show_revoked")} value=${all} onChange=${setAll} />
      <${Button} kind="primary" icon="plus" onClick=${() => setMaking(true)}>${t("system.new_key")}<//></div>
    <${Loaded} state=${state}>${({ keys }) => html`<${Table} columns=${columns} rows=${keys.filter((key) => all || key.state !== "revoked")} label=${t("system.keys")}
      empty=${html`<${Empty} icon="key" title=${t("system.no_keys")}>${t("system.no_keys_hint")}<//>`} />`}<//>
    ${making && html`<${Make} onClose=${() => (setMaking(false), state.reload())} />`}
  </div>`;
}

const DAYS = ["", "7", "30", "90", "365"];

function Make({ onClose }) {
  const [values, setValues] = useState({ scopes: ["inference"] });
  const [made, setMade] = useState(null);
  const set = (name) => (value) => setValues({ ...values, [name]: value });
  const [make, busy] = useAction(async (event) => {
    event.preventDefault();
    const { name, scopes, days, models, apps } = values;
    const fields = { scopes };
    for (const limit of LIMITS) if (values[limit]) fields[limit] = Number(values[limit]);
    if (days) fields.expires = new Date(Date.now() + Number(days) * 86_400_000).toISOString();
    for (const [field, text] of Object.entries({ models, apps })) if (text?.trim()) fields[field] = text.split(",").map((one) => one.trim()).filter(Boolean);
    setMade(await client().access.createKey(name.trim(), fields));
  });
  if (made) {
    return html`<${Dialog} title=${t("system.key_made", { name: made.name })} onClose=${onClose} footer=${html`<span class="grow" /><${Button} kind="primary" onClick=${onClose}>${t("word.close")}<//>`}>
      <${Attention}>${t("system.key_once")}<//><${Code} text=${made.key} label=${t("login.key")} />
    <//>`;
  }
  const footer = html`<span class="grow" /><${Button} onClick=${onClose}>${t("word.cancel")}<//>
    <${Button} kind="primary" type="submit" form="new-key" busy=${busy} disabled=${!values.name?.trim() || !values.scopes.length}>${t("system.make")}<//>`;
  return html`<${Dialog} title=${t("system.new_key")} onClose=${onClose} footer=${footer}>
    <form id="new-key" class="stack" onSubmit=${make}>
      <${Field} label=${t("word.name")}><${Input} value=${values.name} onChange=${set("name")} autofocus required maxlength="100" /><//>
      <fieldset class="plain-set"><legend class="label">${t("system.scopes")}</legend>
        ${SCOPES.map((one) => html`<${Check} key=${one} label=${one} hint=${t(`system.scope_${one}`)} value=${values.scopes.includes(one)}
          onChange=${(isOn) => set("scopes")(isOn ? [...values.scopes, one] : values.scopes.filter((other) => other !== one))} />`)}
      </fieldset>
      <${Field} label=${t("system.expires")}><${Select} value=${values.days ?? ""} onChange=${set("days")} options=${DAYS.map((value) => ({ value, label: value ? t("system.days", { n: Number(value) }) : t("word.never") }))} /><//>
      <${Details} summary=${t("system.limits")}><div class="grid">
        ${LIMITS.map((name) => html`<${Field} key=${name} label=${t(`system.${name}`)}><${Input} type="number" min="1" value=${values[name]} onChange=${set(name)} placeholder=${t("word.none")} /><//>`)}
        <${Field} label=${t("system.only_models")} hint=${t("system.patterns")}><${Input} value=${values.models} onChange=${set("models")} placeholder=${t("word.all")} /><//>
        <${Field} label=${t("system.only_apps")} hint=${t("system.patterns")}><${Input} value=${values.apps} onChange=${set("apps")} placeholder=${t("word.all")} /><//>
      </div><//>
    </form>
  <//>`;
}
