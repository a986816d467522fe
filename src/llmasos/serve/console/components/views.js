/** How a result is best looked at. No page. */

const MARKDOWN = /(^|\n)(#{1,6} \S|[-*] \S.*\n[-*] |\d+\. \S.*\n\d+\. |```|\|.+\|\n\|[-: |]+\||> \S)|\*\*\S[^*]*\*\*/;

/** `data:image/png;base64,…` -> {kind: image | audio | file, type}. */
export function mediaOf(value) {
  if (typeof value !== "string" || !value.startsWith("data:")) return undefined;
  const type = /^data:([\w.+-]+\/[\w.+-]+)?(;[^;,]*)*,/.exec(value.slice(0, 1000))?.[1];
  if (!type) return undefined;
  const kind = type.split("/")[0];
  // SVG in an <img> runs no script.
  return { kind: kind === "image" || kind === "audio" ? kind : "file", type };
}

const isPlain = (value) => value === null || typeof value !== "object";

/** {columns, rows} of a list of flat objects, or of one flat object of lists of equal length; undefined for the rest. */
export function tableOf(value) {
  if (!Array.isArray(value) || !value.length || value.length > 5000) return undefined;
  const areRows = value.every((row) => row && typeof row === "object" && !Array.isArray(row));
  if (!areRows) return undefined;
  const columns = [...new Set(value.flatMap((row) => Object.keys(row)))];
  const flat = value.every((row) => Object.values(row).every((cell) => isPlain(cell) || isShortList(cell)));
  return columns.length && columns.length <= 24 && flat ? { columns, rows: value } : undefined;
}

const isShortList = (value) => Array.isArray(value) && value.length <= 8 && value.every(isPlain);

/** The ways to look at a value, the best first: image, audio, file, markdown, text, table, tree, json. `wanted`: what the
 * route says is best; it counts where the value can be looked at so. */
export function viewsOf(value, wanted) {
  const found = waysOf(value);
  const first = wanted === "json" && found.includes("tree") ? "tree" : wanted;
  return found.includes(first) ? [first, ...found.filter((one) => one !== first)] : found;
}

function waysOf(value) {
  const media = mediaOf(value);
  if (media) return [media.kind, "text"];
  if (typeof value === "string") return MARKDOWN.test(value) ? ["markdown", "text"] : ["text", "markdown"];
  if (isPlain(value)) return ["json"];
  return tableOf(value) ? ["table", "tree", "json"] : ["tree", "json"];
}
