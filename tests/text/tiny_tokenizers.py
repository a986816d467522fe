"""Tiny tokenizers of every kind, trained here."""

import itertools

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

WORDS = """the quick brown fox jumps over lazy dog hello world streaming tokens
über größe café привет мир 你好 世界 it's don't"""
CORPUS = [" ".join(p) for p in itertools.islice(itertools.permutations(WORDS.split(), 4), 0, 40000, 37)]
CORPUS += ["numbers 1 22 333 4444, punctuation! (yes) - no?", "line\nbreaks\n\nand\ttabs", "emoji 🚀 and 😶‍🌫️ too"] * 5

TEXTS = [
    "",
    " ",
    "hello world",
    "  Hello,   WORLD!  ",
    "don't stop: it's 2024\n\n\tover 12345",
    "größe café ÜBER naïve",
    "привет 你好世界 🚀 😶‍🌫️ कि",
    "the</s><s> fox <mask> [MASK] <|end|> jumps",
    "a\u0300 \u00a0 \u200b x\r\ny",
]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 0)]
    )
    return backend


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece("##", cleanup=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return backend


def metaspace_unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_fallback() -> Backend:
    """As Llama 2's: BPE on characters, `▁` for spaces, `<0x..>` for what has no token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"helo wrdt", "he", "▁he", "ll", "🚀"]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("h", "e"), ("▁", "he"), ("l", "l")]
    backend = Backend(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    return backend


def suffix_bpe() -> Backend:
    """As the first GPT's: words end in `</w>`."""
    backend = Backend(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


KINDS = {
    "byte_level": byte_level,
    "word_piece": word_piece,
    "metaspace_unigram": metaspace_unigram,
    "byte_fallback": byte_fallback,
    "suffix_bpe": suffix_bpe,
}
