#!/usr/bin/env python3
"""Makes the golden files of tests/data/bpe_tokenizer_test.cpp with Hugging Face's tokenizers.

    pip install tokenizers==0.22.1
    scripts/make_tokenizer_golden.py                          # writes tests/data/golden/
    scripts/make_tokenizer_golden.py MODEL/tokenizer.json     # the same by another tokenizer, on standard output: for
                                                              # MORAINE_TEST_TOKENIZER[_STRINGS]=... build/moraine_data_tests

<variant>.json  a byte-level BPE of 500 tokens with the pre-tokenizer of gpt2, smollm2, llama3 or qwen2
strings.json    strings, and by variant their ids with special tokens recognised and as text, and the first decoded without
                special tokens and with them
"""
import json
import random
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

GOLDEN = Path(__file__).resolve().parent.parent / "tests/data/golden"
CORPUS = """The quick brown fox doesn't jump over the lazy dog; it's what they'd said we'll see, isn't it? I've been there.
Numbers such as 12, 345, 6789 and 3.14159 are split by some and not by others: in 2024 there were 1000000 of them.
def function(argument):\n    for index in range(10):\n        if index % 2 == 0:\n            print(index, argument[index])\n\treturn None\n
#include <vector>\nint main() {\n  std::vector<int> values = {1, 2, 3};\n  return values.size() == 3 ? 0 : 1;\n}\n
Der schnelle braune Fuchs springt über den faulen Hund. Größe, Straße, Äpfel. Été, naïve, garçon, où, cœur.
Быстрая коричневая лиса прыгает через ленивую собаку. 敏捷的棕色狐狸跳过懒狗。素早い茶色の狐。빠른 갈색 여우.
"""
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")


def train(pre_tokenizer, special, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([CORPUS] * 2, trainer)
    return tokenizer


def variants():
    level = pre_tokenizers.ByteLevel
    split = lambda pattern: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level(add_prefix_space=False, use_regex=False)])
    yield "gpt2", train(level(add_prefix_space=True), ["<|endoftext|>"])
    yield "smollm2", train(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level(add_prefix_space=False)]),
                           ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    llama3 = train(split(LLAMA3), ["<|endoftext|>", "<|end|>", "<|end|>of"])
    llama3.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A <|endoftext|> $B", special_tokens=[("<|endoftext|>", 0)])])
    description = json.loads(llama3.to_str())
    description["model"]["ignore_merges"] = True
    # With merges missing, only ignore_merges finds these words.
    description["model"]["merges"] = [merge for merge in description["model"]["merges"] if "".join(merge) not in ("Ġthe", "Ġare", "ing")]
    yield "llama3", Tokenizer.from_str(json.dumps(description))
    qwen2 = train(split(QWEN2), ["<|endoftext|>"], normalizers.NFC())
    qwen2.add_special_tokens([AddedToken("<|mask|>", lstrip=True, rstrip=True, special=True), AddedToken("<|left|>", lstrip=True, special=True)])
    qwen2.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("e\u0301clair", normalized=True), AddedToken(" x ", normalized=False)])
    yield "qwen2", qwen2


