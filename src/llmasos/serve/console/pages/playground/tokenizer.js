/** A text, or a chat as the model's template writes it, in tokens; of two models side by side. */

import { Badge, Check, Failure, Field, Input, Spinner, TextArea, classes } from "../../components/ui.js";
import { client } from "../../core/api.js";
import { number } from "../../core/format.js";
import { useLoad } from "../../core/hooks.js";
import { html, useEffect, useMemo, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { setQuery } from "../../core/router.js";
import { ModelChoice, NoModels, chosen } from "./models.js";
import { pieces, visible } from "./tokens.js";

const SAMPLE = "Hello, world! 你好，世界 👋";
const SHOWN = 4000; // tokens

/** The value once it has not changed for a moment. */
function useSettled(value, ms = 250) {
  const [settled, setSettled] = useState(value);
  const text = JSON.stringify(value);
  useEffect(() => {
    const timer = setTimeout(() => setSettled(value), ms);
    return () => clearTimeout(timer);
  }, [text]);
  return settled;
}

export function Tokens({ query, models, isLoading }) {
  const [text, setText] = useState(query.text ?? SAMPLE);
  const [system, setSystem] = useState("");
  const asChat = query.as === "chat";
  const model = chosen(models, query.model);
  const other = models.find((one) => one.id === query.with)?.id;
  const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: text }];
  const input = useSettled(asChat ? messages : text);
  useEffect(() => {
    const timer = setTimeout(() => setQuery({ text: text === SAMPLE || text.length > 4000 ? null : text }), 500);
    return () => clearTimeout(timer);
  }, [text]);
  if (!models.length) return html`<${NoModels} isLoading=${isLoading} />`;
  return html`<div class="stack">
    <div class="controls">
      <${ModelChoice} models=${models} value=${model} onChange=${(name) => setQuery({ model: name })} />
      <${ModelChoice} models=${models} value=${other} label=${t("playground.compare")} none=${t("word.none")} onChange=${(name) => setQuery({ with: name })} />
      <${Check} label=${t("playground.as_chat")} value=${asChat} onChange=${(is) => setQuery({ as: is ? "chat" : null })} />
    </div>
    ${asChat && html`<${Field} label=${t("playground.system")}><${Input} value=${system} onChange=${setSystem} /><//>`}
    <${Field} label=${asChat ? t("playground.user") : t("playground.text")}><${TextArea} rows=${4} value=${text} onChange=${setText} /><//>
    <div class=${classes("stack", other && "two")}>
      <${TokenView} model=${model} input=${input} showName=${Boolean(other)} />
      ${other && html`<${TokenView} model=${other} input=${input} showName />`}
    </div>
  </div>`;
}

function TokenView({ model, input, showName }) {
  const state = useLoad((signal) => client().tokenize(input, { model, return_token_strs: true, signal }), [model, JSON.stringify(input)]);
  const [showIds, setShowIds] = useState(false);
  const { data, error, loading, reload } = state;
  const shown = useMemo(() => data && pieces(data.tokens.slice(0, SHOWN), (data.token_strs ?? []).slice(0, SHOWN)), [data]);
  if (error) return html`<section class="card">${showName && html`<h2>${model}</h2>`}<${Failure} error=${error} retry=${reload} /></section>`;
  if (!data) return html`<section class="card"><${Spinner} label=${t("word.loading")} /></section>`;
  const letters = [...(typeof input === "string" ? input : input.map((one) => one.content).join(""))].length;
  return html`<section class=${classes("card", loading && "fading")} aria-label=${model}>
    <div class="row">
      ${showName && html`<h2 class="truncate">${model}</h2>`}
      <${Badge} tone="accent">${t("playground.count", { n: data.count })}<//>
      <span class="muted small numbers">${t("playground.per_token", { n: number(letters / (data.count || 1), 2) })}${data.max_model_len ? ` · ${t("playground.of_context", { share: number((100 * data.count) / data.max_model_len, 1), n: data.max_model_len })}` : ""}</span>
      <span class="grow"></span>
      <${Check} label=${t("playground.ids")} value=${showIds} onChange=${setShowIds} />
    </div>
    <div class="tokens" tabindex="0" role="group" aria-label=${t("playground.tokens")}>
      ${shown.map(
        ({ ids, tokens, text }, i) =>
          html`<span key=${i} class=${`token hue-${i % 5}`} title=${ids.map((id, n) => `${id}  ${tokens[n]}`).join("\n")}>${visible(text)}${showIds && html`<sub>${ids.join(" ")}</sub>`}</span>`,
      )}
    </div>
    ${data.count > SHOWN && html`<p class="muted">${t("word.more", { n: data.count - SHOWN })}</p>`}
  </section>`;
}
