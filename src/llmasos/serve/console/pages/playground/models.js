/** Choosing one of the models that can do something. */

import { Empty, Field, Select } from "../../components/ui.js";
import { html } from "../../core/html.js";
import { t } from "../../core/i18n.js";

/** Those of `models` that can do one of `abilities`. */
export const able = (models, ...abilities) => models.filter((one) => abilities.some((name) => one.can(name)));

/** The name that is meant: `wanted` if it is there, else the first. */
export const chosen = (models, wanted) => models.find((one) => one.id === wanted)?.id ?? models[0]?.id;

export const ModelChoice = ({ models, value, onChange, label = t("word.model"), none }) => {
  const options = [...(none ? [{ value: "", label: none }] : []), ...models.map((one) => one.id)];
  return html`<${Field} label=${label}><${Select} options=${options} value=${value ?? ""} onChange=${onChange} /><//>`;
};

export const NoModels = ({ isLoading }) =>
  isLoading
    ? null
    : html`<${Empty} icon="models" title=${t("playground.no_model")} action=${html`<a href="#/models">${t("nav.models")}</a>`}>
        ${t("playground.no_model_hint")}
      <//>`;
