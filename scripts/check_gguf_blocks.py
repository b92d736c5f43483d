#!/usr/bin/env python3
"""Compares our decoders of ggml's block types with the `gguf` package of llama.cpp, to the bit.

Run from anywhere: `python3 scripts/check_gguf_blocks.py`. It needs cargo and, once, the network: the
package goes into a virtual environment under target/.

For every type: blocks of random bytes with finite scales, and, where the package can quantise,
quantised tensors. Their values by the package and by `decode_blocks` (an example of crate
bitnet-quant) must have the same bits. Quantised ternary tensors must also come back as the same bytes
from our encoder.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "target" / "gguf-venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

# Byte offsets of the f16 scales in a block.
SCALES = {
    "F16": [0],
    "BF16": [],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q6_K": [208],
    "TQ1_0": [52],
    "TQ2_0": [64],
    "Q2_0": [0],
}
TERNARY = {"TQ1_0", "TQ2_0", "Q2_0"}
ROWS, COLS = 96, 2560


def enter_environment():
    """Goes on in the virtual environment, made first if it is not there."""
    if Path(sys.prefix) == VENV:
        return
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    if subprocess.run([PYTHON, "-c", "import gguf"], capture_output=True).returncode != 0:
        subprocess.run([PYTHON, "-m", "pip", "install", "-q", "gguf", "numpy"], check=True)
    sys.exit(subprocess.run([PYTHON, __file__]).returncode)


def main():
    import gguf
    import numpy as np

    subprocess.run(
        ["cargo", "build", "-q", "-p", "bitnet-quant", "--example", "decode_blocks"],
        cwd=ROOT,
        check=True,
    )
    program = ROOT / "target" / "debug" / "examples" / "decode_blocks"

    def ours(name, data, *mode):
        command = [program, name, str(COLS), *mode]
        return subprocess.run(command, input=data.tobytes(), capture_output=True, check=True).stdout

    rng = np.random.default_rng(20260101)
    failures = 0

    def compare(name, what, got, want):
        nonlocal failures
        got, want = np.frombuffer(got, want.dtype), want.ravel()
        different = want.size if got.size != want.size else int(np.count_nonzero(got != want))
        failures += different > 0
        print(f"{name:6} {what:32} {want.size:8} compared, {different} different")

    def compare_values(name, what, data, qtype):
        want = gguf.quants.dequantize(data, qtype).astype(np.float32, copy=False)
        compare(name, what, ours(name, data), np.ascontiguousarray(want).view(np.uint32))

    print(f"gguf {importlib.metadata.version('gguf')}, numpy {np.__version__}")
    for name, scales in SCALES.items():
        qtype = getattr(gguf.GGMLQuantizationType, name, None)
        if qtype is None:
            print(f"{name:6} not in this version of gguf: not compared")
            continue
        block_len, block_bytes = gguf.GGML_QUANT_SIZES[qtype]

        blocks = rng.integers(0, 256, (ROWS * COLS // block_len, block_bytes), dtype=np.uint8)
        for at in scales:
            # Exponent 31 of f16 is infinity and NaN.
            exponent = blocks[:, at + 1] & 0x7C
            blocks[exponent == 0x7C, at + 1] ^= 0x40
        if name == "BF16":
            blocks[(blocks[:, 1] & 0x7F) == 0x7F, 1] ^= 0x40
        compare_values(name, "values of random blocks", blocks.reshape(ROWS, -1), qtype)

        spread = np.exp(rng.uniform(-8, 4, (ROWS, 1)))
        tensor = (rng.standard_normal((ROWS, COLS)) * spread).astype(np.float32)
        tensor[0] = 0
        if name in TERNARY:
            tensor = np.sign(np.round(tensor / spread)).astype(np.float32)
            tensor *= rng.choice([1.0, 0.0752, 3e-4], (ROWS, COLS // 256, 1)).repeat(
                256, axis=2
            ).reshape(ROWS, COLS).astype(np.float32)
        try:
            quantised = gguf.quants.quantize(tensor, qtype).view(np.uint8)
        except NotImplementedError:
            continue
        compare_values(name, "values of a quantised tensor", quantised, qtype)
        if name in TERNARY:
            compare(name, "bytes decoded and encoded again", ours(name, quantised, "again"), quantised)
    if failures:
        sys.exit(f"{failures} comparisons failed")


if __name__ == "__main__":
    enter_environment()
    main()
