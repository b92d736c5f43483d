#!/usr/bin/env python3
"""Makes small models of the forms that few have outputs for, and those outputs, with transformers.

Run from anywhere: `python3 scripts/make_reference_models.py`. It writes to
crates/bitnet-testing/golden/, whose README.md says what the files are. It needs the network once
(several gigabytes of PyTorch): its packages go into a virtual environment under target/.

The forward pass is transformers' own in every case. Where a form puts a norm before a ternary layer,
the layer is transformers' `AutoBitLinear`, which has such a norm; only the names of its tensors differ.
Each model is read back from the files written for it, so that the reference sees what we see.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "target" / "reference-venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
GOLDEN = ROOT / "crates" / "bitnet-testing" / "golden"
PACKAGES = [
    "torch==2.9.1",
    "transformers==5.23.0",
    "tokenizers==0.23.3",
    "safetensors==0.8.0",
    "numpy==2.4.6",
    "gguf==0.19.0",
]

BYTE_TOKENS = 256
MERGES = 8
LENGTHS = [1, 7, 33, 130]
GREEDY = 32


def enter_environment():
    """Goes on in the virtual environment, made first if it is not there."""
    if Path(sys.prefix) == VENV:
        return
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    if subprocess.run([PYTHON, "-c", "import torch, transformers, gguf"], capture_output=True).returncode != 0:
        subprocess.run([PYTHON, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    # The quantisers are decorated with torch.compile; fused code may round otherwise.
    sys.exit(subprocess.run([PYTHON, __file__], env={**os.environ, "TORCHDYNAMO_DISABLE": "1"}).returncode)


enter_environment()

import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoConfig, LlamaConfig  # noqa: E402
from transformers import Gemma3TextModel, LlamaForCausalLM, Qwen3ForCausalLM, Qwen3Model  # noqa: E402
from transformers.integrations.bitnet import AutoBitLinear  # noqa: E402

# ---- Tokenizer ------------------------------------------------------------------------------------


class Vocabulary:
    """The byte-level BPE of the other golden models, cut to its first merges."""

    def __init__(self):
        self.json = json.loads((GOLDEN / "tokenizer" / "tokenizer.json").read_text())
        model = self.json["model"]
        size = BYTE_TOKENS + MERGES
        self.merges = [merge for merge in model["merges"] if model["vocab"]["".join(merge)] < size]
        model["merges"] = self.merges
        model["vocab"] = {token: i for token, i in model["vocab"].items() if i < size}
        self.tokens = sorted(model["vocab"], key=model["vocab"].get)
        self.plain = len(self.tokens)
        for added in self.json["added_tokens"]:
            added["id"] = len(self.tokens)
            self.tokens.append(added["content"])
        self.begin = self.tokens.index("<|begin_of_text|>")
        self.end = [self.tokens.index("<|end_of_text|>"), self.tokens.index("<|eot_id|>")]
        for processor in self.json["post_processor"]["processors"]:
            for special in processor.get("special_tokens", {}).values():
                special["ids"] = [self.tokens.index(token) for token in special["tokens"]]

    def write(self, folder):
        added = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in self.json["added_tokens"]
        }
        write_json(folder / "tokenizer.json", self.json)
        write_json(
            folder / "tokenizer_config.json",
            {
                "added_tokens_decoder": added,
                "bos_token": "<|begin_of_text|>",
                "clean_up_tokenization_spaces": False,
                "eos_token": "<|end_of_text|>",
                "tokenizer_class": "PreTrainedTokenizerFast",
            },
        )
        write_json(
            folder / "special_tokens_map.json",
            {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        )
        write_json(
            folder / "generation_config.json",
            {"bos_token_id": self.begin, "eos_token_id": self.end, "do_sample": False},
        )


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")


# ---- Weights --------------------------------------------------------------------------------------


class Weights:
    """Random tensors. Every one has its own spread, so that a swapped or skipped one shows."""

    def __init__(self, seed, dtype):
        self.rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.tensors = {}

    def put(self, name, values):
        self.tensors[name] = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self.dtype)

    def spread(self):
        return np.exp(self.rng.uniform(-0.5, 0.5))

    def normal(self, name, rows, cols, std):
        """2 % of the weights are four times larger. Values that f16 would round are left out."""
        values = self.rng.standard_normal((rows, cols)) * std * self.spread()
        values *= np.where(self.rng.random((rows, cols)) < 0.02, 4.0, 1.0)
        values[np.abs(values) < 2.0**-10] = 0
        self.put(name, values)

    def blocks_of_32(self, name, rows, cols):
        """Numbers that Q8_0 and f16 both hold exactly: whole 64ths, the largest of 32 being 127."""
        values = np.clip(np.round(self.rng.standard_normal((rows * cols // 32, 32)) * 40), -127, 127)
        largest = np.abs(values).argmax(1)
        values[np.arange(len(values)), largest] = 127 * self.rng.choice([-1, 1], len(values))
        self.put(name, values.reshape(rows, cols) / 64)

    def norm(self, name, size, offset=0.0):
        """Around a level of its own, 5 % negative. Gemma stores `w - 1`."""
        values = self.spread() * (1 + 0.25 * self.rng.standard_normal(size))
        values *= np.where(self.rng.random(size) < 0.05, -1.0, 1.0)
        self.put(name, values - offset)

    def ternary(self, name, rows, cols, groups):
        """Ternary weights times f16 scales, `groups` = how many of them along rows and columns."""
        zeros = self.rng.uniform(0.2, 0.5)
        codes = self.rng.choice([-1.0, 0.0, 1.0], (rows, cols), p=[(1 - zeros) / 2, zeros, (1 - zeros) / 2])
        scales = self.spread() * np.exp(self.rng.uniform(-0.7, 0.7, groups)) / np.sqrt(cols * (1 - zeros))
        scales = np.float16(scales).astype(np.float32)
        tall, wide = groups
        self.put(name, codes * scales.repeat(rows // tall, 0).repeat(cols // wide, 1))


def linears(config):
    """Module name and shape of the seven linear layers."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


