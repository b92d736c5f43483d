#!/usr/bin/env python3
"""Reads Parquet files of `bitnet batch` with pyarrow and compares them with its JSON lines.

    python3 scripts/check_parquet.py [BITNET]

BITNET is the program, target/release/bitnet unless it is said. The rows have every character that
is hard somewhere, fields that are missing, and are more than one row group has. Makes a virtual
environment under target/ and installs `pyarrow` there with pip; everything else it writes is there
too. Exit status 0 if all values agree, 1 if not.
"""

import json
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "target" / "check-parquet"

# More than one row group.
ROWS = 20_000

HARD = ["", " ", "a|b\\c", '"', "line\nbreak\r\n", "é 漢字 🙂", "\t\x00\x1f", "x" * 5000, "null"]


def rows():
    """Rows whose prompts are empty texts or numbers, so that their outputs cost next to nothing."""
    for index in range(ROWS):
        row = {"id": index, "prompt": HARD[index % len(HARD)]}
        if index % 3 == 0:
            row["note"] = {"nested": [index, None, 1.5]}
        if index % 5 == 0:
            row["output"] = "was there before"
        yield row


def as_text(value):
    """What a column of text has of a JSON value."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def main():
    program = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "target/release/bitnet").resolve()
    python = WORK / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(WORK / "venv", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "pyarrow"], check=True)
    if Path(sys.prefix) != WORK / "venv":
        sys.exit(subprocess.run([python, __file__, program]).returncode)

    import pyarrow
    import pyarrow.parquet

    source = WORK / "rows.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for row in rows():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    for target in ("out.jsonl", "out.parquet"):
        command = [program, "batch", source, "-o", WORK / target, "-n", "0", "--restart", "--quiet"]
        # Prompts that are too long for the context fail: then a column of errors has values too.
        command += ["--template", "{{ prompt }}"]
        subprocess.run(command, check=True)

    with (WORK / "out.jsonl").open(encoding="utf-8") as file:
        expected = [json.loads(line) for line in file]
    file = pyarrow.parquet.ParquetFile(WORK / "out.parquet")
    table = file.read()
    names = ["id", "prompt", "note", "input_output", "output", "finish_reason", "tokens", "error"]
    assert table.column_names == names, table.column_names
    assert file.num_row_groups > 1, file.num_row_groups
    assert table.schema.field("tokens").type == pyarrow.int64(), table.schema
    assert table.schema.field("output").type == pyarrow.string(), table.schema
    assert table.num_rows == len(expected) == ROWS, (table.num_rows, len(expected))

    different = 0
    for index, (row, found) in enumerate(zip(expected, table.to_pylist())):
        for name in names:
            value = row.get(name)
            value = value if name == "tokens" else as_text(value)
            if found[name] != value:
                different += 1
                print(f"row {index}, {name}: {found[name]!r} in place of {value!r}")
    failed = sum(row["error"] is not None for row in expected)
    print(f"{ROWS} rows, {failed} of them with errors, {file.num_row_groups} row groups:",
          f"{different} values differ" if different else "all values agree")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
