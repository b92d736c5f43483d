#!/usr/bin/env python3
"""Gives what `bitnet convert` writes to other programs, and compares what they make of it.

    python3 scripts/check_conversions.py [gguf] [llama-cpp] [transformers] [--bitnet PROGRAM]

Run from anywhere, after `cargo build --release`. Each client goes into a virtual environment under
target/ the first time, which needs the network: `gguf` some megabytes, llama-cpp-python a C++ compiler,
transformers several gigabytes of PyTorch. All three run unless some are named.

gguf          The `gguf` package of llama.cpp reads files of TQ1_0 and TQ2_0 layers and of heads of every
              type; its values of every tensor must be the bits that we read, and its tokens ours.
llama-cpp     llama-cpp-python runs a Llama-form model with SiLU whose rows are multiples of 256, made
              here with random weights. It quantises inputs by blocks of 256 and keeps them in other
              precision, so the greedy tokens must be ours wherever our best token leads clearly.
transformers  Folders of float weights and packed ones, from a native file, load in transformers in
              float32 and give our logits within a ten-thousandth of their deviation. Where the last
              bit of a scale makes one int8 input another, later positions may be 0.3 deviations off;
              they are counted, and must be few.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "crates" / "bitnet-testing" / "golden"
TINY = ROOT / "models" / "tiny"
CLIENTS = {
    "gguf": ["gguf==0.19.0", "numpy"],
    "llama-cpp": ["llama-cpp-python==0.3.36", "numpy"],
    "transformers": ["torch==2.9.1", "transformers==5.23.0", "accelerate==1.15.0", "safetensors==0.8.0", "numpy"],
}


def environment(client):
    """Python of a client's environment, made first if it is not there."""
    venv = ROOT / "target" / f"{client}-venv"
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (venv / "whole").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *CLIENTS[client]], check=True)
        (venv / "whole").touch()
    return python


