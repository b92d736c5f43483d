#!/usr/bin/env python3
"""Measures `bitnet bench` and installed peers in alternation and writes a record of this machine.

    cargo build --release
    python3 benchmarks/run.py --llama-cpp-python PYTHON:MODEL.gguf [--llama-bench NAME=PATH:MODEL]...

Each round runs every program once, one after another (A B C A B C ...), so that what disturbs the
machine disturbs all of them. What counts is the median over the rounds and the ratio of two medians of
one record. PYTHON is an interpreter that has llama-cpp-python, MODEL what make_peer_model.py writes.
Standard library only.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUSY_CORES = 0.1
SLOWED = 1.1


def spin(_):
    start = time.perf_counter()
    total = 0
    for i in range(2_000_000):
        total += i
    return time.perf_counter() - start


def busy_cores(seconds=3.0):
    """Cores that other programs keep busy, where /proc tells; the load average would count this one."""
    def busy():
        fields = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(fields) - fields[3] - fields[4]
    if not Path("/proc/stat").exists():
        return None
    before = busy()
    time.sleep(seconds)
    return (busy() - before) / os.sysconf("SC_CLK_TCK") / seconds


def idle_check():
    """Whether others use the cores, and whether two processes at once are as fast as one alone."""
    busy = busy_cores()
    alone = min(spin(0) for _ in range(5))
    with multiprocessing.Pool(2) as pool:
        together = min(max(pool.map(spin, [0, 1], chunksize=1)) for _ in range(5))
    slowdown = together / alone
    idle = (busy is None or busy <= BUSY_CORES) and slowdown <= SLOWED
    words = "idle" if idle else "NOT IDLE: the figures of this run are of no use for comparison"
    shown = "unknown" if busy is None else f"{busy:.2f}"
    print(f"machine: {words} ({shown} cores busy, two at once take {slowdown:.2f} times as long as one)", file=sys.stderr)
    return {"idle": idle, "busy_cores": busy, "two_core_slowdown": slowdown}


def output_of(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stderr.strip()}")
    return result.stdout


def counts(tests, kind):
    return ",".join(test[2:] for test in tests if test.startswith(kind)) or "0"


class Bitnet:
    def __init__(self, program, shape, variant):
        self.program, self.shape, self.variant = program, shape, variant
        self.name = variant["name"]
        self.facts = {}

    def run(self, tests, threads):
        command = [self.program, "--quiet", "bench", "--shape", self.shape, "--reps", "1", "--format", "json",
                   "-p", counts(tests, "pp"), "-n", counts(tests, "tg"), "-t", str(threads), *self.variant["flags"]]
        report = json.loads(output_of(command))
        self.facts = {"machine": report["machine"], "model": report["model"]}
        return {row["test"]: row["tokens_per_s"]["median"] for row in report["rows"]}


class LlamaCppPython:
    def __init__(self, place):
        self.python, self.model = place.split(":", 1)
        self.name = "llama.cpp (llama-cpp-python)"
        self.facts = {}

    def run(self, tests, threads):
        script = HERE / "llama_cpp_peer.py"
        report = json.loads(output_of([self.python, script, self.model, str(threads), "1", *tests]).splitlines()[-1])
        self.facts = {"version": report["version"], "model": Path(self.model).name}
        return {test: speeds[0] for test, speeds in report["tokens_per_s"].items()}


class LlamaBench:
    """A `llama-bench` of llama.cpp or of a program descended from it."""

    def __init__(self, text):
        self.name, place = text.split("=", 1)
        self.program, self.model = place.split(":", 1)
        self.facts = {"model": Path(self.model).name}

    def run(self, tests, threads):
        command = [self.program, "-m", self.model, "-p", counts(tests, "pp"), "-n", counts(tests, "tg"),
                   "-t", str(threads), "-r", "1", "-o", "json"]
        speeds = {}
        for row in json.loads(output_of(command)):
            kind, tokens = ("pp", row["n_prompt"]) if row["n_prompt"] else ("tg", row["n_gen"])
            speeds[f"{kind}{tokens}"] = row["avg_ts"]
        return speeds


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


def markdown(record):
    lines = [f"# {record['date']}, {record['machine'].get('cpu', 'unknown CPU')}", ""]
    for key, value in record["machine"].items():
        lines.append(f"* {key}: {value}")
    for name, facts in record["programs"].items():
        gates = facts.get("model", {}).get("gate_sparsity") if isinstance(facts.get("model"), dict) else None
        if gates is not None:
            lines.append(f"* {name}: {100 * gates:.1f} % of the gates are zero, measured")
        elif facts:
            lines.append(f"* {name}: {', '.join(f'{k} {v}' for k, v in facts.items())}")
    for when in ("before", "after"):
        check = record["idle"][when]
        busy = "unknown" if check["busy_cores"] is None else f"{check['busy_cores']:.2f}"
        lines.append(f"* machine {when}: {'idle' if check['idle'] else 'NOT idle'}, {busy} cores busy, "
                     f"slowdown of two cores {check['two_core_slowdown']:.2f}")
    lines += [f"* command: `{record['command']}`", "",
              "Tokens per second: median over the rounds, slowest and fastest; and the ratio of its median to that "
              "of the first peer.", "",
              "| program | threads | test | median | min | max | ratio |", "| --- | ---: | --- | ---: | ---: | ---: | ---: |"]
    for row in record["rows"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"| {row['program']} | {row['threads']} | {row['test']} | {row['median']:.2f} | {row['min']:.2f} "
                     f"| {row['max']:.2f} | {ratio} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bitnet", default=HERE.parent / "target" / "release" / "bitnet", help="our program")
    parser.add_argument("--llama-cpp-python", metavar="PYTHON:MODEL", help="interpreter with the package, and a GGUF file")
    parser.add_argument("--llama-bench", metavar="NAME=PATH:MODEL", action="append", default=[], help="a peer's own program")
    parser.add_argument("--definitions", default=HERE / "definitions.json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", help="such as 1,2, in place of those of the definitions")
    parser.add_argument("--tests", help="such as pp64,tg8, in place of those of the definitions")
    parser.add_argument("--records", default=HERE / "records", type=Path, help="folder for the record")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds: give at least 1; a record to compare with needs 5")

    definitions = json.loads(args.definitions.read_text())
    tests = args.tests.split(",") if args.tests else definitions["tests"]
    threads_list = [int(n) for n in args.threads.split(",")] if args.threads else definitions["threads"]
    ours = [Bitnet(args.bitnet, definitions["shape"], variant) for variant in definitions["variants"]]
    peers = [LlamaCppPython(args.llama_cpp_python)] if args.llama_cpp_python else []
    peers += [LlamaBench(text) for text in args.llama_bench]
    programs = ours + peers

    before = idle_check()
    speeds = {}
    for number in range(args.rounds):
        for threads in threads_list:
            for program in programs:
                for test, speed in program.run(tests, threads).items():
                    speeds.setdefault((program.name, threads, test), []).append(speed)
                    print(f"round {number + 1}: {program.name}, {threads} threads, {test}: {speed:.2f}", file=sys.stderr)
    after = idle_check()

    rows = []
    for (name, threads, test), values in speeds.items():
        row = {"program": name, "threads": threads, "test": test, **spread(values)}
        base = speeds.get((peers[0].name, threads, test)) if peers else None
        row["ratio"] = row["median"] / statistics.median(base) if base else None
        rows.append(row)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    machine = ours[0].facts.get("machine", {}) if ours else {}
    record = {
        "date": today,
        "machine": machine,
        "idle": {"before": before, "after": after},
        "command": " ".join(["python3", "benchmarks/run.py", *sys.argv[1:]]),
        "programs": {program.name: program.facts for program in programs},
        "rows": rows,
    }
    words = f"{machine.get('cpu') or platform.machine()} {machine.get('cores', os.cpu_count())} cores".lower()
    label = "-".join("".join(c if c.isalnum() else " " for c in words).split())
    args.records.mkdir(parents=True, exist_ok=True)
    base = args.records / f"{today}-{label}"
    base.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    base.with_suffix(".md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
