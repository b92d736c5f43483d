#!/usr/bin/env python3
"""Compares our SentencePiece tokenizers with Google's `sentencepiece` on models trained here.

Trains small BPE and unigram models that differ in every setting we read, encodes about two
thousand texts with both programs and reports every disagreement in ids or decoded text.

    python3 scripts/check_sentencepiece.py TRAINING_TEXT

Makes a virtual environment under target/ and installs `sentencepiece` there with pip; everything
else it writes is there too. Exit status 0 if all models agree on all texts, 1 if not.
"""

import json
import os
import random
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "target" / "check-sentencepiece"

# What each model is there to test. Llama's and 1bitLLM's settings come first.
MODELS = {
    "bpe-llama": dict(
        model_type="bpe", vocab_size=2000, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True,
    ),
    "bpe-nmt-nfkc": dict(model_type="bpe", vocab_size=1500, byte_fallback=True),
    "bpe-unknown": dict(model_type="bpe", vocab_size=900, add_dummy_prefix=False),
    "bpe-user-defined": dict(
        model_type="bpe", vocab_size=1500, byte_fallback=True,
        user_defined_symbols=["<sep>", "the", "  ", "once upon"],
        normalization_rule_name="nfkc_cf",
    ),
    "bpe-across-words": dict(
        model_type="bpe", vocab_size=1500, split_by_whitespace=False,
        normalization_rule_name="identity",
    ),
    "unigram": dict(model_type="unigram", vocab_size=1500),
    "unigram-bytes": dict(
        model_type="unigram", vocab_size=1500, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    ),
    "unigram-user-defined": dict(
        model_type="unigram", vocab_size=1200,
        user_defined_symbols=["<sep>", "the", "once upon"], normalization_rule_name="nfkc",
    ),
}

# No surrogates: they are not text. The rest is what breaks tokenizers.
SNIPPETS = [
    "", " ", "  ", "   ", "\n", "\t", "\r\n", "a", " a", "a ", " a ", "  two  spaces  ", "▁", "▁▁a",
    "<s>", "</s>", "<unk>", "<0x41>", "<sep>", "a<sep>b", " <sep> ", "the", "thethe", "other",
    "Once upon a time", "once upon", "ONCE UPON", "1234567890", "3.14159", "१२३", "½", "ﬁ ﬂ ㍻ ™ Å",
    "ｆｕｌｌ　ｗｉｄｔｈ", "é", "e\u0301", "Führer", "naïve café", "日本語のテキスト", "한국어", "ภาษาไทย",
    "العربية", "עברית", "नमस्ते", "😀", "👩‍👩‍👧‍👦", "🇩🇪", "\u200b", "\u00a0", "\u3000", "\ufeff",
    "\ufffd", "\x00", "\x01\x02", "a\x00b", "\u2028", "zzzzzzzzzzzzzzzz", "aaaaaaaaaaaaaaaaa",
    "abababababababab", "hahahahahahaha", "nananananananana", "toto toto", "ooooooh", "...", "!?!?",
    "don't we'll I'm", "http://example.org/a?b=c&d", "def f(x):\n    return x\n", "\u0130\u00df",
    "한국어 and English", "\U0010ffff", "\ue000",
]


def sentencepiece_module():
    """`sentencepiece`, from our own environment."""
    environment = WORK / "venv"
    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "sentencepiece"], check=True)
    if Path(sys.prefix).resolve() != environment.resolve():
        os.execv(python, [python, __file__, *sys.argv[1:]])
    import sentencepiece

    return sentencepiece


def texts(training_text):
    """Fixed snippets, pieces of stories, and random mixtures of both with random characters."""
    chance = random.Random(20)
    alphabet = "aabbccddeeeehinorst   \n'.,é日😀▁\u0301"
    result = list(SNIPPETS)
    lines = [line for line in training_text.splitlines() if line]
    for _ in range(500):
        line = chance.choice(lines)
        start = chance.randrange(len(line))
        result.append(line[start : start + chance.randrange(1, 300)])
    for _ in range(700):
        result.append("".join(chance.choices(alphabet, k=chance.randrange(1, 40))))
    for _ in range(400):
        # Few letters, many ties.
        letters = chance.choice(["ab", "na", "to ", "he", "el l"])
        result.append("".join(chance.choices(letters, k=chance.randrange(1, 60))))
    for _ in range(400):
        parts = chance.choices(SNIPPETS, k=chance.randrange(2, 6))
        result.append(chance.choice(["", " ", "  "]).join(parts))
    return result


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sentencepiece = sentencepiece_module()
    training_path = Path(sys.argv[1])
    cases = texts(training_path.read_text(encoding="utf-8"))
    stdin = "".join(json.dumps(text) + "\n" for text in cases)
    subprocess.run(
        ["cargo", "build", "--quiet", "-p", "bitnet-model", "--example", "encode"],
        cwd=ROOT, check=True,
    )
    program = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"), "debug/examples/encode")

    agree = True
    for name, settings in MODELS.items():
        prefix = WORK / name
        if not prefix.with_suffix(".model").exists():
            sentencepiece.SentencePieceTrainer.train(
                input=str(training_path), model_prefix=str(prefix), minloglevel=2,
                max_sentence_length=1 << 16, **settings,
            )
        model = prefix.with_suffix(".model")
        reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
        ours = subprocess.run([program, model], input=stdin.encode(), stdout=subprocess.PIPE)
        if ours.returncode != 0:
            sys.exit(f"{name}: our program failed")
        ours = [json.loads(line) for line in ours.stdout.splitlines()]
        different_ids, different_texts = [], []
        for text, mine in zip(cases, ours, strict=True):
            ids = reference.encode(text)
            if mine["ids"] != ids:
                different_ids.append((text, ids, mine["ids"]))
            # Only SentencePiece shows the unknown token as ` ⁇ `.
            elif reference.unk_id() not in ids and mine["text"] != reference.decode(ids):
                different_texts.append((text, reference.decode(ids), mine["text"]))
        print(
            f"{name}: {len(cases) - len(different_ids)} of {len(cases)} texts have the same ids, "
            f"{len(different_texts)} of these decode otherwise"
        )
        for text, expected, mine in (different_ids + different_texts)[:5]:
            print(f"  {text!r}\n    sentencepiece {expected!r}\n    ours          {mine!r}")
        agree = agree and not different_ids and not different_texts
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
