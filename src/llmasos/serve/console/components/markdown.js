/** Markdown, sanitised: no scripts, no styles, no forms, and no images from elsewhere, which would tell that they were seen. */

import { html, useEffect, useMemo, useRef, useState } from "../core/html.js";
import { t } from "../core/i18n.js";
import { toast } from "./toast.js";

/** Text as sanitised HTML; there once the libraries are, which come with the first text. */
let toHTML = null;
let loading;

function load() {
  loading ??= Promise.all([import("../vendor/marked.js"), import("../vendor/purify.js")]).then(([{ marked }]) => {
    const purify = globalThis.DOMPurify(window);
    purify.addHook("afterSanitizeAttributes", harmless);
    marked.use({ gfm: true, breaks: true, renderer });
    toHTML = (text) => purify.sanitize(marked.parse(text, { async: false }), RULES);
  });
  return loading;
}

function harmless(node) {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
  if (node.tagName === "IMG" && !/^(data:image\/|blob:)/.test(node.getAttribute("src") ?? "")) {
    const link = document.createElement("a");
    Object.assign(link, { href: node.getAttribute("src") ?? "", target: "_blank", rel: "noopener noreferrer" });
    link.textContent = node.getAttribute("alt") || node.getAttribute("src") || "";
    node.replaceWith(link);
  }
  if (node.tagName === "PRE") node.setAttribute("tabindex", "0");
}
const RULES = {
  USE_PROFILES: { html: true },
  FORBID_TAGS: ["style", "form", "input", "button", "textarea", "select", "dialog", "video", "audio", "source", "track"],
  FORBID_ATTR: ["style", "class", "id", "name", "srcset", "background", "poster", "autofocus", "tabindex"],
};

/** Text that models write as HTML is shown as they wrote it. */
const renderer = {
  html: ({ text }) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;"),
};

export function Markdown({ text }) {
  const ref = useRef();
  const [, draw] = useState(0);
  const isReady = toHTML !== null;
  const written = useMemo(() => isReady && { __html: toHTML(text ?? "") }, [text, isReady]);
  useEffect(() => void (isReady || load().then(() => draw(1))), []);
  useEffect(() => {
    for (const pre of ref.current.querySelectorAll("pre")) addCopy(pre);
  }, [written]);
  if (!isReady) return html`<div class="markdown asked-text" ref=${ref} key="plain">${text}</div>`;
  return html`<div class="markdown" key="written" ref=${ref} dangerouslySetInnerHTML=${written} />`;
}

function addCopy(pre) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "button button-small copy" });
  button.textContent = t("word.copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(pre.querySelector("code")?.textContent ?? "");
      toast(t("word.copied"), { tone: "ok" });
    } catch {
      toast(t("error.copy"), { tone: "bad" });
    }
  });
  const frame = document.createElement("div");
  frame.className = "pre";
  pre.replaceWith(frame);
  frame.append(pre, button);
}
