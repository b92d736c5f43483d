#!/usr/bin/env python3
"""Checks that bitnet and huggingface_hub find each other's models.

    cargo build -p bitnet-cli && cargo build -p bitnet-testing --example hub
    python3 scripts/check_hub_cache.py [MODEL_FOLDER]

Serves a model folder (models/tiny) as a repository from a hub on this machine, and fetches it with both
programs into caches of their own. Each must then read the other's cache without the network, the blobs must
be the same files, and each must go on with what the other has begun. huggingface_hub is installed from PyPI
into target/hub-venv.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "target"
VENV = TARGET / "hub-venv"
NAME = "org/story"
FOLDER = "models--org--story"


def run_in_venv():
    """Runs this script again with huggingface_hub."""
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(VENV, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "huggingface_hub"], check=True)
    sys.exit(subprocess.run([python, __file__, *sys.argv[1:]]).returncode)


def client(code, cache, endpoint, offline=False):
    """Runs Python code with huggingface_hub in a process of its own, because it reads variables once."""
    result = subprocess.run(
        [sys.executable, "-c", f"from huggingface_hub import *\n{code}"],
        env=environment(cache, endpoint, offline), capture_output=True, text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def bitnet(arguments, cache, endpoint, offline=False):
    program = TARGET / "debug" / "bitnet"
    result = subprocess.run(
        [program, *arguments], env=environment(cache, endpoint, offline), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def environment(cache, endpoint, offline):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    switch = {"HF_HUB_OFFLINE": "1"} if offline else {}
    return {**kept, "HF_HOME": str(cache), "HF_ENDPOINT": endpoint, **switch}


def blobs(cache):
    folder = cache / "hub" / FOLDER / "blobs"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def links(cache):
    folder = cache / "hub" / FOLDER / "snapshots"
    paths = [path for path in folder.rglob("*") if path.is_symlink()]
    return {str(path.relative_to(folder)): os.readlink(path) for path in paths}


def check(model, endpoint, caches):
    ours, theirs, begun = (caches / name for name in ("ours", "theirs", "begun"))
    ours_path = bitnet(["pull", NAME], ours, endpoint)
    download = f"print(snapshot_download('{NAME}'))"
    theirs_path = client(download, theirs, endpoint)

    mine, other = blobs(ours), blobs(theirs)
    assert mine and all(other[name] == contents for name, contents in mine.items())
    print(f"same blobs: {len(mine)} of ours are among their {len(other)}")
    mine, other = links(ours), links(theirs)
    assert mine and all(other[name] == target for name, target in mine.items())
    refs = [(cache / "hub" / FOLDER / "refs" / "main").read_text() for cache in (ours, theirs)]
    assert refs[0] == refs[1]
    print("same links and reference")

    assert client(download, ours, endpoint, offline=True) == ours_path
    for file in Path(ours_path).iterdir():
        found = client(f"print(hf_hub_download('{NAME}', '{file.name}'))", ours, endpoint, offline=True)
        assert found == str(file)
    size = client(
        "info = scan_cache_dir()\nassert not info.warnings, info.warnings\n"
        "print(info.size_on_disk)", ours, endpoint, offline=True,
    )
    assert int(size) == sum(len(contents) for contents in blobs(ours).values())
    print("huggingface_hub reads our cache offline, and scans it without a warning")

    assert NAME in bitnet(["list"], theirs, endpoint, offline=True)
    prompt = ["run", "Once upon a time", "-n", "8", "-m"]
    text = bitnet([*prompt, NAME], theirs, endpoint, offline=True)
    assert text == bitnet([*prompt, model], ours, endpoint, offline=True)
    pulled = bitnet(["pull", NAME, "--json"], theirs, endpoint)
    assert '"fetched_bytes":0' in pulled, pulled
    assert bitnet(["pull", NAME], theirs, endpoint) == theirs_path
    print("bitnet reads their cache offline, and has nothing to fetch")

    client(f"hf_hub_download('{NAME}', 'config.json')", begun, endpoint)
    bitnet(["pull", NAME], begun, endpoint)
    client(download, begun, endpoint)
    assert links(begun) == links(theirs)
    assert blobs(begun) == blobs(theirs)
    print("each goes on with what the other has begun")

    bitnet(["rm", NAME, "--yes"], theirs, endpoint)
    left = client("print(len(scan_cache_dir().repos))", theirs, endpoint, offline=True)
    assert left == "0"
    print("what bitnet removes is gone for huggingface_hub")


def main():
    try:
        import huggingface_hub
    except ImportError:
        run_in_venv()
    model = str(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "models" / "tiny").resolve())
    emulator = TARGET / "debug" / "examples" / "hub"
    if not emulator.exists():
        sys.exit(f"{emulator} is not built: see the top of this script")
    server = subprocess.Popen([emulator, NAME, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        endpoint = server.stdout.readline().strip()
        with tempfile.TemporaryDirectory() as caches:
            check(model, endpoint, Path(caches))
        print(f"all passed with huggingface_hub {huggingface_hub.__version__}")
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
