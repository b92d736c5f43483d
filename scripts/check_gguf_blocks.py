#!/usr/bin/env python3
"""Compares our decoders of ggml's block types with llama.cpp's, to the bit.

Run from anywhere: `python3 scripts/check_gguf_blocks.py`. It needs cargo and, once, the network: the
`gguf` package of llama.cpp goes into a virtual environment under target/. That package is llama.cpp's
own port to numpy and may lack a new type. With `--llama-cpp` the C code is compared too: the ggml
that the package llama-cpp-python carries is built under target/, which needs a C and a C++ compiler
and takes about a minute.

For every type: blocks of random bytes with finite scales, and, where the reference can quantise,
quantised tensors. Their values by the reference and by `decode_blocks` (an example of crate
bitnet-quant) must have the same bits. Quantised ternary tensors must also come back as the same bytes
from our encoder.
"""

import argparse
import ctypes
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "target" / "gguf-venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

# Pinned, because `TypeTraits` below is the layout of a struct that versions of ggml may change.
LLAMA_CPP = "llama-cpp-python==0.3.36"
GGML_BUILD = ROOT / "target" / LLAMA_CPP.replace("==", "-")

# ggml's id of each type and the byte offsets of the f16 scales in a block.
TYPES = {
    "F16": (1, [0]),
    "BF16": (30, []),
    "Q8_0": (8, [0]),
    "Q4_K": (12, [0, 2]),
    "Q6_K": (14, [208]),
    "TQ1_0": (34, [52]),
    "TQ2_0": (35, [64]),
    "Q2_0": (42, [0]),
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
    sys.exit(subprocess.run([PYTHON, __file__, *sys.argv[1:]]).returncode)


def ggml_library():
    """Path of the shared library ggml-base, built first if it is not there."""
    names = ["libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml-base.dll"]

    def built():
        return next((path for name in names if (path := GGML_BUILD / "bin" / name).exists()), None)

    if built() is None:
        settings = {
            "build-dir": GGML_BUILD,
            # Only the library with the decoders: no backends, no models.
            "build.targets": "ggml-base",
            "install.components": "none",
            "cmake.define.LLAVA_BUILD": "OFF",
            "cmake.define.GGML_CPU": "OFF",
            "cmake.define.GGML_NATIVE": "OFF",
            # Fused multiply-adds, where the compiler has them, would round differently.
            "cmake.define.CMAKE_C_FLAGS": "-ffp-contract=off",
        }
        command = [PYTHON, "-m", "pip", "wheel", "-q", "--no-deps"]
        # The wheel holds no libraries: it must not be cached for whoever installs the package.
        command += ["--no-cache-dir", "--wheel-dir", GGML_BUILD / "wheel"]
        command += ["--no-binary", "llama-cpp-python", LLAMA_CPP]
        for key, value in settings.items():
            command += ["--config-settings", f"{key}={value}"]
        subprocess.run(command, check=True)
    return built() or sys.exit(f"{LLAMA_CPP} was built, but {GGML_BUILD / 'bin'} has no ggml-base")


class GgufPackage:
    """The numpy code of the `gguf` package."""

    def __init__(self):
        import gguf

        self.gguf = gguf
        self.label = f"gguf {importlib.metadata.version('gguf')}"

    def block(self, name):
        """Values and bytes of a block; None if the type is unknown."""
        type_id = TYPES[name][0]
        if getattr(self.gguf.GGMLQuantizationType, name, None) != type_id:
            return None
        return self.gguf.GGML_QUANT_SIZES[type_id]

    def decode(self, name, rows):
        return self.gguf.quants.dequantize(rows, self.gguf.GGMLQuantizationType[name])

    def quantise(self, name, tensor):
        """The rows of `tensor` as bytes; None if there is no code for it."""
        try:
            return self.gguf.quants.quantize(tensor, self.gguf.GGMLQuantizationType[name])
        except NotImplementedError:
            return None


class TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    CONVERT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", CONVERT),
        ("from_float_ref", CONVERT),
    ]