def bitnet(*arguments):
    """What the program prints, which must succeed."""
    done = subprocess.run([ARGS.bitnet, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"bitnet {' '.join(map(str, arguments))}: {done.stderr}")
    return done.stdout


def convert(source, target, *flags):
    bitnet("convert", source, target, "--quiet", *flags)
    return target


def our_logits(model, tokens):
    joined = ",".join(map(str, tokens))
    return json.loads(bitnet("logits", "--tokens", joined, "-m", model, "--all", "--json"))["logits"]


def check_gguf(folder):
    """The gguf package reads what we write."""
    import gguf
    import numpy as np
    from gguf.quants import dequantize

    def values(path):
        reader = gguf.GGUFReader(path)
        tensors = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
        return reader, tensors

    _, exact = values(convert("tiny", folder / "f32.gguf", "--type", "tq2_0", "--head", "f32"))
    for packing in ["tq1_0", "tq2_0"]:
        for head in ["bf16", "f16", "q8_0", "q6_k", "f32"]:
            path = convert("tiny", folder / f"{packing}-{head}.gguf", "--type", packing, "--head", head)
            reader, tensors = values(path)
            assert tensors.keys() == exact.keys()
            for name, found in tensors.items():
                wanted = exact[name]
                if name == "token_embd.weight":
                    off = np.abs(found - wanted).max() / np.abs(wanted).max()
                    # Bits of the mantissa, of 8-bit steps, of 6-bit steps with 8-bit scales.
                    bound = {"f32": 0, "bf16": 0, "f16": 2**-11, "q8_0": 2**-7, "q6_k": 2**-4}[head]
                    assert off <= bound, (path, off)
                else:
                    assert np.array_equal(found, wanted), (path, name)
                if head == "q8_0" and name == "token_embd.weight":
                    theirs = gguf.quants.quantize(wanted, gguf.GGMLQuantizationType.Q8_0)
                    stored = next(t.data for t in reader.tensors if t.name == name)
                    assert np.array_equal(theirs, stored), "Q8_0 as the package rounds it"
            field = reader.get_field("tokenizer.ggml.tokens").contents()
            vocabulary = json.loads((TINY / "tokenizer.json").read_text())
            by_id = {v: k for k, v in vocabulary["model"]["vocab"].items()}
            by_id |= {t["id"]: t["content"] for t in vocabulary["added_tokens"]}
            assert all(field[i] == token for i, token in by_id.items())
            assert reader.get_field("tokenizer.ggml.pre").contents() == "llama-bpe"
    print("gguf: 10 files, every tensor and token as it should be")


def make_llama(folder):
    """A Llama-form checkpoint with SiLU and rows of multiples of 256, packed, with random weights."""
    import random
    import struct

    chance = random.Random(20)
    hidden, ffn, layers, heads, kv_heads, vocabulary = 256, 512, 3, 4, 2, 2048
    folder.mkdir()
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]:
        shutil.copy(TINY / name, folder)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "float32",
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear",
                                "quantization_mode": "offline"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    kv = hidden // heads * kv_heads
    linears = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
               "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
               "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
               "mlp.down_proj": (hidden, ffn)}
    tensors = {}

    def floats(name, shape, make):
        count = 1
        for extent in shape:
            count *= extent
        tensors[name] = ("F32", shape, struct.pack(f"<{count}f", *(make() for _ in range(count))))

    # A head that is far from the embedding's transpose makes some tokens much likelier than others.
    floats("model.embed_tokens.weight", [vocabulary, hidden], lambda: chance.gauss(0, 1))
    floats("lm_head.weight", [vocabulary, hidden], lambda: chance.gauss(0, 1) ** 3)
    floats("model.norm.weight", [hidden], lambda: chance.uniform(0.5, 1.5))
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ["input_layernorm", "post_attention_layernorm"]:
            floats(f"{prefix}.{name}.weight", [hidden], lambda: chance.uniform(0.5, 1.5))
        for name, (rows, cols) in linears.items():
            codes = bytes(
                sum(chance.choice((0, 1, 1, 2)) << shift for shift in (0, 2, 4, 6))
                for _ in range(rows // 4 * cols)
            )
            tensors[f"{prefix}.{name}.weight"] = ("U8", [rows // 4, cols], codes)
            # An f16 number, so that no format rounds it.
            tensors[f"{prefix}.{name}.weight_scale"] = ("F32", [1], struct.pack("<f", 0.0625))
    header, position = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        end = position + len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            file.write(data)
    return folder


def check_llama_cpp(folder):
    """llama-cpp-python runs what we write and chooses the tokens that we choose."""
    import numpy as np
    from llama_cpp import Llama

    source = make_llama(folder / "llama")
    stated, clear = 0, 0
    for packing in ["tq2_0", "tq1_0"]:
        path = convert(source, folder / f"{packing}.gguf", "--type", packing, "--head", "f32")
        theirs = Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=2)
        for text in ["Once upon a time", "The little dog", "\n12 + 34", "Lily's mom said"]:
            prompt = json.loads(bitnet("tokenize", text, "-m", path, "--json"))["ids"]
            assert theirs.tokenize(text.encode(), add_bos=True) == prompt, (text, prompt)
            run = bitnet("run", "--tokens", ",".join(map(str, prompt)), "-m", path, "-n", "24",
                         "--ignore-eos", "--json")
            tokens = prompt + json.loads(run)["tokens"]
            ours = np.array(our_logits(path, tokens))
            theirs.reset()
            theirs.eval(tokens)
            others = np.array(theirs.scores[: len(tokens)])
            deviation = ours.std(axis=1)
            off = np.abs(ours - others).max(axis=1) / deviation
            ordered = np.sort(ours, axis=1)
            margin = (ordered[:, -1] - ordered[:, -2]) / deviation
            same = ours.argmax(axis=1) == others.argmax(axis=1)
            for position in range(len(tokens)):
                stated += 1
                # Twice the largest error is the least lead that no such error can turn.
                if margin[position] > 2 * off[position]:
                    clear += 1
                    assert same[position], (packing, text, position)
            print(f"llama-cpp: {packing} {text!r}: off by at most {off.max():.3f} deviations, "
                  f"{int(same.sum())} of {len(tokens)} best tokens the same")
            assert off.max() < 0.5, "more than its rounding of inputs explains"
    assert clear > stated / 2, "the margins of most positions say nothing"
    print(f"llama-cpp: the same best token at all {clear} of {stated} positions with a clear lead")


def check_transformers(folder):
    """transformers loads what we write and computes what we compute."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()

    shared = ROOT.parent / "shared" / "golden"
    sources = [GOLDEN / "llama-1.58-packed", GOLDEN / "trilm", GOLDEN / "llama3-rope"]
    sources += [shared / name for name in ("bitnet-bf16", "bitnet-packed", "bitnet-sharded")]
    for source in sources:
        if not source.exists():
            print(f"skipped: {source} is not there")
            continue
        golden = json.loads((source / "golden.json").read_text())
        prompts = [prompt["ids"] for prompt in golden["prompts"][:3]]
        native = convert(source, folder / f"{source.name}.bitnet")
        for to in ["hf", "hf-packed"]:
            path = folder / f"{source.name}-{to}"
            done = subprocess.run([ARGS.bitnet, "convert", native, path, "--to", to, "--quiet"],
                                  capture_output=True, text=True)
            if done.returncode != 0:
                print(f"transformers: {source.name} {to}: {done.stderr.strip()}")
                continue
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager")
            # What it unpacks itself has the type of config.json.
            model = torch.nn.Module.float(model)
            tokenizer = AutoTokenizer.from_pretrained(path)
            text = "Once upon a time, 12345 dogs\n\tdidn't say naïve 日本語."
            ids = json.loads(bitnet("tokenize", text, "-m", source, "--json"))["ids"]
            assert tokenizer(text)["input_ids"] == ids, (source.name, tokenizer(text)["input_ids"], ids)
            off = np.empty(0)
            for prompt in prompts:
                ours = np.array(our_logits(path, prompt))
                with torch.no_grad():
                    theirs = model(torch.tensor([prompt])).logits[0].numpy()
                off = np.append(off, np.abs(ours - theirs).max(axis=1) / theirs.std(axis=1))
            far = int((off > 1e-4).sum())
            print(f"transformers: {source.name} {to}: off by at most {off.max():.1e} deviations, "
                  f"{far} of {len(off)} positions by more than 1e-4")
            assert off.max() < 0.3 and 4 * far <= len(off), "transformers computes something else"


def main():
    if ARGS.inside is None:
        for client in ARGS.clients or CLIENTS:
            command = [environment(client), __file__, client, "--inside", client, "--bitnet", ARGS.bitnet]
            subprocess.run(command, check=True)
        return
    check = {"gguf": check_gguf, "llama-cpp": check_llama_cpp, "transformers": check_transformers}
    with tempfile.TemporaryDirectory() as folder:
        check[ARGS.inside](Path(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help="gguf, llama-cpp or transformers")
    parser.add_argument("--bitnet", default=str(ROOT / "target" / "release" / "bitnet"), help="the program")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    ARGS = parser.parse_args()
    if unknown := set(ARGS.clients) - CLIENTS.keys():
        parser.error(f"no such client: {', '.join(unknown)}")
    main()
