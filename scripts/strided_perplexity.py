#!/usr/bin/env python3
"""Prints the sliding-window perplexity that transformers computes, for our tests to compare with.

    python3 scripts/strided_perplexity.py MODEL_FOLDER TEXT_FILE CONTEXT STRIDE [END_TOKEN]

The loop is that of transformers' documentation ("Perplexity of fixed-length models"), in float32 on the
CPU with eager attention. One thing is mended: the documentation takes one from the number of targets of
every window, though only the first one loses a target to the shift of the labels, so its mean is weighed
a little differently. Here each window counts the targets that its loss is the mean of.

With END_TOKEN the text is cut at each `<|endoftext|>`, as in the stories of the golden data, and each piece
is a text of its own with that token at its end. It needs the network once: the packages go into the
virtual environment of make_reference_models.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "target" / "reference-venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
PACKAGES = ["torch==2.9.1", "transformers==5.23.0", "tokenizers==0.23.3", "safetensors==0.8.0", "accelerate==1.15.0"]


def enter_environment():
    """Goes on in an environment that has the packages, made first if it is not there."""
    if subprocess.run([sys.executable, "-c", "import torch, transformers"], capture_output=True).returncode == 0:
        return
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    subprocess.run([PYTHON, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    sys.exit(subprocess.run([PYTHON, __file__, *sys.argv[1:]]).returncode)


if len(sys.argv) not in (5, 6):
    sys.exit(__doc__)
# The quantisers are decorated with torch.compile; fused code may round otherwise.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
enter_environment()

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def strided(model, ids, context, stride):
    """Sum of -log p and number of targets of one text, `ids: [1, tokens]`."""
    nll, targets, scored_to = 0.0, 0, 0
    for begin in range(0, ids.size(1), stride):
        end = min(begin + context, ids.size(1))
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : window.size(1) - (end - scored_to)] = -100
        count = int((labels[:, 1:] != -100).sum())
        if count > 0:
            with torch.no_grad():
                nll += float(model(window, labels=labels).loss) * count
            targets += count
        scored_to = end
        if end == ids.size(1):
            break
    return nll, targets


def main():
    folder, text, context, stride = sys.argv[1], Path(sys.argv[2]).read_text(), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = [text]
    if len(sys.argv) == 6:
        pieces = [piece.strip() + sys.argv[5] for piece in text.split("<|endoftext|>") if piece.strip()]
    nll, targets = 0.0, 0
    for piece in pieces:
        piece_nll, piece_targets = strided(model, tokenizer(piece, return_tensors="pt").input_ids, context, stride)
        nll, targets = nll + piece_nll, targets + piece_targets
    perplexity = torch.tensor(nll / targets, dtype=torch.float64).exp().item()
    json.dump(
        {
            "context": context,
            "stride": stride,
            "texts": len(pieces),
            "tokens": targets,
            "nll_sum": round(nll, 4),
            "perplexity": round(perplexity, 6),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        sys.stdout,
    )
    print()


main()
