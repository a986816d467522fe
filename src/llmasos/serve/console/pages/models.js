import { Empty, Page } from "../components/ui.js";
import { html } from "../core/html.js";
import { t } from "../core/i18n.js";

export default () => html`<${Page} title=${t("nav.models")}><${Empty} icon="models" title=${t("word.loading")} /><//>`;
