/** Text for machines, with a button that copies it. */

import { html, useState } from "../core/html.js";
import { t } from "../core/i18n.js";
import { toast } from "./toast.js";
import { Button, IconButton } from "./ui.js";

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = Object.assign(document.createElement("textarea"), { value: text }); // no clipboard without HTTPS
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) throw new Error(t("error.copy"));
  }
}

export function CopyButton({ text, label, small = true, children }) {
  const [copied, setCopied] = useState(false);
  const run = async () => {
    try {
      await copy(typeof text === "function" ? text() : text);
      setCopied(true);
      setTimeout(() => setCopied(false), 1500);
    } catch (e) {
      toast(e.message, { tone: "bad" });
    }
  };
  const icon = copied ? "check" : "copy";
  const said = copied ? t("word.copied") : (label ?? t("word.copy"));
  return children
    ? html`<${Button} small=${small} icon=${icon} onClick=${run}>${copied ? t("word.copied") : children}<//>`
    : html`<${IconButton} icon=${icon} label=${said} small=${small} onClick=${run} />`;
}

export const Code = ({ text, language, label }) => html`
  <div class="code">
    <pre tabindex="0" aria-label=${label ?? language ?? t("word.code")}><code>${text}</code></pre>
    <div class="code-tools">${language && html`<span class="small muted">${language}</span>`}<${CopyButton} text=${text} /></div>
  </div>
`;
