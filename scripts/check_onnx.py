#!/usr/bin/env python3
"""Checks ONNX in both directions with other people's programs.

Run from anywhere after `cargo build --release`: `python3 scripts/check_onnx.py`. It needs the network
once (several gigabytes of PyTorch): its packages go into a virtual environment under target/.

Out: `bitnet convert --to onnx` of every golden model there is, checked by `onnx.checker` and computed by
onnxruntime, whole and token by token with the cache, in a batch with padding; outputs against the
golden ones, which transformers made. And `bitnet` must read its own export to the last bit.

In: models of transformers exported by both of torch's exporters; `bitnet logits` of these against the
golden ones.

`--fixtures` writes the small exports that `cargo test` reads, to crates/bitnet-testing/golden/onnx.
`--program FILE` takes another build of bitnet than target/release/bitnet.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "target" / "onnx-venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
WORK = ROOT / "target" / "onnx-check"
GOLDEN = ROOT / "crates" / "bitnet-testing" / "golden"
SHARED = ROOT.parent / "shared" / "golden"
FIXTURES = GOLDEN / "onnx"
PACKAGES = [
    "accelerate",
    "numpy==2.4.6",
    "onnx==1.23.2",
    "onnx-ir",
    "onnxruntime==1.31.1",
    "onnxscript",
    "safetensors==0.8.0",
    "torch==2.9.1",
    "transformers==5.23.0",
]

# Largest error in standard deviations of the logits: see the golden data's README. Inputs that are
# rounded to int8 jump where they are near a boundary; the prompts named here keep far from all.
TIGHT, LOOSE = 1e-4, 0.3
RANDOM = {name: (0, 1, 2) for name in [
    "bitnet-bf16", "bitnet-packed", "bitnet-packed-bitlinear", "llama-1.58-packed",
    "llama-1.58-rmsnorm", "bitnet-odd", "bitnet-sharded", "bitnet-1bitllm",
]}
TRAINED = {"tiny-trained": (0, 1), "tiny-trained-packed": (0, 1)}
EVERY = {name: (0, 1, 2, 3) for name in [
    "trilm", "llama3-rope", "bonsai", "bitnet-1bitllm-odd", "qwen3-embedding", "gemma3-embedding",
]}
MODELS = RANDOM | TRAINED | EVERY
EXPORTED = ["bitnet-bf16", "bitnet-packed", "llama-1.58-packed", "llama3-rope", "trilm"]


def enter_environment():
    """Goes on in the virtual environment, made first if it is not there."""
    if Path(sys.prefix).resolve() == VENV.resolve():
        return
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    wanted = "import accelerate, onnx, onnxruntime, onnxscript, torch, transformers"
    if subprocess.run([PYTHON, "-c", wanted], capture_output=True).returncode != 0:
        subprocess.run([PYTHON, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    # The quantisers are decorated with torch.compile; fused code may round otherwise.
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    sys.exit(subprocess.run([PYTHON, __file__, *sys.argv[1:]], env=environment).returncode)


enter_environment()

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, BitNetConfig, BitNetForCausalLM  # noqa: E402


def find(name):
    """The folder of a golden model, or None."""
    folders = [folder / name for folder in (GOLDEN, SHARED)]
    return next((folder for folder in folders if (folder / "config.json").exists()), None)


class Golden:
    """The outputs of the reference for one model."""

    def __init__(self, folder):
        self.prompts = [p["ids"] for p in json.loads((folder / "golden.json").read_text())["prompts"]]
        self.tensors = load_file(folder / "golden.safetensors")
        self.embeds = "embedding.0" in self.tensors

    def error(self, k, output):
        """Of the last row `output` after prompt `k`, in standard deviations."""
        if self.embeds:
            expected, output = self.tensors[f"embedding.{k}"], output / np.linalg.norm(output)
        else:
            expected = self.tensors[f"logits.last.{k}"]
        return np.abs(output - expected).max() / expected.std()


class Session:
    """An export of ours in onnxruntime."""

    def __init__(self, path):
        onnx.checker.check_model(str(path), full_check=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        self.session = onnxruntime.InferenceSession(str(path), options)
        self.names = [output.name for output in self.session.get_outputs()]

    def run(self, ids, mask=None, past=None):
        """All outputs by name. `ids` is `[batch, tokens]`."""
        ids = np.array(ids, np.int64)
        feed, cached = {"input_ids": ids}, 0
        for given in self.session.get_inputs():
            if given.name.startswith("past_key_values"):
                empty = np.zeros((len(ids), given.shape[1], 0, given.shape[3]), np.float32)
                present = given.name.replace("past_key_values", "present")
                feed[given.name] = past[present] if past else empty
                cached = feed[given.name].shape[2]
        whole = np.ones((len(ids), cached + ids.shape[1]), np.int64)
        feed["attention_mask"] = whole if mask is None else np.array(mask, np.int64)
        return dict(zip(self.names, self.session.run(self.names, feed)))

    def last(self, outputs, row=0):
        return outputs[self.names[0]][row, -1]


class Report:
    """What was checked, and whether all of it was well."""

    def __init__(self):
        self.failed = False

    def line(self, what, error, allowed):
        well = error <= allowed
        self.failed |= not well
        print(f"{'ok  ' if well else 'FAIL'} {what}: {error:.1e} of {allowed:.0e} std", flush=True)


def bitnet(program, *arguments):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"bitnet {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


def last_row(program, model, ids, embeds):
    tokens = ",".join(map(str, ids))
    if embeds:
        return None
    return np.array(json.loads(bitnet(program, "logits", "-m", model, "--tokens", tokens, "--json"))["logits"][-1])


def check_ours(program, report):
    """Exports of ours in onnxruntime, and back in ours."""
    for name, tight in MODELS.items():
        folder = find(name)
        if folder is None:
            print(f"skipped: {name} is in neither {GOLDEN} nor {SHARED}")
            continue
        out = WORK / "ours" / name
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        bitnet(program, "convert", folder, out, "--to", "onnx")
        golden, session = Golden(folder), Session(out / "model.onnx")
        for k, ids in enumerate(golden.prompts):
            allowed = TIGHT if k in tight else LOOSE
            whole = session.run([ids])
            report.line(f"{name} prompt {k}", golden.error(k, session.last(whole)), allowed)
            if len(ids) > 40:
                continue
            past = None
            for token in ids:
                past = session.run([[token]], past=past)
            report.line(f"{name} prompt {k} by the token", golden.error(k, session.last(past)), allowed)
        # Two sequences, the shorter one padded on the left.
        short, long = golden.prompts[1], golden.prompts[2]
        padding = len(long) - len(short)
        mask = [[0] * padding + [1] * len(short), [1] * len(long)]
        both = session.run([[0] * padding + short, long], mask)
        for row, k in enumerate((1, 2)):
            allowed = TIGHT if k in tight else LOOSE
            report.line(f"{name} prompt {k} in a batch", golden.error(k, session.last(both, row)), allowed)
        if not golden.embeds:
            ids = golden.prompts[1]
            before, after = (last_row(program, model, ids, False) for model in (folder, out))
            report.line(f"{name} read back", 0.0 if (before == after).all() else 1.0, 0.0)


class Logits(torch.nn.Module):
    """A causal model that gives its logits and keeps no cache: what an export without a cache is."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head

    def forward(self, input_ids, attention_mask):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self.lm_head(states.last_hidden_state)


