/** How near texts are to each other: cosines of their embeddings. */

import { Button, Failure, Field, TextArea } from "../../components/ui.js";
import { client } from "../../core/api.js";
import { number } from "../../core/format.js";
import { html, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { setQuery } from "../../core/router.js";
import { ModelChoice, NoModels, able, chosen } from "./models.js";
import { cosine } from "./tokens.js";

const SAMPLE = "A cat sat on the mat.\nA kitten rested on a rug.\nStock prices fell sharply.\nThe market crashed today.";
const MOST = 24;

export function Similarity({ query, models: all, isLoading }) {
  // Encoders first: decoders embed too, and worse.
  const models = able(all, "embeddings").sort((a, b) => Number(a.can("completion")) - Number(b.can("completion")));
  const [text, setText] = useState(SAMPLE);
  const [run, setRun] = useState({});
  const model = chosen(models, query.model);
  if (!models.length) return html`<${NoModels} isLoading=${isLoading} />`;
  const texts = text.split("\n").map((line) => line.trim()).filter(Boolean).slice(0, MOST);
  const ask = async (event) => {
    event.preventDefault();
    setRun({ busy: true });
    try {
      const { data } = await client().embed(texts, { model });
      const vectors = [...data].sort((a, b) => a.index - b.index).map((one) => one.embedding);
      setRun({ texts, rows: vectors.map((a) => vectors.map((b) => cosine(a, b))) });
    } catch (error) {
      setRun({ error });
    }
  };
  return html`<form class="stack" onSubmit=${ask}>
    <div class="controls"><${ModelChoice} models=${models} value=${model} onChange=${(name) => setQuery({ model: name })} /></div>
    <${Field} label=${t("playground.lines", { n: MOST })}><${TextArea} rows=${5} value=${text} onChange=${setText} /><//>
    <div class="row"><${Button} type="submit" kind="primary" icon="play" busy=${run.busy} disabled=${texts.length < 2}>${t("form.run")}<//></div>
    ${run.error && html`<${Failure} error=${run.error} />`}
    ${run.rows && html`<${Matrix} ...${run} />`}
  </form>`;
}

function Matrix({ texts, rows }) {
  return html`<section class="card"><div class="scroll-x" tabindex="0" role="region" aria-label=${t("playground.similarity")}>
    <table class="matrix">
      <thead><tr><td></td>${texts.map((text, i) => html`<th key=${i} scope="col" title=${text}>${i + 1}</th>`)}</tr></thead>
      <tbody>
        ${rows.map(
          (row, i) => html`<tr key=${i}>
            <th scope="row" class="truncate" title=${texts[i]}>${i + 1} ${texts[i]}</th>
            ${row.map((value, n) => html`<td key=${n} class="end near" style=${{ "--near": `${Math.round(Math.max(0, value) * 60)}%` }}>${number(value, 2)}</td>`)}
          </tr>`,
        )}
      </tbody>
    </table>
  </div></section>`;
}
