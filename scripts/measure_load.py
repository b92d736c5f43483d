#!/usr/bin/env python3
"""Peak anonymous memory and time to the first token of a model of the shape of BitNet b1.58 2B-4T.

Writes a packed Hugging Face checkpoint with random ternary weights below target/ (1.2 GB, kept for
the next run), converts it to a native file, runs `bitnet run "Once upon a time" -n 1` on both and
samples RssAnon of the process. `--tokenizer FILE` puts another tokenizer.json in the checkpoint;
other arguments go to `bitnet run`. Needs only Python's standard library and target/release/bitnet
(cargo build --release).
"""
import argparse
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 2560, 6912, 30, 20, 5, 128256
# Every byte value to one whose four codes are all below 3.
LEGAL = bytes(sum((min((b >> s) & 3, 2)) << s for s in (0, 2, 4, 6)) for b in range(256))


def tensors():
    kv = HIDDEN // HEADS * KV_HEADS
    linears = [
        ("self_attn.q_proj", HIDDEN, HIDDEN),
        ("self_attn.k_proj", kv, HIDDEN),
        ("self_attn.v_proj", kv, HIDDEN),
        ("self_attn.o_proj", HIDDEN, HIDDEN),
        ("mlp.gate_proj", INTERMEDIATE, HIDDEN),
        ("mlp.up_proj", INTERMEDIATE, HIDDEN),
        ("mlp.down_proj", HIDDEN, INTERMEDIATE),
    ]
    norms = [
        ("input_layernorm", HIDDEN),
        ("post_attention_layernorm", HIDDEN),
        ("self_attn.attn_sub_norm", HIDDEN),
        ("mlp.ffn_sub_norm", INTERMEDIATE),
    ]
    yield "model.embed_tokens.weight", "BF16", [VOCABULARY, HIDDEN]
    yield "model.norm.weight", "BF16", [HIDDEN]
    for layer in range(LAYERS):
        for name, rows, cols in linears:
            module = f"model.layers.{layer}.{name}"
            yield f"{module}.weight", "U8", [rows // 4, cols]
            yield f"{module}.weight_scale", "BF16", [1]
        for name, size in norms:
            yield f"model.layers.{layer}.{name}.weight", "BF16", [size]


def write_checkpoint(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "models/tiny" / name, directory)
    config = json.loads((ROOT / "models/tiny/config.json").read_text())
    config |= {
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096, "rope_theta": 500000.0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, dtype, shape in tensors():
        size = (1 if dtype == "U8" else 2)
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = random.Random(0)
    # A quarter of a mebibyte of random bf16 numbers near 1/64, repeated.
    floats = struct.pack("<131072H", *(rng.choice((0x3C00, 0xBC00)) | rng.getrandbits(7) for _ in range(131072)))
    with open(directory / "model.safetensors.part", "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, _ in tensors():
            start, end = header[name]["data_offsets"]
            left = end - start
            while left:
                chunk = min(left, len(floats))
                if dtype == "U8":
                    out.write(rng.randbytes(chunk).translate(LEGAL))
                else:
                    out.write(floats[:chunk])
                left -= chunk
    os.replace(directory / "model.safetensors.part", directory / "model.safetensors")


def anonymous_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def peak(command: list, **options) -> tuple:
    """Runs a program; its seconds and the most anonymous memory that it had."""
    start = time.monotonic()
    process = subprocess.Popen(command, **options)
    most = 0
    while process.poll() is None:
        most = max(most, anonymous_bytes(process.pid))
        time.sleep(0.001)
    seconds = time.monotonic() - start
    if process.returncode:
        sys.exit(f"bitnet failed with exit code {process.returncode}")
    return seconds, most


def measure(name: str, command: list, packed: int) -> None:
    for attempt in range(3):
        seconds, most = peak(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(f"{name}, run {attempt + 1}: {seconds:.2f} s, peak anonymous memory {most / 1e6:.1f} MB, "
              f"where the weights take {packed / 1e6:.1f} MB at two bits each")


def main() -> None:
    bitnet = ROOT / "target/release/bitnet"
    if not bitnet.exists():
        sys.exit(f"{bitnet} is not there: run cargo build --release first")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokenizer", type=Path)
    options, rest = parser.parse_known_args()
    directory = ROOT / "target/load-2b"
    if not (directory / "model.safetensors").exists():
        write_checkpoint(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "models/tiny" / name, directory / name)
    if options.tokenizer:
        shutil.copyfile(options.tokenizer, directory / "tokenizer.json")
        (directory / "tokenizer_config.json").write_text("{}")
    native = ROOT / "target/load-2b.bitnet"
    subprocess.run([bitnet, "convert", directory, native], check=True)
    packed = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN * KV_HEADS // HEADS
                       + 3 * HIDDEN * INTERMEDIATE) // 4
    run = [bitnet, "run", "Once upon a time", "-n", "1", *rest, "-m"]
    measure("checkpoint", [*run, directory], packed)
    measure("native file", [*run, native], packed)


if __name__ == "__main__":
    main()