def make_weights(
    config, seed, dtype, *, linear, embedding=None, prefix="model.", norms=(), head_norms=False, offset=0.0,
    extra_norms=None,
):  # fmt: skip
    """All tensors of a checkpoint. `linear(weights, name, rows, cols)` makes one projection, `embedding`
    the table where it is not plain random numbers; `extra_norms(module)` names a projection's norm."""
    w = Weights(seed, dtype)
    hidden = config["hidden_size"]
    name = f"{prefix}embed_tokens.weight"
    if embedding:
        embedding(w, name, config["vocab_size"], hidden)
    else:
        w.normal(name, config["vocab_size"], hidden, 0.6)
    if not config["tie_word_embeddings"]:
        w.normal("lm_head.weight", config["vocab_size"], hidden, 0.5)
    for layer in range(config["num_hidden_layers"]):
        at = f"{prefix}layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm", *norms):
            w.norm(f"{at}{norm}.weight", hidden, offset)
        if head_norms:
            for norm in ("q_norm", "k_norm"):
                w.norm(f"{at}self_attn.{norm}.weight", config["head_dim"], offset)
        for module, (rows, cols) in linears(config).items():
            linear(w, f"{at}{module}.weight", rows, cols)
            name = extra_norms(module) if extra_norms else None
            if name:
                w.norm(f"{at}{name}.weight", cols)
    w.norm(f"{prefix}norm.weight", hidden, offset)
    return w.tensors


def master(w, name, rows, cols):
    w.normal(name, rows, cols, cols**-0.5)


