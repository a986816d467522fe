/** Asks for the API key, tries it, keeps it for this tab. */

import { LLMasOS } from "../llmasos.js";
import { ROOT, errorText, key, keyWanted } from "../core/api.js";
import { html, useState } from "../core/html.js";
import { t } from "../core/i18n.js";
import { Dialog } from "./dialog.js";
import { Button, Field, Input } from "./ui.js";

export function Login() {
  const [text, setText] = useState("");
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const close = () => (keyWanted.value = false);
  const submit = async (event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      await new LLMasOS({ baseURL: `${ROOT}/v1`, apiKey: text.trim(), maxRetries: 0 }).models();
      key.value = text.trim();
      close();
    } catch (e) {
      setError(e.status === 401 ? t("login.wrong") : errorText(e));
    } finally {
      setBusy(false);
    }
  };
  const footer = html`<span class="grow" /><${Button} onClick=${close}>${t("word.cancel")}<//>
    <${Button} kind="primary" type="submit" form="login" busy=${busy} disabled=${!text.trim()}>${t("login.enter")}<//>`;
  return html`
    <${Dialog} title=${t("login.title")} onClose=${close} footer=${footer}>
      <p class="muted">${t("login.why")}</p>
      <form id="login" onSubmit=${submit}>
        <${Field} label=${t("login.key")} hint=${t("login.hint")} error=${error}>
          <${Input} type="password" value=${text} onChange=${setText} placeholder="sk-llmasos-…" autofocus required />
        <//>
      </form>
    <//>
  `;
}
