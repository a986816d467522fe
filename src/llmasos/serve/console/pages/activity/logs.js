/** The server's log as it is written. */

import { Button, Failure, Field, Input, KeyValues, Select } from "../../components/ui.js";
import { AbortError, client, key } from "../../core/api.js";
import { clock, moment } from "../../core/format.js";
import { html, useEffect, useRef, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { setQuery } from "../../core/router.js";
import { useSignal } from "../../core/store.js";
import { filtered } from "./facts.js";

const KEPT = 2000;
const SHOWN = 500;
const TONES = { warning: "warn", error: "bad", critical: "bad", info: undefined, debug: undefined };

/** The lines so far; they come in bursts, so the page is drawn once per frame of a screen. */
function useLines() {
  const [lines, setLines] = useState([]);
  const [error, setError] = useState(null);
  const [round, setRound] = useState(0);
  const inForce = useSignal(key);
  useEffect(() => {
    const controller = new AbortController();
    let waiting = [];
    let timer;
    const flush = () => {
      timer = undefined;
      const more = waiting;
      waiting = [];
      setLines((old) => [...old, ...more].slice(-KEPT));
    };
    const follow = async () => {
      setLines([]);
      setError(null);
      for await (const line of client().native.logs({ follow: true, limit: 500, signal: controller.signal })) {
        waiting.push(line);
        timer ??= setTimeout(flush, 100);
      }
    };
    follow().catch((e) => controller.signal.aborted || e instanceof AbortError || setError(e));
    return () => {
      clearTimeout(timer);
      controller.abort();
    };
  }, [round, inForce]);
  return { lines, error, again: () => setRound((n) => n + 1), clear: () => setLines([]) };
}

export function Logs({ query }) {
  const { lines, error, again, clear } = useLines();
  const [held, setHeld] = useState(null); // the lines as they were when somebody stopped them
  const [follow, setFollow] = useState(true);
  const box = useRef(null);
  const level = query.level ?? "info";
  const text = query.q ?? "";
  const found = filtered(held ?? lines, level, text);
  const shown = found.slice(-SHOWN);
  useEffect(() => {
    if (follow && held === null && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [shown.length, lines, follow, held]);
  const scrolled = () => {
    const { scrollTop, scrollHeight, clientHeight } = box.current;
    setFollow(scrollHeight - scrollTop - clientHeight < 30);
  };
  const levels = ["debug", "info", "warning", "error"].map((value) => ({ value, label: t(`activity.level_${value}`) }));
  const newer = held === null ? 0 : filtered(lines, level, text).length - found.length;
  return html`<div class="stack">
    <div class="controls">
      <${Field} label=${t("activity.level")}><${Select} options=${levels} value=${level} onChange=${(next) => setQuery({ level: next === "info" ? null : next })} /><//>
      <${Field} label=${t("activity.filter")}><${Input} type="search" value=${text} onChange=${(q) => setQuery({ q })} /><//>
      <${Button} icon=${held === null ? "pause" : "play"} aria-pressed=${String(held !== null)} onClick=${() => setHeld(held === null ? lines : null)}>
        ${held === null ? t("activity.pause") : `${t("activity.resume")}${newer > 0 ? ` (+${newer})` : ""}`}
      <//>
      <${Button} kind="quiet" onClick=${clear}>${t("form.clear")}<//>
    </div>
    ${error && html`<${Failure} error=${error} retry=${again} />`}
    <div class="log mono" ref=${box} onScroll=${scrolled} tabindex="0" role="log" aria-label=${t("activity.logs")} aria-live="off">
      ${!shown.length && html`<p class="muted">${lines.length ? t("activity.no_lines_found") : t("activity.no_lines")}</p>`}
      ${shown.map((line, i) => html`<${Line} key=${`${line.time} ${i}`} line=${line} />`)}
    </div>
    <p class="muted small">${t("activity.lines", { n: found.length })}${follow || held !== null ? "" : ` · ${t("activity.not_following")}`}</p>
  </div>`;
}

function Line({ line }) {
  const level = line.level.toLowerCase();
  const more = Object.entries(line.fields ?? {}).filter(([, value]) => value !== null && value !== "");
  const head = html`<span class="muted" title=${moment(line.time)}>${clock(line.time)}</span> <span class=${`log-level log-${TONES[level] ?? "plain"}`}>${level}</span> ${line.message}`;
  if (!more.length && !line.request_id) return html`<div class="log-line">${head}</div>`;
  const pairs = [["logger", line.logger], ["request", line.request_id], ...more.map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : String(value)])];
  return html`<details class="log-line"><summary>${head}</summary><${KeyValues} pairs=${pairs} /></details>`;
}