class Ggml:
    """The C code of ggml."""

    def __init__(self):
        library = ctypes.CDLL(str(ggml_library()))
        library.ggml_get_type_traits.argtypes = [ctypes.c_int]
        library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
        library.ggml_version.restype = ctypes.c_char_p
        self.library = library
        self.label = f"ggml {library.ggml_version().decode()} of {LLAMA_CPP}"

    def traits(self, name):
        return self.library.ggml_get_type_traits(TYPES[name][0]).contents

    def block(self, name):
        traits = self.traits(name)
        if (traits.type_name or b"").decode().upper() != name:
            return None
        return traits.blck_size, traits.type_size

    def decode(self, name, rows):
        import numpy as np

        block_len, block_bytes = self.block(name)
        rows = np.ascontiguousarray(rows)
        values = np.empty((rows.shape[0], rows.shape[1] // block_bytes * block_len), np.float32)
        self.traits(name).to_float(rows.ctypes.data, values.ctypes.data, values.size)
        return values

    def quantise(self, name, tensor):
        import numpy as np

        block_len, block_bytes = self.block(name)
        rows = np.empty((tensor.shape[0], tensor.shape[1] // block_len * block_bytes), np.uint8)
        tensor = np.ascontiguousarray(tensor)
        self.traits(name).from_float_ref(tensor.ctypes.data, rows.ctypes.data, tensor.size)
        return rows


def main(with_ggml):
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

    failures = 0

    def compare(name, what, got, want):
        nonlocal failures
        got, want = np.frombuffer(got, want.dtype), want.ravel()
        different = want.size if got.size != want.size else int(np.count_nonzero(got != want))
        failures += different > 0
        print(f"{name:6} {what:32} {want.size:8} compared, {different} different")

    def compare_values(reference, name, what, data):
        want = reference.decode(name, data).astype(np.float32, copy=False)
        compare(name, what, ours(name, data), np.ascontiguousarray(want).view(np.uint32))

    def compare_type(reference, rng, name):
        block = reference.block(name)
        if block is None:
            print(f"{name:6} not in this version: not compared")
            return
        block_len, block_bytes = block

        blocks = rng.integers(0, 256, (ROWS * COLS // block_len, block_bytes), dtype=np.uint8)
        for at in TYPES[name][1]:
            # Exponent 31 of f16 is infinity and NaN.
            exponent = blocks[:, at + 1] & 0x7C
            blocks[exponent == 0x7C, at + 1] ^= 0x40
        if name == "BF16":
            blocks[(blocks[:, 1] & 0x7F) == 0x7F, 1] ^= 0x40
        compare_values(reference, name, "values of random blocks", blocks.reshape(ROWS, -1))

        spread = np.exp(rng.uniform(-8, 4, (ROWS, 1)))
        tensor = (rng.standard_normal((ROWS, COLS)) * spread).astype(np.float32)
        tensor[0] = 0
        if name in TERNARY:
            tensor = np.sign(np.round(tensor / spread)).astype(np.float32)
            tensor *= rng.choice([1.0, 0.0752, 3e-4], (ROWS, COLS // 256, 1)).repeat(
                256, axis=2
            ).reshape(ROWS, COLS).astype(np.float32)
        quantised = reference.quantise(name, tensor)
        if quantised is None:
            return
        quantised = quantised.view(np.uint8)
        compare_values(reference, name, "values of a quantised tensor", quantised)
        if name in TERNARY:
            compare(name, "bytes decoded and encoded again", ours(name, quantised, "again"), quantised)

    for reference in [GgufPackage(), Ggml()] if with_ggml else [GgufPackage()]:
        print(f"{reference.label}, numpy {np.__version__}")
        rng = np.random.default_rng(20260101)
        for name in TYPES:
            compare_type(reference, rng, name)
    if failures:
        sys.exit(f"{failures} comparisons failed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", action="store_true", help="also compare with ggml's C code")
    arguments = parser.parse_args()
    enter_environment()
    main(arguments.llama_cpp)
