/** Tokens as vocabularies write them, and what a list of them looks like as text. No page. */

/** GPT-2's alphabet for bytes: printable ones stand for themselves, the others for characters from U+0100 on. */
const BYTES = new Map();
for (let byte = 0, next = 256; byte < 256; byte++) {
  const isPrintable = (byte > 32 && byte < 127) || (byte > 160 && byte < 173) || byte > 173;
  BYTES.set(String.fromCodePoint(isPrintable ? byte : next++), byte);
}

const hex = /^<0x([0-9A-F]{2})>$/;
const utf8 = new TextEncoder();

/** How a vocabulary writes: "bytes" (GPT-2: Ġ is a space), "sentencepiece" (▁ is one), "plain". */
export function alphabetOf(tokens) {
  if (tokens.some((token) => token.startsWith("▁") || hex.test(token))) return "sentencepiece";
  const all = tokens.join("");
  if (/[ĠĊ]/.test(all)) return "bytes";
  // Without a space or a line: its characters for bytes are UTF-8 together, which others are by chance only.
  const bytes = [...all].map((character) => BYTES.get(character));
  return /[^\x00-\x7f]/.test(all) && !bytes.includes(undefined) && isUtf8(bytes) ? "bytes" : "plain";
}

function isUtf8(bytes) {
  try {
    new TextDecoder("utf-8", { fatal: true }).decode(Uint8Array.from(bytes));
    return true;
  } catch {
    return false;
  }
}

function bytesOf(token, alphabet) {
  if (alphabet === "sentencepiece") {
    const byte = hex.exec(token);
    return byte ? Uint8Array.of(parseInt(byte[1], 16)) : utf8.encode(token.replaceAll("▁", " "));
  }
  const bytes = alphabet === "bytes" ? [...token].map((character) => BYTES.get(character)) : [undefined];
  return bytes.includes(undefined) ? utf8.encode(token) : Uint8Array.from(bytes);
}

/**
 * [{ids, tokens, text}] in order: one entry per token, but one for tokens that make a character only together (each of
 * them holds a part of its bytes).
 */
export function pieces(ids, tokens) {
  const alphabet = alphabetOf(tokens);
  const found = [];
  let open; // {ids, tokens, bytes} whose last character is not whole
  tokens.forEach((token, i) => {
    const bytes = bytesOf(token, alphabet);
    const at = open ?? { ids: [], tokens: [], bytes: [] };
    at.ids.push(ids[i]);
    at.tokens.push(token);
    at.bytes.push(...bytes);
    open = isCut(at.bytes) && at.tokens.length < 8 ? at : undefined;
    if (!open || i === tokens.length - 1) found.push({ ids: at.ids, tokens: at.tokens, text: new TextDecoder().decode(Uint8Array.from(at.bytes)) });
  });
  return found;
}

/** Whether bytes end inside of a character of UTF-8. */
function isCut(bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back++) {
    const byte = bytes[bytes.length - back];
    if (byte >= 0xc0) return back < (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2);
    if (byte < 0x80) return false;
  }
  return false;
}

/** Spaces and line ends that can be seen. */
export const visible = (text) => text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t");

export const cosine = (a, b) => {
  const dot = (x, y) => x.reduce((sum, one, i) => sum + one * y[i], 0);
  return dot(a, b) / (Math.sqrt(dot(a, a) * dot(b, b)) || 1);
};