def write_model(name, config, tensors, vocabulary):
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "bos_token_id": vocabulary.begin, "eos_token_id": vocabulary.end[0]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    vocabulary.write(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- Reference models -----------------------------------------------------------------------------


def read_plain(cls, folder):
    """transformers' own loading, for forms that it knows."""
    return cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def read_bitlinear(cls, config, folder, norm_of, eps):
    """A transformers model whose projections are its `AutoBitLinear` on master weights.

    `norm_of(module)` is the checkpoint's name of the norm that the projection has, or None."""
    config._attn_implementation = "eager"
    model = cls(config).float().eval()
    names = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            norm = norm_of(name)
            replacement = AutoBitLinear(
                module.in_features,
                module.out_features,
                bias=False,
                online_quant=True,
                use_rms_norm=norm is not None,
                rms_norm_eps=eps,
            )
            model.set_submodule(name, replacement)
            if norm:
                names[f"{norm}.weight"] = f"{name}.rms_norm.weight"
    tensors = load_file(folder / "model.safetensors")
    load_weights(model, {names.get(name, name): tensor for name, tensor in tensors.items()})
    return model


def load_weights(model, tensors):
    """All weights, none left over; a tied head follows the embedding."""
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(missing) <= tied and not unexpected, (missing, unexpected)
    model.tie_weights()


class RoundingMargin:
    """How little one element of any quantised input must move, as a share of its token's largest
    element, to become another int8 value: the smallest over all layers, for each sequence."""

    def __init__(self, model):
        self.smallest = None
        self.hooks = [
            module.register_forward_pre_hook(self.see)
            for module in model.modules()
            if isinstance(module, AutoBitLinear)
        ]

    def see(self, module, inputs):
        x = inputs[0] if module.rms_norm is None else module.rms_norm(inputs[0])
        x = x.double()
        scaled = x * (127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5))
        # The largest element itself is 127 however it moves.
        distance = ((scaled - scaled.floor()) - 0.5).abs() / 127
        smallest = distance.flatten(1).amin(1)
        self.smallest = smallest if self.smallest is None else torch.minimum(self.smallest, smallest)

    def remove(self):
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def choose_prompts(model, vocabulary, seed):
    """Random prompts that start with the begin token. Of many candidates the one is kept whose
    roundings are farthest from a boundary; models without roundings get the first."""
    rng = np.random.default_rng(seed)
    rounds = any(isinstance(module, AutoBitLinear) for module in model.modules())
    prompts, margins = [], []
    for length in LENGTHS:
        candidates = rng.integers(0, vocabulary.plain, (1024 if rounds and length > 1 else 1, length))
        candidates[:, 0] = vocabulary.begin
        if not rounds:
            prompts.append(candidates[0].tolist())
            margins.append(None)
            continue
        margin = RoundingMargin(model)
        smallest = []
        for batch in np.split(candidates, max(1, len(candidates) // 64)):
            margin.smallest = None
            model(torch.from_numpy(batch), use_cache=False)
            smallest += margin.smallest.tolist()
        margin.remove()
        best = int(np.argmax(smallest))
        prompts.append(candidates[best].tolist())
        margins.append(smallest[best])
    return prompts, margins


@torch.no_grad()
def observe(model, ids):
    """Intermediate results of one prompt, named as in the other goldens."""
    base = getattr(model, "model", model)
    seen, hooks = {}, []

    def keep(module, name):
        def hook(_, __, output):
            output = output[0] if isinstance(output, tuple) else output
            seen[name] = output.reshape(len(ids), -1).clone()

        hooks.append(module.register_forward_hook(hook))

    keep(base.embed_tokens, "hidden.embed")
    for i, layer in enumerate(base.layers):
        keep(layer.self_attn, f"attn_out.layer.{i}")
        keep(layer.mlp, f"mlp_out.layer.{i}")
        keep(layer, f"hidden.layer.{i}")
    keep(base.norm, "hidden.final_norm")
    model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def run_generator(model, prompts):
    """Logits and greedy continuations, every step computed from the start without a cache."""
    entries, tensors = [], {}
    for k, prompt in enumerate(prompts):
        logits = model(torch.tensor([prompt]), use_cache=False).logits[0]
        tensors[f"logits.last.{k}"] = logits[-1].clone()
        if k == 1:
            tensors["logits.all.1"] = logits.clone()
        ids, greedy, margins, seconds = list(prompt), [], [], []
        for _ in range(GREEDY):
            row = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            top = row.topk(2)
            greedy.append(int(top.indices[0]))
            seconds.append(int(top.indices[1]))
            margins.append(round(float(top.values[0] - top.values[1]), 6))
            ids.append(greedy[-1])
        entries.append({"ids": prompt, "greedy": greedy, "greedy_margin": margins, "greedy_second": seconds})
    return entries, tensors


@torch.no_grad()
def run_embedder(model, prompts):
    """The last token's final state, divided by its length."""
    entries, tensors = [], {}
    for k, prompt in enumerate(prompts):
        state = model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0, -1]
        tensors[f"embedding.{k}"] = torch.nn.functional.normalize(state, dim=-1)
        entries.append({"ids": prompt})
    return entries, tensors


def ternary_facts(model, tensors):
    """SHA-256 of every linear layer's int8 matrix; how near a master weight is to a boundary."""
    facts = {}
    modules = dict(model.named_modules())
    for name, tensor in tensors.items():
        module = modules.get(name.removesuffix(".weight"))
        if not isinstance(module, torch.nn.Linear) or name == "lm_head.weight":
            continue
        weight = tensor.float()
        entry = {"shape": list(weight.shape)}
        if isinstance(module, AutoBitLinear):
            scaled = weight * (1.0 / weight.abs().mean().clamp(min=1e-5))
            codes = scaled.round().clamp(-1, 1)
            closest = float((scaled.abs() - 0.5).abs().min())
            assert closest > 1e-6, f"{name}: a weight is within {closest} of a rounding boundary"
            entry["mean_abs"] = float(weight.abs().mean())
            entry["closest_to_boundary"] = closest
        else:
            codes = weight.sign()
        entry["sha256_int8"] = hashlib.sha256(codes.to(torch.int8).numpy().tobytes()).hexdigest()
        facts[name] = entry
    return facts


def write_golden(stem, model, vocabulary, seed, tensors):
    """Reference outputs beside a model: `<stem>.json` and `<stem>.safetensors`."""
    prompts, margins = choose_prompts(model, vocabulary, seed)
    run = run_generator if hasattr(model, "lm_head") else run_embedder
    entries, outputs = run(model, prompts)
    for entry, margin in zip(entries, margins):
        if margin is not None:
            entry["rounding_margin"] = margin
    outputs |= observe(model, prompts[1])
    write_json(
        Path(f"{stem}.json"),
        {
            "reference": f"transformers {type(model).__name__}",
            "compute_dtype": "float32",
            "short_prompt": 1,
            "prompts": entries,
            "ternary": ternary_facts(model, tensors),
        },
    )
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, f"{stem}.safetensors")
    shown = ", ".join("-" if margin is None else f"{margin:.1e}" for margin in margins)
    print(f"{Path(stem).relative_to(GOLDEN)}: rounding margins {shown}")


