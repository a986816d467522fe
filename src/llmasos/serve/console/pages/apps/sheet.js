/** The permission sheet: what a package asks for, in clear words, before it may run. */

import { Dialog } from "../../components/dialog.js";
import { Attention, Badge, Button, Details, Icon, KeyValues } from "../../components/ui.js";
import { html, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { BUNDLED, grantWords, limitWords, marked, need, place, promise } from "./words.js";

/** `onAnswer(accept)`: the sheet's own `accept`, or null. */
export function Sheet({ sheet, onAnswer }) {
  const [busy, setBusy] = useState(false);
  const isUpdate = Boolean(sheet.previous);
  const agree = () => {
    setBusy(true);
    onAnswer(sheet.accept);
  };
  const title = t(isUpdate ? "apps.sheet_update" : "apps.sheet_install", { name: sheet.name, version: sheet.version });
  const footer = html`
    <span class="grow" />
    <${Button} onClick=${() => onAnswer(null)} autofocus>${t("word.cancel")}<//>
    <${Button} kind="primary" icon="check" busy=${busy} onClick=${agree}>${t(isUpdate ? "apps.accept_update" : "apps.accept_install")}<//>
  `;
  const pairs = [
    [t("apps.license"), sheet.license],
    [t("apps.publisher"), sheet.publisher ? html`<code class="break">${sheet.publisher}</code>` : t("apps.unsigned")],
    [t("apps.source"), html`<span class="break">${place(sheet.source)}</span>`],
    ...Object.entries(sheet.models ?? {}).map(([name, wanted]) => [t("apps.needs_model", { name }), need(wanted)]),
    ...limitWords(sheet.resources),
  ];
  return html`<${Dialog} title=${title} onClose=${() => onAnswer(null)} footer=${footer} class="sheet">
    <p>${sheet.summary}</p>
    ${sheet.yanked && html`<${Attention} tone="bad">${t("apps.yanked")} ${sheet.yanked}<//>`}
    ${!sheet.publisher && sheet.source !== BUNDLED && html`<${Attention}>${t("apps.unsigned_hint")}<//>`}
    <section class="stack">
      <h3>${isUpdate ? t("apps.asks_more", { previous: sheet.previous }) : t("apps.asks")}</h3>
      <${Grants} all=${sheet.permissions} asked=${sheet.asked} isUpdate=${isUpdate} />
    </section>
    ${Object.keys(sheet.config ?? {}).length > 0 && html`<p class="muted">${t("apps.asks_config")} ${Object.keys(sheet.config).join(", ")}</p>`}
    <${Enforced} rows=${sheet.enforced} />
    <${Details} summary=${t("apps.details")}><${KeyValues} pairs=${pairs} /><//>
  <//>`;
}

/** Sentences, what is new first and marked. */
export function Grants({ all, asked = [], isUpdate = false }) {
  if (!all.length) return html`<p class="grant"><${Icon} name="shield" /> ${t("apps.asks_nothing")}</p>`;
  return html`<ul class="grants">
    ${marked(all, isUpdate ? asked : []).map(({ grant, isNew }) => {
      const { text, icon, isWide } = grantWords(grant);
      return html`<li key=${`${grant.kind} ${grant.value}`} class=${`grant${isNew ? " grant-new" : ""}`}>
        <${Icon} name=${icon} /><span class="grow break">${text}</span>
        ${isNew && html`<${Badge} tone="warn">${t("apps.is_new")}<//>`}${isWide && !isNew && html`<${Badge} tone="warn">${t("apps.is_wide")}<//>`}
      </li>`;
    })}
  </ul>`;
}

/** One line where everything holds; else what does not, by name. */
export function Enforced({ rows }) {
  if (!rows?.length) return null;
  const open = rows.filter((row) => !row.by.length);
  const list = html`<ul class="promises">
    ${rows.map(
      (row) => html`<li key=${row.what} class="row"><${Icon} name=${row.by.length ? "check" : "warn"} size=${15} /><span class="grow">${promise(row.what)}</span>
        <span class="muted small">${row.by.length ? row.by.join(", ") : t("apps.not_enforced")}</span></li>`,
    )}
  </ul>`;
  return html`<div class="stack">
    ${open.length
      ? html`<${Attention}>${t("apps.not_enforced_here")} ${open.map((row) => promise(row.what)).join(", ")}<//>`
      : html`<p class="muted row"><${Icon} name="shield" size=${16} /> ${t("apps.all_enforced")}</p>`}
    <${Details} summary=${t("apps.enforced", { n: rows.length - open.length, all: rows.length })}>${list}<//>
  </div>`;
}
