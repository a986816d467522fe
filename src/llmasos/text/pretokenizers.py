"""Which regular expressions cut text into words before byte-level BPE, by the name a GGUF file gives in
`tokenizer.ggml.pre`.

Sources: the `pre_tokenizer` of each model's own tokenizer.json, and the table of names in llama.cpp
(src/llama-vocab.cpp). Where the two write a pattern differently, the form of tokenizer.json is taken: the model was
trained with it. Every pattern of a list is applied in turn to the pieces that the one before left; what no pattern
matches stays a piece.

Not here: `kimi-k2` and `afmoe`, whose splits are programs rather than patterns, and the DNA tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _gpt4(digits: str, *, contractions: str = _CONTRACTIONS + "|", spaces: str = _SPACES) -> str:
    """The pattern of GPT-4's family: llama 3, qwen 2 and others differ in how many digits make a word."""
    return rf"{contractions}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{spaces}"


def _cased(digits: str, suffix: str, *, spaces: str = _SPACES) -> str:
    """The pattern of GPT-4o's family: a word also ends where a capital follows a small letter."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{spaces}"


# Letters that have case, as an older edition of Unicode lists them; escaped, since some of them normalise to others.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_V3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_CJK_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"


@dataclass(frozen=True)
class PreTokenizer:
    """`patterns` in order; `ignore_merges`: a word that is a token needs no merges; `bos`: a BOS is put in front by
    default.

    `sep`: text pairs and ends are marked as RoBERTa does (`<s> a </s></s> b </s>`).
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    bos: bool = False
    sep: bool = False


_gpt2 = PreTokenizer((_GPT2,))
_digits_gpt2 = PreTokenizer((r"\p{N}", _GPT2))
_llama3 = PreTokenizer((_gpt4(r"\p{N}{1,3}"),), ignore_merges=True, bos=True)
_dbrx = PreTokenizer((_gpt4(r"\p{N}{1,3}"),))
_qwen2 = PreTokenizer((_gpt4(r"\p{N}"),))
_bloom = PreTokenizer((_BLOOM,))
_gpt4o = PreTokenizer((_cased(r"\p{N}{1,3}", _CONTRACTIONS + "?"),))
_deepseek3 = PreTokenizer((r"\p{N}{1,3}", _CJK_KANA, rf"{_DEEPSEEK_V3_WORDS}[\r\n]*|{_SPACES}"))
_bailing = PreTokenizer((_gpt4(r"\p{N}", contractions=r"'(?i:[sdmt]|ll|ve|re)|", spaces=r"\s*[\r\n]|\s+(?!\S)|\s+"),))
_aya = PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _cased(r"\p{N}{1,3}", _CONTRACTIONS + "?")))

_FAMILIES: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2 gpt2 gpt-neox phi-2 mpt olmo jais trillion granite-docling jina-es jina-de jina-v2-es jina-v2-de gigachat "
    "a.x-4.0 mellum modern-bert exaone4": _gpt2,
    "roberta-bpe jina-v1-en jina-v2-code": replace(_gpt2, sep=True),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": _digits_gpt2,
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": _llama3,
    "dbrx smaug-bpe chatglm-bpe": _dbrx,
    "glm4 glm5": replace(_dbrx, ignore_merges=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": _qwen2,
    "qwen35": PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        )
    ),
    "ufakzeka": PreTokenizer((_gpt4(r"\p{N}", contractions=""),)),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", _gpt4(r"\p{N}"))),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _gpt4(r"\p{N}+")), ignore_merges=True),
    "bailingmoe bailingmoe2 llada-moe": _bailing,
    "seed-coder": PreTokenizer(
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)
    ),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _gpt4o,
    "granite-embed-multi-97m": replace(_gpt4o, ignore_merges=True),
    "tekken": PreTokenizer((_cased(r"\p{N}", ""),), ignore_merges=True, bos=True),
    "tiny_aya cohere2moe": _aya,
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
            r"\s+$",
            "[一-龥\u0800-一가-\ud7ff]+",
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _deepseek3,
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "bloom poro-chat gpt3-finnish": _bloom,
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
    "jais-2": PreTokenizer(
        (
            _gpt4(
                r"\p{N}{1,3}",
                spaces=r"\s*[\r\n]+|"
                + "|".join(rf"\s{{{2**n}}}(?!\S)" for n in range(9, 1, -1))
                + r"|\s{1,2}(?!\S)|\s",
            ),
        )
    ),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "exaone-moe": PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "chameleon": PreTokenizer(
        (
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        bos=True,
    ),
}

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: pre for names, pre in _FAMILIES.items() for name in names.split()}

# GGUF files written before `tokenizer.ggml.pre` existed: the architecture alone decides for these.
PRE_BY_ARCHITECTURE = {
    "gpt2": "gpt-2",
    "gptneox": "gpt-2",
    "gptj": "gpt-2",
    "mpt": "mpt",
    "phi2": "phi-2",
    "olmo": "olmo",
    "falcon": "falcon",
    "bloom": "bloom",
    "starcoder": "starcoder",
    "starcoder2": "starcoder",
    "refact": "refact",
    "command-r": "command-r",
    "qwen": "qwen2",
    "qwen2": "qwen2",
    "stablelm": "stablelm2",
}
