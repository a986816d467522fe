/** The frame around the pages: navigation, commands, the key, messages. */

import { Login } from "./components/login.js";
import { Palette, palette } from "./components/palette.js";
import { Questions } from "./components/dialog.js";
import { Toasts } from "./components/toast.js";
import { Attention, Button, Failure, Icon, IconButton, Select, Spinner } from "./components/ui.js";
import { Component, html, useEffect, useState } from "./core/html.js";
import { ask, key, keyWanted, reachable } from "./core/api.js";
import { LANGUAGES, chosen, language, setLanguage, t, useLanguage } from "./core/i18n.js";
import { modifier, useCommands } from "./core/keys.js";
import { PAGES, go, href, useRoute } from "./core/router.js";
import { signal, stored, useSignal } from "./core/store.js";

const theme = stored("theme", "auto");
const THEMES = { auto: "half", light: "sun", dark: "moon" };
/** What the pages said when they were loaded: their components by name. */
const loaded = signal({});

theme.watch((name) => {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
});

function stylesheet(path) {
  const url = new URL(path, document.baseURI).href;
  if ([...document.styleSheets].some((sheet) => sheet.href === url)) return undefined;
  return new Promise((resolve, reject) => {
    const link = Object.assign(document.createElement("link"), { rel: "stylesheet", href: url });
    link.addEventListener("load", resolve);
    link.addEventListener("error", () => reject(new Error(path)));
    document.head.append(link);
  });
}

async function load(page) {
  const module = await import(`./pages/${page}.js`);
  await Promise.all((module.styles ?? []).map(stylesheet));
  loaded.value = { ...loaded.value, [page]: module.default };
}

/** A page that throws leaves the frame standing. */
class Boundary extends Component {
  state = { error: null };
  componentDidCatch(error) {
    console.error(error);
    this.setState({ error });
  }
  render({ children }, { error }) {
    if (!error) return children;
    return html`<div class="page"><${Failure} error=${error} retry=${() => this.setState({ error: null })} /></div>`;
  }
}

function Shown({ route }) {
  const Body = useSignal(loaded)[route.page];
  const [error, setError] = useState(null);
  useEffect(() => {
    setError(null);
    if (!loaded.value[route.page]) load(route.page).catch(setError);
  }, [route.page]);
  if (error) {
    const again = () => location.reload();
    return html`<div class="page"><${Attention} tone="bad" action=${html`<${Button} small onClick=${again}>${t("word.retry")}<//>`}>
      ${t("error.page")} ${error.message}<//></div>`;
  }
  if (!Body) return html`<div class="waiting"><${Spinner} label=${t("word.loading")} /></div>`;
  return html`<${Body} route=${route} />`;
}

function Navigation({ page }) {
  return html`
    <nav class="rail" aria-label=${t("nav.pages")}>
      <a class="brand" href="#/chat"><img src="icon.svg" alt="" width="26" height="26" /><span>LLMasOS</span></a>
      <ul>
        ${PAGES.map(
          (name) => html`<li key=${name}>
            <a href=${href(`/${name}`)} aria-current=${name === page ? "page" : undefined} title=${t(`nav.${name}`)}>
              <${Icon} name=${name} size=${19} /><span>${t(`nav.${name}`)}</span>
            </a>
          </li>`,
        )}
      </ul>
      <div class="rail-foot"><${Tools} /></div>
    </nav>
  `;
}

function Tools() {
  const chosenTheme = useSignal(theme);
  const hasKey = useSignal(key);
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(chosenTheme) + 1) % names.length];
  return html`
    <button type="button" class="rail-search" onClick=${() => (palette.value = true)} aria-keyshortcuts="Control+K">
      <${Icon} name="search" size=${16} /><span class="grow">${t("palette.short")}</span><kbd>${modifier} K</kbd>
    </button>
    <div class="row rail-tools">
      <${IconButton}
        icon=${THEMES[chosenTheme] ?? "half"}
        label=${t("theme.is", { name: t(`theme.${chosenTheme}`) })}
        onClick=${() => (theme.value = next)}
      />
      ${hasKey && html`<${IconButton} icon="key" label=${t("login.forget")} onClick=${() => (key.value = null)} />`}
      <${Select}
        aria-label=${t("language.choose")}
        class="language grow"
        value=${language()}
        onChange=${setLanguage}
        options=${Object.entries(LANGUAGES).map(([value, label]) => ({ value, label }))}
      />
    </div>
  `;
}

function useFrameCommands() {
  const now = useLanguage();
  useCommands(
    [
      ...PAGES.map((name, at) => ({
        id: `go-${name}`,
        label: t("palette.go", { page: t(`nav.${name}`) }),
        keys: `g ${"cmapys"[at]}`,
        run: () => go(`/${name}`),
      })),
      { id: "palette", label: t("palette.title"), keys: "mod+k", run: () => (palette.value = true), hidden: true },
      { id: "help", label: t("palette.title"), keys: "?", run: () => (palette.value = true), hidden: true },
      ...Object.keys(THEMES).map((name) => ({
        id: `theme-${name}`,
        label: t("palette.theme", { name: t(`theme.${name}`) }),
        run: () => (theme.value = name),
      })),
      ...Object.entries(LANGUAGES).map(([name, label]) => ({
        id: `language-${name}`,
        label: t("palette.language", { name: label }),
        run: () => setLanguage(name),
      })),
      { id: "key", label: t("login.title"), run: () => (keyWanted.value = true) },
    ],
    [now],
  );
}

function Unreachable() {
  const is = useSignal(reachable);
  useEffect(() => {
    if (is !== false) return undefined;
    const timer = setInterval(() => ask("GET", "/healthz").catch(() => {}), 3000);
    return () => clearInterval(timer);
  }, [is]);
  if (is !== false) return null;
  return html`<div class="banner"><${Attention} tone="bad">${t("error.connection")}<//></div>`;
}

export function App() {
  const route = useRoute();
  const now = useLanguage();
  const inForce = useSignal(key);
  const wanted = useSignal(keyWanted);
  useSignal(chosen);
  useFrameCommands();
  useEffect(() => document.querySelector("main")?.scrollTo?.(0, 0), [route.page]);
  const skip = (event) => {
    event.preventDefault(); // the hash is the router's
    document.getElementById("main").focus();
  };
  return html`
    <a class="skip" href="#main" onClick=${skip}>${t("nav.skip")}</a>
    <div class="frame" key=${now}>
      <${Navigation} page=${route.page} />
      <main id="main" tabindex="-1">
        <${Unreachable} />
        <${Boundary} key=${`${route.page} ${inForce ? "key" : ""}`}><${Shown} route=${route} /><//>
      </main>
    </div>
    <${Palette} />
    ${wanted && html`<${Login} />`}
    <${Questions} />
    <${Toasts} />
  `;
}
