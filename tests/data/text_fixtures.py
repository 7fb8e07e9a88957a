"""Small texts and tokenisers for the tests of scripts/prepare_text.py and of its reader.

As a program: text_fixtures.py FOLDER writes bytes.h5 and hf.h5 there with prepare_text.py, and expected.json with what they
must hold, computed here from the rules in docs/data.md. Exit code 77: a Python package is missing.
"""
import hashlib
import json
import pathlib
import random
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
sys.dont_write_bytecode = True
try:
    import prepare_text
    import tokenizers
except ImportError as missing:
    print(f"skipped: {missing}; run scripts/setup")
    sys.exit(77)

END = "<|endoftext|>"
WORDS = ("Schnee fällt leise auf den Gletscher , moraines mark where ice once stood ; naïve cost 5 € per mètre 🏔 and more").split()


def text(seed, words=120):
    """Random words: no two texts share much."""
    source = random.Random(seed)
    return " ".join(source.choice(WORDS) + str(source.randrange(1000)) for _ in range(words)) + "\n"


def write_tokenizer(path, end_of_document=END):
    """A byte-level BPE of 600 tokens, set to truncate and pad as some published files are."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator((text(seed) for seed in range(50)), tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=[end_of_document], show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(path))


def side(content, validation=0.2, test=0.2):
    """The rule of docs/data.md for a document without near-duplicates."""
    inner = hashlib.sha256(content).digest()
    place = int(hashlib.sha256(b"moraine-split-v1" + inner).hexdigest()[:16], 16) / 2**64
    return "test" if place < test else "validation" if place < test + validation else "train"


def main(folder):
    contents = [text(seed).encode() for seed in range(40)]
    (folder / "text").mkdir()
    for number, content in enumerate(contents):
        (folder / "text" / f"{number}.txt").write_bytes(content)
    write_tokenizer(folder / "tokenizer.json")
    bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bpe.no_truncation()
    bpe.no_padding()
    encoders = {
        "bytes": ("bytes-v1", lambda content: list(content) + [256]),
        "hf": ("hf:" + hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
               lambda content: bpe.encode(content.decode()).ids + [bpe.token_to_id(END)]),
    }
    expected = {}
    for name, (tokenizer, encode) in encoders.items():
        options = ["--tokenizer", str(folder / "tokenizer.json")] if name == "hf" else []
        code = prepare_text.main(["--name", name, "--out", str(folder / f"{name}.h5"), "--validation", "0.2", "--test", "0.2",
                                  *options, str(folder / "text")])
        if code:
            sys.exit(code)
        splits = {}
        for split in ("train", "validation", "test"):
            chosen = sorted((c for c in contents if side(c) == split), key=lambda c: hashlib.sha256(c).digest())
            splits[split] = {"tokens": [token for c in chosen for token in encode(c)], "bytes": sum(map(len, chosen))}
        expected[name] = {"tokenizer": tokenizer, "splits": splits}
    (folder / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
