/** Playground: every endpoint, and what models make of a text. */

import { Page, Tabs } from "../components/ui.js";
import { client } from "../core/api.js";
import { useLoad } from "../core/hooks.js";
import { html } from "../core/html.js";
import { t } from "../core/i18n.js";
import { go } from "../core/router.js";
import { Endpoints } from "./playground/endpoints.js";
import { Logprobs } from "./playground/logprobs.js";
import { Similarity } from "./playground/similarity.js";
import { Tokens } from "./playground/tokenizer.js";

export const styles = ["components/form.css", "pages/playground.css"];

const VIEWS = { endpoints: Endpoints, tokens: Tokens, logprobs: Logprobs, similarity: Similarity };

export default function Playground({ route }) {
  const at = VIEWS[route.path[0]] ? route.path[0] : "endpoints";
  const View = VIEWS[at];
  const models = useLoad(async (signal) => (await client().models({ signal })).map(named), []);
  const tabs = Object.keys(VIEWS).map((id) => ({ id, label: t(`playground.${id}`) }));
  return html`<${Page} title=${t("nav.playground")}>
    <${Tabs} tabs=${tabs} active=${at} onChange=${(id) => go(`/playground/${id}`)} label=${t("nav.playground")} />
    <${View} key=${at} query=${route.query} rest=${route.path.slice(1)} models=${models.data ?? []} isLoading=${models.loading} />
  <//>`;
}

/** {id, can(capability)}; servers of other kinds tell nothing of capabilities. */
function named({ id, capabilities, context_length: context }) {
  const has = Array.isArray(capabilities) ? (name) => capabilities.includes(name) : (name) => capabilities?.[name] === true;
  return { id, context, can: (name) => (capabilities ? has(name) : true) };
}
