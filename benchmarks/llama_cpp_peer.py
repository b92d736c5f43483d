#!/usr/bin/env python3
"""Times llama.cpp through the low-level functions of the package llama-cpp-python, for `run.py`:

    python llama_cpp_peer.py MODEL THREADS REPETITIONS TEST...

A test is `pp512` (one call for the whole prompt, in steps of at most 512 tokens) or `tg128` (one
token per call, without sampling). Each runs once to warm up. Prints one JSON object: tokens per second
of every repetition of every test.
"""

import ctypes
import json
import sys
import time

import llama_cpp


@llama_cpp.llama_log_callback
def silent(_level, _text, _data):
    """Keeps the notes of llama.cpp off the terminal."""


def forget(context):
    """Empties the context."""
    memory = llama_cpp.llama_get_memory(context)
    llama_cpp.llama_memory_clear(memory, True)


def decode(context, tokens):
    ids = (llama_cpp.llama_token * len(tokens))(*tokens)
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(tokens))) != 0:
        sys.exit("llama_decode failed")


def once(context, test, vocabulary):
    kind, count = test[:2], int(test[2:])
    tokens = [(i * 7919 + 11) % vocabulary for i in range(count)]
    forget(context)
    llama_cpp.llama_synchronize(context)
    start = time.perf_counter()
    if kind == "pp":
        decode(context, tokens)
    else:
        for token in tokens:
            decode(context, [token])
            llama_cpp.llama_synchronize(context)
    llama_cpp.llama_synchronize(context)
    return count / (time.perf_counter() - start)


def main():
    path, threads, repetitions, tests = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        path.encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        sys.exit(f"{path}: llama.cpp cannot load it")
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = max([64] + [int(test[2:]) for test in tests])
    parameters.n_batch = max(512, parameters.n_ctx)
    parameters.n_ubatch = 512
    parameters.n_threads = threads
    parameters.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        sys.exit(f"{path}: llama.cpp cannot make a context")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    speeds = {}
    for test in tests:
        # The same warm-up as `bitnet bench`: a whole prompt, or a few tokens.
        once(context, test if test.startswith("pp") else f"tg{min(8, int(test[2:]))}", vocabulary)
        speeds[test] = [once(context, test, vocabulary) for _ in range(repetitions)]
    print(json.dumps({"version": llama_cpp.__version__, "tokens_per_s": speeds}))


if __name__ == "__main__":
    main()
