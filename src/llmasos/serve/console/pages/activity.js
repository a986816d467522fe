/** Activity: what the server works on, its jobs, the traces of agents, its log. */

import { Page, Tabs } from "../components/ui.js";
import { ask, client, maybe } from "../core/api.js";
import { usePoll } from "../core/hooks.js";
import { html } from "../core/html.js";
import { t } from "../core/i18n.js";
import { go } from "../core/router.js";
import { isActive, isLooking } from "./activity/facts.js";
import { Jobs } from "./activity/jobs.js";
import { Logs } from "./activity/logs.js";
import { Now } from "./activity/now.js";
import { Traces } from "./activity/traces.js";

export const styles = ["components/form.css", "pages/activity.css"];

const VIEWS = { now: Now, jobs: Jobs, traces: Traces, logs: Logs };

/** What the views share; a part that this key may not see is null. */
async function look(signal) {
  const [requests, jobs, runs, faults] = await Promise.all([
    client().native.requests({ signal }),
    maybe(ask("GET", "/llmasos/v1/jobs", { signal })),
    maybe(ask("GET", "/llmasos/v1/agents/runs", { signal })),
    maybe(ask("GET", "/llmasos/v1/logs", { query: { level: "error", limit: 20 }, signal })),
  ]);
  return { requests: requests.filter((one) => !isLooking(one)), jobs: jobs?.data ?? null, runs: runs?.data ?? null, faults: faults?.data ?? null };
}

export default function Activity({ route }) {
  const at = VIEWS[route.path[0]] ? route.path[0] : "now";
  const state = usePoll(look, 1500, []);
  const { requests = [], jobs, runs } = state.data ?? {};
  const counts = {
    now: requests.length + (jobs ?? []).filter(isActive).length || undefined,
    jobs: jobs?.length || undefined,
    traces: runs?.length || undefined,
  };
  const tabs = Object.keys(VIEWS).map((id) => ({ id, label: t(`activity.${id}`), count: counts[id] }));
  const View = VIEWS[at];
  return html`<${Page} title=${t("nav.activity")}>
    <${Tabs} tabs=${tabs} active=${at} onChange=${(id) => go(`/activity/${id}`)} label=${t("nav.activity")} />
    <${View} key=${at} state=${state} rest=${route.path.slice(1)} query=${route.query} />
  <//>`;
}
