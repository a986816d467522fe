/** How sure a model was of each token, and what else it might have written. */

import { Button, Check, Field, Failure, Input, TextArea } from "../../components/ui.js";
import { client } from "../../core/api.js";
import { number, percent } from "../../core/format.js";
import { html, useRef, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { setQuery } from "../../core/router.js";
import { ModelChoice, NoModels, able, chosen } from "./models.js";
import { visible } from "./tokens.js";

const SAMPLES = { text: "The capital of France is", chat: "What is the capital of France?" };

export function Logprobs({ query, models: all, isLoading }) {
  const models = able(all, "completion", "chat");
  const asChat = query.as === "chat";
  const model = chosen(models, query.model);
  const [texts, setTexts] = useState(SAMPLES);
  const [length, setLength] = useState("24");
  const [heat, setHeat] = useState("0");
  const [run, setRun] = useState({});
  const controller = useRef(null);
  if (!models.length) return html`<${NoModels} isLoading=${isLoading} />`;
  const text = texts[asChat ? "chat" : "text"];
  const ask = async (event) => {
    event.preventDefault();
    controller.current?.abort();
    const { signal } = (controller.current = new AbortController());
    setRun((old) => ({ ...old, busy: true, error: null }));
    try {
      const options = { model, max_tokens: Math.max(0, Math.trunc(Number(length)) || 0), temperature: Number(heat) || 0, signal };
      setRun({ rows: asChat ? await ofChat(text, options) : await ofText(text, options) });
    } catch (error) {
      if (!signal.aborted) setRun({ error });
    }
  };
  return html`<form class="stack" onSubmit=${ask}>
    <div class="controls">
      <${ModelChoice} models=${models} value=${model} onChange=${(name) => setQuery({ model: name })} />
      <${Field} label=${t("playground.max_tokens")}><${Input} inputmode="numeric" value=${length} onChange=${setLength} /><//>
      <${Field} label=${t("playground.temperature")}><${Input} inputmode="decimal" value=${heat} onChange=${setHeat} /><//>
      <${Check} label=${t("playground.as_chat")} value=${asChat} onChange=${(is) => setQuery({ as: is ? "chat" : null })} />
    </div>
    <${Field} label=${asChat ? t("playground.user") : t("playground.text")}>
      <${TextArea} rows=${3} value=${text} onChange=${(next) => setTexts({ ...texts, [asChat ? "chat" : "text"]: next })} />
    <//>
    <div class="row"><${Button} type="submit" kind="primary" icon="play" busy=${run.busy}>${t("form.run")}<//></div>
    ${run.error && html`<${Failure} error=${run.error} />`}
    ${run.rows && html`<${Heat} rows=${run.rows} />`}
  </form>`;
}

/** [{text, logprob, others: [[text, logprob]], isPrompt}] of a text with its continuation. */
async function ofText(prompt, options) {
  const [known, answer] = await Promise.all([
    client().complete(prompt, { ...options, max_tokens: 0, echo: true, logprobs: 5 }),
    options.max_tokens ? client().complete(prompt, { ...options, logprobs: 5 }) : undefined,
  ]);
  const rows = ({ logprobs }, isPrompt) =>
    logprobs.tokens.map((text, i) => ({ text, logprob: logprobs.token_logprobs[i], others: Object.entries(logprobs.top_logprobs?.[i] ?? {}), isPrompt }));
  return [...rows(known.choices[0], true), ...(answer ? rows(answer.choices[0], false) : [])];
}

async function ofChat(message, options) {
  const answer = await client().chat(message, { ...options, max_tokens: options.max_tokens || 1, logprobs: true, top_logprobs: 5 });
  return (answer.choices[0].logprobs?.content ?? []).map(({ token, logprob, top_logprobs: top }) => ({
    text: token,
    logprob,
    others: top.map((one) => [one.token, one.logprob]),
  }));
}

/** Steps of confidence, each with its own look (see playground.css). */
const step = (logprob) => (logprob === null ? "none" : [0.9, 0.6, 0.3, 0.1].findIndex((limit) => Math.exp(logprob) >= limit) + 1 || 5);

function Heat({ rows }) {
  const [at, setAt] = useState(rows.findIndex((row) => !row.isPrompt && row.logprob !== null));
  const known = rows.filter((row) => row.logprob !== null && Number.isFinite(row.logprob));
  const answered = known.filter((row) => !row.isPrompt);
  const mean = (list) => list.reduce((sum, row) => sum + row.logprob, 0) / list.length;
  const figures = [
    known.length > answered.length && [t("playground.prompt_perplexity"), number(Math.exp(-mean(known.filter((row) => row.isPrompt))), 2)],
    answered.length && [t("playground.answer_mean"), percent(Math.exp(mean(answered)), 1)],
  ].filter(Boolean);
  const move = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = at + (by ?? 0);
    if (!by || !rows[next]) return;
    event.preventDefault();
    setAt(next);
    event.currentTarget.children[next].focus();
  };
  return html`<section class="card">
    <div class="row muted small">${figures.map(([label, value]) => html`<span key=${label}>${label} <b>${value}</b></span>`)}<span class="grow"></span><${Legend} /></div>
    <div class="tokens" role="group" aria-label=${t("playground.tokens")} onKeyDown=${move}>
      ${rows.map(
        (row, i) =>
          html`<button type="button" key=${i} class=${`token heat-${step(row.logprob)}${row.isPrompt ? " prompt" : ""}`} tabindex=${i === Math.max(0, at) ? 0 : -1}
            aria-pressed=${String(i === at)} title=${row.logprob === null ? "" : percent(Math.exp(row.logprob), 1)} onClick=${() => setAt(i)}>${visible(row.text)}</button>`,
      )}
    </div>
    ${rows[at] && html`<${Alternatives} row=${rows[at]} />`}
  </section>`;
}

const Legend = () => html`<span class="legend">
  ${["≥ 90 %", "60", "30", "10", "< 10 %"].map((label, i) => html`<span key=${i} class=${`token heat-${i + 1}`}>${label}</span>`)}
</span>`;

function Alternatives({ row }) {
  const others = [...row.others].sort((a, b) => b[1] - a[1]);
  if (row.logprob !== null && !others.some(([text]) => text === row.text)) others.push([row.text, row.logprob]);
  if (!others.length) return html`<p class="muted">${t("playground.first_token")}</p>`;
  return html`<table class="alternatives" aria-live="polite">
    <caption class="visually-hidden">${t("playground.alternatives")}</caption>
    <tbody>
      ${others.map(
        ([text, logprob]) => html`<tr key=${text} class=${text === row.text ? "taken" : ""}>
          <th scope="row"><code>${JSON.stringify(text).slice(1, -1)}</code>${text === row.text ? html`<span class="visually-hidden"> (${t("playground.taken")})</span>` : ""}</th>
          <td class="bar"><div style=${{ width: `${100 * Math.exp(logprob)}%` }}></div></td>
          <td class="end">${percent(Math.exp(logprob), 1)}</td>
          <td class="end muted">${number(logprob, 2)}</td>
        </tr>`,
      )}
    </tbody>
  </table>`;
}
