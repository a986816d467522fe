/** The applications that are here. */

import { Attention, Badge, Empty, Icon, Loaded } from "../../components/ui.js";
import { bytes, number } from "../../core/format.js";
import { html, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { go, href, segment } from "../../core/router.js";
import { said, upload } from "./actions.js";
import { STATES } from "./words.js";

export const State = ({ app }) => html`<${Badge} tone=${STATES[app.state]}>${t(`apps.state_${app.state}`)}<//>`;
const page = (app, tab) => href(`/apps/app/${segment(app.name)}/${tab}`);

export function Installed({ state }) {
  return html`<${Loaded} state=${state}>
    ${(apps) =>
      apps.length
        ? html`<div class="stack">
            <ul class="grid plain">${apps.map((app) => html`<${AppCard} key=${app.name} app=${app} />`)}</ul>
            <div class="row"><${FromFile} onDone=${state.reload} /></div>
          </div>`
        : html`<${Empty} icon="apps" title=${t("apps.none")} action=${html`<div class="row"><a class="button button-primary" href="#/apps/store">${t("apps.to_store")}</a><${FromFile} onDone=${state.reload} /></div>`}>${t("apps.none_hint")}<//>`}
  <//>`;
}

function AppCard({ app }) {
  const { use } = app;
  return html`<li class="card app-card">
    <div class="row nowrap">
      <h2 class="grow truncate"><a href=${page(app, "run")}>${app.title || app.name}</a></h2>
      <${State} app=${app} />
    </div>
    <p class="muted clamp">${app.error ? html`<span class="field-error">${app.error}</span>` : app.summary}</p>
    <p class="muted small numbers">
      <code>${app.name}</code> ${app.version}${use ? ` · ${bytes(use.memory)} · ${t("apps.calls", { n: number(use.calls) })}` : ""}
    </p>
    ${app.num_crashes > 1 && html`<${Attention} tone="bad">${t("apps.crashes", { n: app.num_crashes })}<//>`}
    <div class="row app-links">
      <a class="button button-small" href=${page(app, "run")}><${Icon} name="play" size=${15} />${t("form.run")}</a>
      ${app.model && html`<a class="button button-small" href=${href("/chat", { model: app.model })}><${Icon} name="chat" size=${15} />${t("nav.chat")}</a>`}
      <span class="grow"></span>
      <a class="small" href=${page(app, "about")}>${t("apps.about")}</a>
      <a class="small" href=${page(app, "logs")}>${t("apps.logs")}</a>
    </div>
  </li>`;
}

/** Installs a package that lies on this computer. */
export function FromFile({ onDone }) {
  const [busy, setBusy] = useState(false);
  const choose = async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    setBusy(true);
    const app = await said(upload)(file);
    setBusy(false);
    onDone();
    if (app) go(`/apps/app/${segment(app.name)}/run`);
  };
  return html`<label class="button">
    <${Icon} name="upload" size=${16} />${t("apps.from_file")}${busy ? " …" : ""}
    <input type="file" class="visually-hidden" accept=".llmapp" disabled=${busy} onChange=${choose} />
  </label>`;
}
