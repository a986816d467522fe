import { Empty, Page } from "../components/ui.js";
import { html } from "../core/html.js";
import { t } from "../core/i18n.js";

export default () => html`<${Page} title=${t("nav.system")}><${Empty} icon="system" title=${t("word.loading")} /><//>`;