# ---- GGUF -----------------------------------------------------------------------------------------

GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Q8_0, TQ1_0 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.TQ1_0
# Type numbers that the gguf package does not have.
I2_S, Q2_0 = 36, 42


def gguf_name(name):
    """`model.layers.0.self_attn.q_proj.weight` -> `blk.0.attn_q.weight`; projection norms get
    `_norm_in` as in microsoft/BitNet's converter for its embedding models."""
    module = name.removeprefix("model.").removesuffix(".weight")
    block = ""
    if module.startswith("layers."):
        _, layer, module = module.split(".", 2)
        block = f"blk.{layer}."
    suffix = ""
    if module.endswith("_proj.norm"):
        module, suffix = module.removesuffix(".norm"), "_norm_in"
    return f"{block}{GGUF_NAMES[module]}{suffix}.weight"


def pack_i2_s(weights):
    """bitnet.cpp's I2_S of the absmean-ternarised matrix: flat blocks of 128 values in 32 bytes,
    value `j` at byte `j % 32`, bits `6 - 2 * (j // 32)`; then the f32 scale and filler to 32 bytes."""
    weights = torch.from_numpy(weights)
    scale = 1.0 / weights.abs().mean().clamp(min=1e-5)
    codes = ((weights * scale).round().clamp(-1, 1) + 1).numpy().astype(np.uint8).reshape(-1, 4, 32)
    packed = codes[:, 0] << 6 | codes[:, 1] << 4 | codes[:, 2] << 2 | codes[:, 3]
    tail = np.zeros(32, np.uint8)
    tail[:4] = np.frombuffer(np.float32(weights.abs().mean()).tobytes(), np.uint8)
    return np.concatenate([packed.ravel(), tail])


def pack_q2_0(weights, width):
    """ggml's Q2_0: per `width` values of a row an f16 scale, then two bits per value, the first in
    the low bits."""
    blocks = weights.reshape(-1, width)
    scales = np.abs(blocks).max(1)
    assert (scales == scales.astype(np.float16)).all()
    codes = (np.sign(blocks) + 1).astype(np.uint8).reshape(len(blocks), -1, 4)
    packed = codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
    return np.concatenate([scales.astype(np.float16)[:, None].view(np.uint8), packed], 1).ravel()