def export(folder, path, kind, dtype=torch.float32):
    """Exports a model with torch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    # Past `PreTrainedModel.to`, which keeps the type of quantised models.
    model = torch.nn.Module.to(Logits(model.eval()), dtype)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    inputs = (ids, torch.ones_like(ids))
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["logits"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "torchscript":
        axes = {name: {0: "batch", 1: "sequence"} for name in names["input_names"]}
        torch.onnx.export(model, inputs, path, **names, dynamic_axes=axes, dynamo=False, opset_version=18)
    else:
        # Its optimiser folds the packed weights of models as small as these into other constants.
        torch.onnx.export(model, inputs, path, **names, dynamo=True, optimize=False, verbose=False)


def check_theirs(program, report):
    """Exports by torch in ours."""
    for name in EXPORTED:
        folder = find(name)
        if folder is None:
            print(f"skipped: {name} is in neither {GOLDEN} nor {SHARED}")
            continue
        golden = Golden(folder)
        for kind in ("torchscript", "dynamo"):
            out = WORK / kind / name
            shutil.rmtree(out, ignore_errors=True)
            export(folder, out / "model.onnx", kind)
            for file in folder.glob("*.json"):
                if not file.name.endswith(".index.json"):
                    shutil.copy(file, out)
            for k in MODELS[name]:
                row = last_row(program, out, golden.prompts[k], golden.embeds)
                report.line(f"{kind} export of {name} prompt {k}", golden.error(k, row), TIGHT)


# ---- Fixtures ---------------------------------------------------------------------------------------


def stripped(path):
    """Takes the stack traces of Python out of an export: they are most of a small one."""
    model = onnx.load(path)
    for node in model.graph.node:
        node.doc_string = ""
        keep = [entry for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        del node.metadata_props[:]
        node.metadata_props.extend(keep)
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    return model


def tiny_bitnet(folder):
    """A BitNet of one layer, smaller than any other golden model, with outputs of transformers."""
    torch.manual_seed(301)
    config = BitNetConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=276, max_position_embeddings=64, tie_word_embeddings=True,
        rms_norm_eps=1e-5, bos_token_id=273, eos_token_id=274,
    )
    model = BitNetForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * (0.3 if "norm" in name else 0.7) + ("norm" in name))
    model.to(torch.bfloat16).save_pretrained(folder)
    path = folder / "config.json"
    json_config = json.loads(path.read_text())
    json_config["quantization_config"] = {
        "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online",
        "modules_to_not_convert": None,
    }
    path.write_text(json.dumps(json_config, indent=2) + "\n")


def write_fixtures():
    FIXTURES.mkdir(exist_ok=True)
    llama, scratch = GOLDEN / "llama3-rope", WORK / "fixtures"
    shutil.rmtree(scratch, ignore_errors=True)
    export(llama, scratch / "llama.onnx", "torchscript", torch.float16)
    onnx.save(stripped(scratch / "llama.onnx"), FIXTURES / "llama3-rope-torchscript.onnx")
    bitnet_folder = scratch / "bitnet"
    tiny_bitnet(bitnet_folder)
    shutil.copy(bitnet_folder / "config.json", FIXTURES / "bitnet-config.json")
    export(bitnet_folder, scratch / "bitnet-dynamo.onnx", "dynamo")
    onnx.save(
        stripped(scratch / "bitnet-dynamo.onnx"), FIXTURES / "bitnet-dynamo.onnx",
        save_as_external_data=True, location="bitnet-dynamo.onnx.data", size_threshold=256,
    )
    ids = torch.tensor([[273, 5, 80, 200, 31, 7, 150]])
    model = AutoModelForCausalLM.from_pretrained(bitnet_folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
    save_file({"logits": logits, "ids": ids[0].to(torch.int32).numpy()}, FIXTURES / "bitnet-golden.safetensors")
    total = sum(file.stat().st_size for file in FIXTURES.iterdir())
    for file in sorted(FIXTURES.iterdir()):
        print(f"{file.stat().st_size:8} {file.name}")
    print(f"{total:8} in all")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fixtures", action="store_true", help="write the fixtures of the tests")
    parser.add_argument("--program", type=Path, default=ROOT / "target" / "release" / "bitnet")
    arguments = parser.parse_args()
    if arguments.fixtures:
        write_fixtures()
        return
    if not arguments.program.exists():
        sys.exit(f"{arguments.program} is not there: build it first, or name another with --program")
    report = Report()
    check_ours(arguments.program, report)
    check_theirs(arguments.program, report)
    sys.exit("something is wrong" if report.failed else 0)


main()
