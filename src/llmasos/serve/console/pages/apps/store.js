/** What could be installed: the applications of the server's indexes. */

import { Attention, Badge, Button, Empty, Icon, Input, KeyValues, Loaded, Select } from "../../components/ui.js";
import { Dialog } from "../../components/dialog.js";
import { ask } from "../../core/api.js";
import { bytes, moment } from "../../core/format.js";
import { useLoad } from "../../core/hooks.js";
import { html, useEffect, useRef, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { useCommands } from "../../core/keys.js";
import { go, href, segment, setQuery } from "../../core/router.js";
import { act, install, said } from "./actions.js";
import { FromFile } from "./installed.js";
import { BUNDLED, place } from "./words.js";

export function Store({ query, onChange }) {
  const words = query.q ?? "";
  const [settled, setSettled] = useState(words);
  const box = useRef(null);
  useEffect(() => {
    const timer = setTimeout(() => setSettled(words), 200);
    return () => clearTimeout(timer);
  }, [words]);
  useCommands([{ id: "store-search", label: t("apps.search"), keys: "/", run: () => box.current?.focus() }], []);
  const state = useLoad((signal) => ask("GET", "/llmasos/v1/store", { query: { query: settled || undefined }, signal }), [settled]);
  const done = () => {
    state.reload();
    onChange();
  };
  return html`<div class="stack">
    <div class="row nowrap">
      <${Input} type="search" inputRef=${box} class="grow" value=${words} onChange=${(q) => setQuery({ q })} placeholder=${t("apps.search")} aria-label=${t("apps.search")} />
      <${FromFile} onDone=${done} />
    </div>
    <${Loaded} state=${state}>
      ${({ indexes, data, faults }) => html`
        ${faults.map((one) => html`<${Attention} key=${one.index} tone="bad">${t("apps.index_fault", { index: one.index })} ${one.message}<//>`)}
        ${!indexes.length && html`<${Empty} icon="apps" title=${t("apps.no_index")}>${t("apps.no_index_hint")}<//>`}
        ${indexes.length > 0 && !data.length && html`<${Empty} icon="search" title=${t("apps.none_found")} />`}
        <ul class="grid plain">${data.map((app) => html`<${Offer} key=${app.name} app=${app} onDone=${done} />`)}</ul>
        ${indexes.length > 0 && html`<p class="muted small break">${t("apps.from_indexes")} ${indexes.map(place).join(", ")}</p>`}
        ${query.app && html`<${Facts} app=${data.find((one) => one.name === query.app)} onDone=${done} />`}
      `}
    <//>
  </div>`;
}

/** The button that fits: install, update, or open what is here. */
function Get({ app, version = app.version, onDone }) {
  const [busy, setBusy] = useState(false);
  const work = async (make) => {
    setBusy(true);
    const found = await said(make)();
    setBusy(false);
    onDone();
    if (found && !app.installed) go(`/apps/app/${segment(app.app)}/run`);
  };
  if (!app.installed) {
    const reference = version === app.version ? app.name : `${app.name}==${version}`;
    return html`<${Button} kind="primary" small icon="download" busy=${busy} onClick=${() => work(() => install(reference))} aria-label=${`${t("apps.install")} ${app.name}`}>${t("apps.install")}<//>`;
  }
  if (app.installed !== app.version) {
    return html`<${Button} kind="primary" small icon="download" busy=${busy} onClick=${() => work(() => act(app.app, "update"))}>${t("apps.update_to", { version: app.version })}<//>`;
  }
  return html`<a class="button button-small" href=${href(`/apps/app/${segment(app.app)}/run`)}><${Icon} name="play" size=${15} />${t("word.open")}</a>`;
}

function Offer({ app, onDone }) {
  return html`<li class="card app-card">
    <div class="row nowrap">
      <h2 class="grow truncate">${app.name}</h2>
      ${app.installed && html`<${Badge} tone=${app.installed === app.version ? "ok" : "accent"}>${t("apps.have", { version: app.installed })}<//>`}
    </div>
    <p class="clamp">${app.summary}</p>
    <p class="muted small numbers">${app.version} · ${app.license} · ${bytes(app.size)}${app.index === BUNDLED ? ` · ${t("apps.bundled")}` : app.key_id ? "" : ` · ${t("apps.unsigned")}`}</p>
    <div class="row app-links"><${Get} app=${app} onDone=${onDone} /><span class="grow"></span>
      <${Button} small kind="quiet" onClick=${() => setQuery({ app: app.name })} aria-label=${`${t("apps.details")} ${app.name}`}>${t("apps.details")}<//></div>
  </li>`;
}

function Facts({ app, onDone }) {
  const [version, setVersion] = useState(app?.version);
  if (!app) return null;
  const close = () => setQuery({ app: null });
  const one = app.versions.find((each) => each.version === version) ?? app.versions[0];
  const options = app.versions.map((each) => ({ value: each.version, label: each.yanked ? `${each.version} (${t("apps.yanked_short")})` : each.version }));
  const pairs = [
    [t("apps.license"), app.license],
    [t("apps.publisher"), app.key_id ? html`<code class="break">${app.key_id}</code>` : t("apps.unsigned")],
    [t("apps.size"), bytes(one.size)],
    [t("apps.published"), one.published && moment(one.published)],
    [t("apps.source"), html`<span class="break">${place(app.index)}</span>`],
    [t("apps.have_installed"), app.installed],
  ];
  const footer = html`<span class="grow" /><${Button} onClick=${close}>${t("word.close")}<//><${Get} app=${app} version=${version} onDone=${onDone} />`;
  return html`<${Dialog} title=${app.name} onClose=${close} footer=${footer}>
    <p>${app.summary}</p>
    <${Select} options=${options} value=${version} onChange=${setVersion} aria-label=${t("apps.version")} />
    ${one.yanked && html`<${Attention} tone="bad">${t("apps.yanked")} ${one.yanked}<//>`}
    <${KeyValues} pairs=${pairs} />
  <//>`;
}
