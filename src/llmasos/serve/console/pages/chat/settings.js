/** What a conversation's answers depend on: system prompt, sampling, form of the answer, tools, knowledge. */

import { Dialog } from "../../components/dialog.js";
import { Badge, Button, Check, Details, Field, Input, Select, Slider, TextArea } from "../../components/ui.js";
import { ask, maybe } from "../../core/api.js";
import { useLoad } from "../../core/hooks.js";
import { html } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { NUMBERS } from "./request.js";

const EFFORTS = ["none", "low", "medium", "high"];

const notJSON = (text) => {
  if (!text?.trim()) return null;
  try {
    JSON.parse(text);
    return null;
  } catch (e) {
    return e.message;
  }
};

export function Settings({ settings, onChange, onClose, model }) {
  const set = (name) => (value) => onChange({ ...settings, [name]: value === "" ? undefined : value });
  const tools = useLoad((signal) => maybe(ask("GET", "/llmasos/v1/agents/tools", { signal }), { data: [] }), []);
  const footer = html`<${Button} onClick=${() => onChange({})}>${t("word.reset")}<//><span class="grow" /><${Button} kind="primary" onClick=${onClose}>${t("word.close")}<//>`;
  const chosen = settings.tools ?? [];
  const toggle = (name) => (isOn) => set("tools")(isOn ? [...chosen, name] : chosen.filter((one) => one !== name));
  return html`<${Dialog} side title=${t("chat.settings")} onClose=${onClose} footer=${footer}>
    <${Field} label=${t("chat.system")}><${TextArea} value=${settings.system} onChange=${set("system")} rows=${4} placeholder=${t("chat.system_hint")} /><//>
    ${NUMBERS.slice(0, 2).map((one) => html`<${Dial} key=${one.name} ...${one} value=${settings[one.name]} onChange=${set(one.name)} />`)}
    <${Field} label=${t("chat.max_tokens")} hint=${t("chat.max_tokens_hint")}><${Input} type="number" min="1" value=${settings.max_tokens} onChange=${set("max_tokens")} /><//>
    <${Details} summary=${t("chat.more_sampling")}>
      ${NUMBERS.slice(2).map((one) => html`<${Dial} key=${one.name} ...${one} value=${settings[one.name]} onChange=${set(one.name)} />`)}
      <${Field} label=${t("chat.seed")} hint=${t("chat.seed_hint")}><${Input} type="number" value=${settings.seed} onChange=${set("seed")} /><//>
      <${Field} label=${t("chat.stop_texts")}><${TextArea} value=${settings.stop} onChange=${set("stop")} rows=${2} /><//>
      ${model?.capabilities?.reasoning && html`<${Field} label=${t("chat.effort")}>
        <${Select} value=${settings.reasoning_effort ?? ""} onChange=${set("reasoning_effort")} options=${[{ value: "", label: t("chat.default") }, ...EFFORTS]} /><//>`}
    <//>
    <${Details} summary=${html`${t("chat.form")} ${settings.schema?.trim() && html`<${Badge} tone="accent">${t("chat.on")}<//>`}`} open=${Boolean(settings.schema)}>
      <${Field} label=${t("chat.schema")} hint=${t("chat.schema_hint")} error=${notJSON(settings.schema)}>
        <${TextArea} class="mono" value=${settings.schema} onChange=${set("schema")} rows=${5} spellcheck=${false} placeholder='{"type": "object", "properties": {}}' />
      <//>
    <//>
    <${Details} summary=${html`${t("chat.tools")} ${(chosen.length > 0 || settings.functions?.trim()) && html`<${Badge} tone="accent">${t("chat.on")}<//>`}`} open=${chosen.length > 0}>
      <p class="small muted">${t("chat.tools_hint")} ${t("chat.tools_sampling")}</p>
      ${tools.data?.data.map(({ name, source, description }) => html`<${Check} key=${source} label=${html`<code>${name}</code>`} hint=${description.split("\n")[0]} value=${chosen.includes(source)} onChange=${toggle(source)} />`)}
      <${Field} label=${t("chat.functions")} hint=${t("chat.functions_hint")} error=${notJSON(settings.functions)}>
        <${TextArea} class="mono" value=${settings.functions} onChange=${set("functions")} rows=${3} spellcheck=${false} placeholder='[{"name": "weather", "description": "…", "parameters": {}}]' />
      <//>
    <//>
  <//>`;
}

/** A number that may be left to the model. */
function Dial({ name, value, onChange, min, max, step }) {
  const isSet = value !== undefined && value !== "";
  return html`<div class="dial">
    <${Field} label=${html`<span class="grow">${t(`chat.${name}`)}</span>`}>
      <${Slider} value=${isSet ? value : (min + max) / 2} min=${min} max=${max} step=${step} onChange=${onChange} class=${isSet ? "slider" : "slider unset"} />
    <//>
    <${Input} type="number" value=${value} min=${min} max=${max} step=${step} onChange=${onChange} placeholder=${t("chat.default")} aria-label=${t(`chat.${name}`)} />
  </div>`;
}
