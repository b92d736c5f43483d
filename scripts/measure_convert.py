#!/usr/bin/env python3
"""Peak anonymous memory and time of converting a model of the shape of Llama3-8B-1.58.

Writes a packed Hugging Face checkpoint with random ternary weights below target/ (3.9 GB), converts it
to a .bitnet file, to GGUF with TQ2_0 layers as it is and with a Q6_K head, and to float weights with `--all`,
deletes what was written, and samples RssAnon of the process all the while. Needs Linux, Python's standard
library, `--bitnet PROGRAM` or target/release/bitnet, and 9 GB of disk (24 GB with `--all`).
"""
import argparse
import json
import shutil
from pathlib import Path

import measure_load
from measure_load import ROOT, peak

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 4096, 14336, 32, 32, 8, 128256


def tensors():
    kv = HIDDEN // HEADS * KV_HEADS
    linears = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    yield "model.embed_tokens.weight", "BF16", [VOCABULARY, HIDDEN]
    yield "lm_head.weight", "BF16", [VOCABULARY, HIDDEN]
    yield "model.norm.weight", "BF16", [HIDDEN]
    for layer in range(LAYERS):
        for name, (rows, cols) in linears.items():
            module = f"model.layers.{layer}.{name}"
            yield f"{module}.weight", "U8", [rows // 4, cols]
            yield f"{module}.weight_scale", "BF16", [1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", "BF16", [HIDDEN]


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": None},
}


def measure(bitnet: Path, source: Path, target: Path, *flags: str) -> None:
    seconds, most = peak([bitnet, "convert", source, target, "--quiet", *flags])
    files = [target] if target.is_file() else list(target.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{target.name}: {size / 1e9:.2f} GB in {seconds:.1f} s, peak anonymous memory {most / 1e6:.0f} MB")
    shutil.rmtree(target) if target.is_dir() else target.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bitnet", type=Path, default=ROOT / "target/release/bitnet")
    parser.add_argument("--all", action="store_true", help="float weights too (16 GB)")
    options = parser.parse_args()
    source = ROOT / "target/convert-8b"
    try:
        measure_load.tensors = tensors
        measure_load.write_checkpoint(source)
        (source / "config.json").write_text(json.dumps(CONFIG))
        measure(options.bitnet, source, ROOT / "target/convert-8b.bitnet")
        measure(options.bitnet, source, ROOT / "target/convert-8b.gguf")
        measure(options.bitnet, source, ROOT / "target/convert-8b-q6_k.gguf", "--head", "q6_k")
        if options.all:
            measure(options.bitnet, source, ROOT / "target/convert-8b-hf", "--to", "hf")
    finally:
        shutil.rmtree(source, ignore_errors=True)


if __name__ == "__main__":
    main()
