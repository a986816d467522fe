/** The page of one application by itself, which `app.run()` serves at /docs: its routes as forms. */

import { Questions } from "./components/dialog.js";
import { RunPanel } from "./components/run.js";
import { Toasts } from "./components/toast.js";
import { Empty, Loaded, Page, Select, Tabs } from "./components/ui.js";
import { useLoad } from "./core/hooks.js";
import { html, render } from "./core/html.js";
import { LANGUAGES, language, loadLanguage, setLanguage, t, useLanguage } from "./core/i18n.js";
import { onKey } from "./core/keys.js";
import { route as currentRoute, go, segment, useRoute } from "./core/router.js";

/** The application's URL: this file is one folder below it. */
const base = new URL("..", import.meta.url).href.replace(/\/$/, "");

async function describe(signal) {
  const answer = await fetch(`${base}/app.json`, { signal });
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  return answer.json();
}

function Application() {
  const state = useLoad(describe, []);
  const now = useLanguage();
  const languages = Object.entries(LANGUAGES).map(([value, label]) => ({ value, label }));
  const actions = html`<a href=${`${base}/openapi.json`}>OpenAPI</a>
    <${Select} aria-label=${t("language.choose")} value=${language()} onChange=${setLanguage} options=${languages} />`;
  const { title = t("word.loading"), version } = state.data ?? {};
  return html`<main class="single" key=${now}>
      <${Page} title=${title} subtitle=${version} actions=${actions}>
        <${Loaded} state=${state}>${(app) => html`<${Routes} app=${app} />`}<//>
      <//>
    </main>
    <${Questions} /><${Toasts} />`;
}

/** #/apps/ROUTE?in=INPUTS */
function Routes({ app }) {
  const { path, query } = useRoute();
  const route = app.routes.find((one) => one.name === path[0]) ?? app.routes[0];
  if (!route) return html`<${Empty} icon="apps" title=${t("apps.no_routes")} />`;
  const tabs = app.routes.map((one) => ({ id: one.name, label: (one.summary || one.name).replace(/\.$/, "") }));
  return html`<div class="stack">
    ${tabs.length > 1 && html`<div class="routes"><${Tabs} tabs=${tabs} active=${route.name} onChange=${(id) => go(`/apps/${segment(id)}`)} label=${t("apps.routes")} /></div>`}
    <${RunPanel} key=${route.name} base=${base} name="app.py" route=${route} query=${path[0] === route.name || !path[0] ? query : {}} />
  </div>`;
}

// A link's path must be one that the router keeps when it changes the query.
if (currentRoute().page !== "apps") go("/apps", {}, { replace: true });
await loadLanguage();
addEventListener("keydown", onKey);
render(html`<${Application} />`, document.getElementById("app"));
