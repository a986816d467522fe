/** One message: what was said, its branches, what can be done with it. */

import { Code, CopyButton } from "../../components/code.js";
import { Markdown } from "../../components/markdown.js";
import { Attention, Badge, Button, Details, Icon, IconButton, Spinner, TextArea } from "../../components/ui.js";
import { duration, number } from "../../core/format.js";
import { html, useEffect, useRef, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { siblings } from "./store.js";

export function Message({ chat, node, acts, busy }) {
  return node.role === "user"
    ? html`<${Asked} ...${{ chat, node, acts, busy }} />`
    : html`<${Answered} ...${{ chat, node, acts, busy }} />`;
}

function Branches({ chat, node, acts, busy }) {
  const all = siblings(chat, node);
  const at = all.indexOf(node);
  if (all.length < 2) return null;
  const move = (step) => acts.show(all[at + step].id);
  return html`<span class="branches" role="group" aria-label=${t("chat.branches")}>
    <${IconButton} small icon="left" label=${t("chat.branch_before")} disabled=${busy || at === 0} onClick=${() => move(-1)} />
    <span class="numbers">${at + 1}/${all.length}</span>
    <${IconButton} small icon="right" label=${t("chat.branch_after")} disabled=${busy || at === all.length - 1} onClick=${() => move(1)} />
  </span>`;
}

function Asked({ chat, node, acts, busy }) {
  const [text, setText] = useState(null);
  const area = useRef();
  const pencil = useRef();
  const isEdited = text !== null;
  const was = useRef(false);
  useEffect(() => {
    if (isEdited) area.current.focus();
    else if (was.current === "left") pencil.current?.focus();
    was.current = isEdited;
  }, [isEdited]);
  const leave = () => {
    was.current = "left";
    setText(null);
  };
  if (isEdited) {
    const send = () => {
      if (!text.trim() || busy) return;
      setText(null);
      acts.edit(node, text.trim());
    };
    const onKeyDown = (event) => {
      if (event.isComposing) return;
      const does = event.key === "Escape" ? leave : event.key === "Enter" && !event.shiftKey ? send : null;
      if (does) (event.preventDefault(), does());
    };
    return html`<article class="message asked-message" aria-label=${t("chat.you")}>
      <div class="bubble editing">
        <${TextArea} value=${text} onChange=${setText} aria-label=${t("chat.edit")} inputRef=${area} onKeyDown=${onKeyDown} />
        <div class="row"><span class="grow small muted">${t("chat.edit_keys")}</span>
          <${Button} small onClick=${leave}>${t("word.cancel")}<//>
          <${Button} small kind="primary" disabled=${!text.trim() || busy} onClick=${send}>${t("chat.send")}<//>
        </div>
      </div>
    </article>`;
  }
  return html`<article class="message asked-message" aria-label=${t("chat.you")}>
    <div class="bubble">
      ${node.attachments?.length > 0 && html`<div class="row chips">${node.attachments.map((file) => html`<${Attached} file=${file} />`)}</div>`}
      <div class="asked-text">${node.content}</div>
    </div>
    <div class="tools row">
      <${Branches} ...${{ chat, node, acts, busy }} />
      <${CopyButton} text=${node.content} label=${t("word.copy")} />
      <${IconButton} small icon="edit" label=${t("chat.edit")} disabled=${busy} buttonRef=${pencil} onClick=${() => setText(node.content)} />
    </div>
  </article>`;
}

export const Attached = ({ file, onRemove, children }) => html`<span class="chip">
  ${file.kind === "image" ? html`<img src=${file.url} alt=${file.name} />` : html`<${Icon} name=${file.kind === "knowledge" ? "book" : "file"} size=${15} />`}
  <span class="truncate">${file.name}</span>${children}
  ${onRemove && html`<${IconButton} small icon="close" label=${t("chat.detach", { name: file.name })} onClick=${onRemove} />`}
</span>`;

function Answered({ chat, node, acts, busy }) {
  if (!node.twin) return html`<${Answer} ...${{ chat, node, answer: node, acts, busy }} />`;
  return html`<div class="twins">
    <${Answer} ...${{ chat, node, answer: node, acts, busy, side: 0 }} />
    <${Answer} ...${{ chat, node, answer: node.twin, acts, busy, side: 1 }} />
  </div>`;
}

function Answer({ chat, node, answer, acts, busy, side }) {
  const isRunning = answer.state === "running";
  const isBare = !answer.content && !answer.reasoning && !answer.calls?.length;
  return html`<article class="message answer" aria-label=${answer.model} aria-busy=${isRunning ? "true" : undefined}>
    <header class="row small"><strong class="truncate">${answer.model}</strong>
      ${answer.finish === "length" && html`<${Badge} tone="warn">${t("chat.cut")}<//>`}
      ${answer.state === "stopped" && html`<${Badge}>${t("chat.stopped")}<//>`}
    </header>
    ${answer.reasoning && html`<${Details} summary=${isRunning && !answer.content ? t("chat.reasons") : t("chat.reasoning")}><div class="muted"><${Markdown} text=${answer.reasoning} /></div><//>`}
    ${answer.calls?.map((call) => html`<${Call} key=${call.id} call=${call} />`)}
    ${answer.content && html`<${Markdown} text=${answer.content} />`}
    ${isRunning && isBare && html`<div class="muted row"><${Spinner} /> ${t("chat.waits_for_model")}</div>`}
    ${answer.state === "waits" && html`<${Decide} answer=${answer} onDecide=${(decisions) => acts.decide(node, answer, decisions)} />`}
    ${answer.state === "failed" && html`<${Attention} tone="bad">${answer.error}<//>`}
    ${node.sources?.length > 0 && side !== 1 && html`<${Sources} passages=${node.sources} />`}
    ${!isRunning && html`<div class="tools row">
      ${!side && html`<${Branches} ...${{ chat, node, acts, busy }} />`}
      <${CopyButton} text=${answer.content} label=${t("word.copy")} />
      ${side === undefined && html`<${IconButton} small icon="retry" label=${t("chat.again")} disabled=${busy} onClick=${() => acts.again(node)} />`}
      ${side !== undefined && html`<${Button} small kind="quiet" disabled=${busy} onClick=${() => acts.keep(node, side)}>${t("chat.keep")}<//>`}
      <${Figures} stats=${answer.stats} />
    </div>`}
  </article>`;
}

function Figures({ stats = {} }) {
  const parts = [
    stats.tokens !== undefined && t("chat.tokens", { n: stats.tokens }),
    stats.speed && t("chat.speed", { speed: number(stats.speed, stats.speed < 10 ? 1 : 0) }),
    stats.ttft !== undefined && t("chat.ttft", { time: duration(stats.ttft) }),
  ].filter(Boolean);
  return html`<span class="small muted numbers figures">${parts.join(" · ")}</span>`;
}

function Call({ call }) {
  const tone = call.is_error || call.approval === "denied" ? "bad" : call.result !== null ? "ok" : "accent";
  const summary = html`<span class="row call-head"><${Icon} name="tool" size=${15} /><code>${call.name}</code>
    <${Badge} tone=${tone}>${t(call.approval === "denied" ? "chat.denied" : call.result === null ? "chat.calling" : call.is_error ? "chat.call_failed" : "chat.called")}<//></span>`;
  return html`<${Details} summary=${summary}>
    <${Code} text=${pretty(call.arguments)} label=${t("chat.arguments")} />
    ${call.result !== null && html`<${Code} text=${call.result} label=${t("chat.result")} />`}
  <//>`;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** What is to become of the calls that wait: one answer for each of them. */
function Decide({ answer, onDecide }) {
  const waiting = answer.calls.filter((call) => answer.pending?.includes(call.id));
  const [said, setSaid] = useState({});
  const isOwn = (call) => answer.own?.includes(call.name);
  const isReady = waiting.every((call) => (isOwn(call) ? said[call.id]?.result !== undefined : said[call.id]));
  const say = (call, decision) => {
    const next = { ...said, [call.id]: decision };
    setSaid(next);
    if (!isOwn(call) && waiting.every((one) => next[one.id] && !isOwn(one))) onDecide(next);
  };
  return html`<div class="card decide" role="group" aria-label=${t("chat.wants")}>
    <strong>${t("chat.wants")}</strong>
    ${waiting.map((call) => html`<div class="stack" key=${call.id}>
      <div class="row"><${Icon} name="tool" size=${16} /><code class="break">${call.name}(${call.arguments})</code></div>
      ${isOwn(call)
        ? html`<${TextArea} rows=${2} aria-label=${t("chat.its_result")} placeholder=${t("chat.its_result")} value=${said[call.id]?.result ?? ""} onChange=${(result) => say(call, { result })} />`
        : html`<div class="row">
            <${Button} small kind="primary" icon="check" aria-pressed=${said[call.id]?.approve === true ? "true" : undefined} onClick=${() => say(call, { approve: true })}>${t("chat.approve")}<//>
            <${Button} small onClick=${() => say(call, { approve: "always" })}>${t("chat.approve_always")}<//>
            <${Button} small kind="danger" onClick=${() => say(call, { approve: false })}>${t("chat.deny")}<//>
          </div>`}
    </div>`)}
    ${waiting.some(isOwn) && html`<div><${Button} small kind="primary" disabled=${!isReady} onClick=${() => onDecide(said)}>${t("chat.go_on")}<//></div>`}
  </div>`;
}

const Sources = ({ passages }) => html`<${Details} summary=${t("chat.sources", { n: passages.length })}>
  ${passages.map((one, i) => html`<div key=${i}><strong class="small">[${i + 1}] ${one.citation}</strong><p class="small muted clip">${one.text}</p></div>`)}
<//>`;