def interleave_heads(weights, heads):
    """The row order of q and k in GGUF's `llama`: the halves of each head interleaved."""
    rows, cols = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def write_gguf(path, arch, config, tensors, vocabulary, pack, q8_0_embedding=False, norm_type=np.float32, pooling=None):
    """`pack(weights)` gives a linear layer's bytes and type number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim", config["hidden_size"] // heads)
    w = gguf.GGUFWriter(path, arch)
    w.add_name(path.stem)
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_key_length(head)
    w.add_value_length(head)
    w.add_rope_dimension_count(head)
    w.add_rope_freq_base(config["rope_theta"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_vocab_size(config["vocab_size"])
    if pooling is not None:
        w.add_pooling_type(pooling)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("llama-bpe")
    w.add_token_list(vocabulary.tokens)
    kinds = [gguf.TokenType.NORMAL] * vocabulary.plain
    kinds += [gguf.TokenType.CONTROL] * (len(vocabulary.tokens) - vocabulary.plain)
    w.add_token_types(kinds)
    w.add_token_merges([" ".join(merge) for merge in vocabulary.merges])
    w.add_bos_token_id(vocabulary.begin)
    w.add_eos_token_id(vocabulary.end[0])
    w.add_add_bos_token(True)
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if name.endswith("_proj.weight"):
            if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                values = interleave_heads(values, heads if "q_proj" in name else kv_heads)
            data, kind = pack(values)
            # As int8: for uint8 the writer looks the type's block size up, which it may not know.
            w.add_tensor(gguf_name(name), data.view(np.int8), raw_shape=values.shape, raw_dtype=kind)
        elif name.endswith("embed_tokens.weight") and q8_0_embedding:
            data = gguf.quants.quantize(values, Q8_0)
            assert (gguf.quants.dequantize(data, Q8_0) == values).all(), f"{name} is rounded"
            w.add_tensor(gguf_name(name), data, raw_dtype=Q8_0)
        else:
            kept = values.astype(np.float16 if values.ndim == 2 else norm_type)
            assert (kept == values).all(), f"{name} is rounded"
            w.add_tensor(gguf_name(name), kept)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


# ---- The models -----------------------------------------------------------------------------------


def config(architecture, model_type, vocabulary, **shape):
    base = {
        "architectures": [architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "model_type": model_type,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": len(vocabulary.tokens),
    }
    return {**base, **shape}


def trilm(vocabulary):
    """Two scales per matrix, one per training shard: halves of the rows where the layer is split by
    outputs, halves of the columns where it is split by inputs."""

    def linear(w, name, rows, cols):
        by_input = name.endswith(("o_proj.weight", "down_proj.weight"))
        w.ternary(name, rows, cols, (1, 2) if by_input else (2, 1))

    shape = config(
        "LlamaForCausalLM", "llama", vocabulary, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, torch_dtype="float16",
    )  # fmt: skip
    tensors = make_weights(shape, 201, torch.float16, linear=linear)
    folder = write_model("trilm", shape, tensors, vocabulary)
    write_golden(folder / "golden", read_plain(LlamaForCausalLM, folder), vocabulary, 1201, tensors)


def trilm_gguf(vocabulary):
    """Not kept as safetensors: TQ1_0 needs 256 columns, and float files of that width are large."""
    shape = config(
        "LlamaForCausalLM", "llama", vocabulary, hidden_size=256, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=1, torch_dtype="float16",
    )  # fmt: skip
    tensors = make_weights(
        shape, 202, torch.float16, embedding=Weights.blocks_of_32,
        linear=lambda w, name, rows, cols: w.ternary(name, rows, cols, (2, 1)),
    )  # fmt: skip
    stem = GOLDEN / "gguf" / "trilm-TQ1_0"
    write_gguf(
        stem.with_suffix(".gguf"), "llama", shape, tensors, vocabulary,
        lambda values: (gguf.quants.quantize(values, TQ1_0), TQ1_0), q8_0_embedding=True,
    )  # fmt: skip
    llama = LlamaConfig(**shape)
    llama._attn_implementation = "eager"
    model = LlamaForCausalLM(llama).float().eval()
    load_weights(model, tensors)
    write_golden(f"{stem}.golden", model, vocabulary, 1202, tensors)


def llama3_rope(vocabulary):
    """Llama 3.1's rope scaling, with wavelengths below, inside and above the ramp."""
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    shape = config(
        "LlamaForCausalLM", "llama", vocabulary, hidden_size=48, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=3, num_key_value_heads=1, rope_scaling=scaling, torch_dtype="float16",
    )  # fmt: skip
    tensors = make_weights(
        shape, 203, torch.float16, linear=lambda w, name, rows, cols: w.ternary(name, rows, cols, (1, 1))
    )
    folder = write_model("llama3-rope", shape, tensors, vocabulary)
    write_golden(folder / "golden", read_plain(LlamaForCausalLM, folder), vocabulary, 1203, tensors)