def strings():
    words = ["a", " a", "  a", "a ", "a  ", "\ta", "a\t\tb", "\n", "\n\n\n", " \n", "\n ", "a\nb", "a\r\nb", "a \n b", "a\n\n  b", "a  \n", "   ", "\u00a0a",
             "a\u00a0\u00a0b", "\u3000a", "a\u2028b", "a\u2029 b", "a\u0085b", "a\u0085\u0085 b", "a\u180eb", " \u180e b", "a\u200bb", "a\u200d b", "\ufeffa", "a\u1680b", "\x1c\x1d x",
             "a\x0bb", "a\x0c b", "\x00", "a\x00b", "\x7f\x80\x9f", "it's", "IT'S", "It'S we'LL I'VE", "don't", "DON'T", "'s", "''s", "'re're", "x'd'm", "they\u2019re",
             "'\u017f", "it'\u017f", "'\u212a", "\u017f\u212a", "l'ami", "'t\u0301", "12", "123", "1234", "1234567", " 12 345", "3.14", "1,000,000", "v2.0.1", "0x1F",
             "\u0661\u0662\u0663", "\u096a\u096b", "\u2460\u2461", "\u00bd\u00be", "x\u00b2\u00b3", "\u2160\u2161\u2162", "\u4e00\u4e8c\u4e09", "\u3007", "a1b2", "1a 2b", "\U0001d7d8\U0001d7d9",
             "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", " \U0001f44d\U0001f3fd", "\u2764\ufe0f", "\U0001f1e9\U0001f1ea", "e\u0301", "\u00e9", "cafe\u0301s", "a\u0308o\u0308", "q\u0307\u0323",
             "q\u0323\u0307", "\u1e9b\u0323", "\u212b", "\ufb01", "\u1100\u1161\u11a8", "\uac00\u11a8", "\u0344", "\u0958", "\u0301a", " \u0301", "\u0915\u094d\u0937\u093f", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
             "\u05e9\u05b8\u05dc\u05d5\u05b9\u05dd", "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643", "\u0130stanbul \u0131", "stra\u00dfe STRASSE \u1e9e", "\u01c5 \u01c6", "\u02b0\u02b1", "\u00aa\u00ba", "\u00b5\u03bc",
             "\u6d4b\u8bd5\uff0c\u4f60\u597d\u3002", "\u3053\u3093\u306b\u3061\u306f", "\uc548\ub155\ud558\uc138\uc694", "\ud83d".encode("utf-16", "surrogatepass").decode("utf-16", "replace"), "\ufffd", "\ufffe\uffff",
             "\ue000", "\U000e0041", "\U0010ffff", "!?", "...", " ...", "--", "-->", " - ", "a-b", "a_b", "__init__", "(a)", "([{<>}])", "\"q\"", "$5", "\u20ac5", "5%", "#a @b", "a/b\\c", "http://x.y/z?a=1&b=2#c",
             "!!\n\n", "?!\r\n", ";\n}\n", " {\n\t\t}\n", "a;\n\n\n  b", "def f(x):\n    return x\n", "\tif (a) {\r\n\t\tb();\r\n\t}", "x = [1, 2, 3]  # c", "camelCaseWord", "SHOUTING words", "ALLcaps", "a" * 300,
             " " * 40, "\n" * 20, "ab" * 150, "1" * 30, "the the the", " the are ing", "theing", "The quick brown fox", "jumpingoverlazydogs", "<|endoftext|>", "<|endoftext|><|endoftext|>", " <|endoftext|> ",
             "a<|endoftext|>b", "<|endoftext|", "<|ENDOFTEXT|>", "<<|endoftext|>>", "<|im_start|>user\nhi<|im_end|>\n", "<|end|>", "<|end|>of", "<|end|>off", "<|end|>text", "a  <|mask|>  b", "<|mask|> <|mask|>",
             " \n <|mask|> \t", "x <|left|> y", "\u00a0<|left|>", "<tool>", " <tool> x", "<tool>12</tool>", "\u00e9clair", "e\u0301clair", "an e\u0301clair!", "a x b", " x  x ", "x x x", "It's 12 o'clock.", ""]
    generator = random.Random(5)
    ranges = [(0x20, 0x7e), (0xa0, 0x24f), (0x300, 0x36f), (0x370, 0x3ff), (0x400, 0x4ff), (0x5d0, 0x5ea), (0x660, 0x669), (0x904, 0x939), (0xac00, 0xac80), (0x2000, 0x206f), (0x3040, 0x309f), (0x4e00, 0x4fff), (0x1f600, 0x1f64f)]
    for _ in range(40):
        words.append("".join(chr(generator.randint(*generator.choice(ranges))) if generator.random() < 0.6 else generator.choice(" \n'12ase") for _ in range(generator.randint(3, 30))))
    return words


def encodings(tokenizer, texts):
    result = {}
    for name, as_text in (("recognised", False), ("text", True)):
        tokenizer.encode_special_tokens = as_text
        result[name] = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    result["decoded"] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in result["recognised"]]
    result["spelt"] = [tokenizer.decode(ids, skip_special_tokens=False) for ids in result["recognised"]]
    tokenizer.encode_special_tokens = False
    result["prefix"] = tokenizer.encode("").ids
    return result


def main():
    texts = strings()
    if len(sys.argv) > 1:
        print(json.dumps({"strings": texts, "variants": {"given": encodings(Tokenizer.from_file(sys.argv[1]), texts)}}))
        return
    GOLDEN.mkdir(exist_ok=True)
    ids = {}
    for name, tokenizer in variants():
        (GOLDEN / f"{name}.json").write_text(tokenizer.to_str(pretty=False))
        ids[name] = encodings(tokenizer, texts)
    (GOLDEN / "strings.json").write_text(json.dumps({"strings": texts, "variants": ids}, separators=(",", ":")))


if __name__ == "__main__":
    main()
