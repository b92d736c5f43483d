#!/usr/bin/env python3
"""Writes a GGUF file of the shape of BitNet b1.58 2B-4T for llama.cpp: random ternary weights in TQ2_0,
a random tied embedding in Q6_K, architecture `bitnet`, and a vocabulary of made-up words, which is
never used but has to be there.

    python3 -m venv target/peers && target/peers/bin/pip install gguf
    target/peers/bin/python benchmarks/make_peer_model.py target/peer-2b-tq2_0.gguf

A third of the weights is zero, as in the shapes of `bitnet bench`. llama.cpp's graph for this
architecture uses SiLU where the model has relu squared; the cost is the same.
"""

import argparse

import gguf
import numpy as np

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 2560, 6912, 30, 20, 5, 128
VOCABULARY, CONTEXT = 128256, 4096


def f16_bytes(value):
    return np.frombuffer(np.float16(value).tobytes(), dtype=np.uint8)


def tq2_0(rng, rows, cols):
    """Random blocks of 256 weights: 64 bytes of codes, 0 to 2, and an f16 scale."""
    four = np.array(
        [a | b << 2 | c << 4 | d << 6 for a in range(3) for b in range(3) for c in range(3) for d in range(3)],
        dtype=np.uint8,
    )
    blocks = np.empty((rows, cols // 256, 66), dtype=np.uint8)
    blocks[..., :64] = four[rng.integers(0, 81, size=(rows, cols // 256, 64), dtype=np.uint8)]
    blocks[..., 64:] = f16_bytes(1 / (cols * 2 / 3) ** 0.5)
    return blocks.reshape(rows, cols // 256 * 66)


def q6_k(rng, rows, cols):
    """Random blocks of 256 numbers: 192 bytes of bits, 16 int8 scales, an f16 scale."""
    blocks = rng.integers(0, 256, size=(rows, cols // 256, 210), dtype=np.uint8)
    blocks[..., 192:208] = 16
    blocks[..., 208:] = f16_bytes(0.003)
    return blocks.reshape(rows, cols // 256 * 210)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", help="the file to write, 810 MB")
    args = parser.parse_args()

    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(args.out, "bitnet")
    writer.add_name("random, shape of bitnet-b1.58-2B-4T")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    words = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(VOCABULARY - 3)]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * VOCABULARY)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (VOCABULARY - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def norm(name, size):
        writer.add_tensor(name, np.ones(size, dtype=np.float32))

    def packed(name, data, kind):
        writer.add_tensor(name, data, raw_dtype=kind)

    packed("token_embd.weight", q6_k(rng, VOCABULARY, HIDDEN), gguf.GGMLQuantizationType.Q6_K)
    norm("output_norm.weight", HIDDEN)
    attention, kv = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
    for layer in range(LAYERS):
        norm(f"blk.{layer}.attn_norm.weight", HIDDEN)
        norm(f"blk.{layer}.attn_sub_norm.weight", HIDDEN)
        norm(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        norm(f"blk.{layer}.ffn_sub_norm.weight", INTERMEDIATE)
        for name, rows, cols in [
            ("attn_q", attention, HIDDEN),
            ("attn_k", kv, HIDDEN),
            ("attn_v", kv, HIDDEN),
            ("attn_output", HIDDEN, attention),
            ("ffn_gate", INTERMEDIATE, HIDDEN),
            ("ffn_up", INTERMEDIATE, HIDDEN),
            ("ffn_down", HIDDEN, INTERMEDIATE),
        ]:
            data = tq2_0(rng, rows, cols)
            packed(f"blk.{layer}.{name}.weight", data, gguf.GGMLQuantizationType.TQ2_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