def bonsai(vocabulary):
    """Ternary-Bonsai: an f16 scale for each 128 weights of a row."""
    shape = config(
        "Qwen3ForCausalLM", "qwen3", vocabulary, hidden_size=128, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-6, rope_theta=1000000.0,
        torch_dtype="float16",
    )  # fmt: skip
    tensors = make_weights(
        shape, 204, torch.float16, embedding=Weights.blocks_of_32, head_norms=True,
        linear=lambda w, name, rows, cols: w.ternary(name, rows, cols, (rows, cols // 128)),
    )  # fmt: skip
    folder = write_model("bonsai", shape, tensors, vocabulary)
    write_golden(folder / "golden", read_plain(Qwen3ForCausalLM, folder), vocabulary, 1204, tensors)
    for width in (64, 128):
        path = GOLDEN / "gguf" / f"bonsai-Q2_0-{width}.gguf"
        write_gguf(
            path, "qwen3", shape, tensors, vocabulary, lambda values: (pack_q2_0(values, width), Q2_0),
            q8_0_embedding=True,
        )  # fmt: skip


def own_norm(module):
    """microsoft/BitNet's embedding models: every projection has a norm."""
    return f"{module}.norm"


def qwen3_embedding(vocabulary):
    shape = config(
        "Qwen3Model", "qwen3", vocabulary, hidden_size=40, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-6, rope_theta=1000000.0,
        torch_dtype="bfloat16",
    )  # fmt: skip
    tensors = make_weights(shape, 285, torch.bfloat16, linear=master, prefix="", head_norms=True, extra_norms=own_norm)
    folder = write_model("qwen3-embedding", shape, tensors, vocabulary)
    model = read_bitlinear(Qwen3Model, AutoConfig.from_pretrained(folder), folder, own_norm, shape["rms_norm_eps"])
    write_golden(folder / "golden", model, vocabulary, 1205, tensors)
    write_gguf(
        GOLDEN / "gguf" / "qwen3-embedding-I2_S.gguf", "qwen3", shape, tensors, vocabulary,
        lambda values: (pack_i2_s(values), I2_S), norm_type=np.float16, pooling=gguf.PoolingType.LAST,
    )  # fmt: skip


def gemma3_embedding(vocabulary):
    """Two layers with a window of 16 tokens and one without, each kind with its own rope base."""
    shape = config(
        "Gemma3TextModel", "gemma3_text", vocabulary, hidden_size=40, intermediate_size=56, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-6, rope_theta=1000000.0,
        rope_local_base_freq=10000.0, query_pre_attn_scalar=24, sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        hidden_activation="gelu_pytorch_tanh", torch_dtype="bfloat16",
    )  # fmt: skip
    del shape["hidden_act"]
    tensors = make_weights(
        shape, 206, torch.bfloat16, linear=master, prefix="", head_norms=True, offset=1.0, extra_norms=own_norm,
        norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    )  # fmt: skip
    folder = write_model("gemma3-embedding", shape, tensors, vocabulary)
    model = read_bitlinear(Gemma3TextModel, AutoConfig.from_pretrained(folder), folder, own_norm, shape["rms_norm_eps"])
    write_golden(folder / "golden", model, vocabulary, 1206, tensors)


def odd_1bitllm(vocabulary):
    """1bitLLM/bitnet_b1_58-3B in small: a head of 100, and a feed-forward width that divides by
    nothing but 2 and 3. The norm before a projection is that of `AutoBitLinear`."""

    def norm_of(module):
        if module.endswith("o_proj"):
            return module.replace("o_proj", "inner_attn_ln")
        return module.replace("down_proj", "ffn_layernorm") if module.endswith("down_proj") else None

    shape = config(
        "BitnetForCausalLM", "bitnet", vocabulary, hidden_size=100, intermediate_size=54, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, weight_bits=1, input_bits=8, torch_dtype="bfloat16",
    )  # fmt: skip
    tensors = make_weights(shape, 207, torch.bfloat16, linear=master, extra_norms=norm_of)
    folder = write_model("bitnet-1bitllm-odd", shape, tensors, vocabulary)
    llama = LlamaConfig(**{key: value for key, value in shape.items() if key != "model_type"})
    model = read_bitlinear(LlamaForCausalLM, llama, folder, norm_of, shape["rms_norm_eps"])
    write_golden(folder / "golden", model, vocabulary, 1207, tensors)


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vocabulary = Vocabulary()
    for make in (trilm, trilm_gguf, llama3_rope, bonsai, qwen3_embedding, gemma3_embedding, odd_1bitllm):
        make(vocabulary)


if __name__ == "__main__":
    main()
