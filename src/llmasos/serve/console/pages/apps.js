/** Apps: what is installed and how it does, what could be, and running them. */

import { Page, Tabs } from "../components/ui.js";
import { ask } from "../core/api.js";
import { usePoll } from "../core/hooks.js";
import { html } from "../core/html.js";
import { t } from "../core/i18n.js";
import { go } from "../core/router.js";
import { API } from "./apps/actions.js";
import { Installed } from "./apps/installed.js";
import { One } from "./apps/one.js";
import { Store } from "./apps/store.js";

export const styles = ["components/form.css", "pages/apps.css"];

/** #/apps, #/apps/store, #/apps/app/NAME/(run|about|logs|settings)/ROUTE */
export default function Apps({ route }) {
  const [view = "installed", name, tab = "run", inner] = route.path;
  const state = usePoll(async (signal) => (await ask("GET", API, { signal })).data, 3000, []);
  if (view === "app" && name) return html`<${One} key=${name} ...${{ name, tab, inner, query: route.query }} onChange=${state.reload} />`;
  const at = view === "store" ? "store" : "installed";
  const tabs = [
    { id: "installed", label: t("apps.installed"), count: state.data?.length || undefined },
    { id: "store", label: t("apps.store") },
  ];
  return html`<${Page} title=${t("nav.apps")}>
    <${Tabs} tabs=${tabs} active=${at} onChange=${(id) => go(id === "store" ? "/apps/store" : "/apps")} label=${t("nav.apps")} />
    ${at === "store" ? html`<${Store} query=${route.query} installed=${state.data ?? []} onChange=${state.reload} />` : html`<${Installed} state=${state} />`}
  <//>`;
}
