"""Where measurements are kept: one JSON file a script, one row a measurement, written as soon as it was taken.

A row holds its key (what was measured, under which settings), what was found, and the machine, versions and date of
that measurement. A row whose key is on file is not measured again, so every script can be stopped and resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "out" / "bench"  # git ignores it
sys.path.append(str(ROOT))  # for scripts that use descriptions or drivers of tests/, which no package holds
LIBRARIES = ("autoglm-compress", "torch", "transformers", "torch-pruning", "safetensors", "bitsandbytes")


class Results:
    """The rows of one script in `folder`/NAME.json."""

    def __init__(self, name: str, folder: Path) -> None:
        self.file = folder / f"{name}.json"
        self.rows = self._read()

    def _read(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.file.read_text())["rows"] if self.file.exists() else []
        return rows

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was found for exactly this key, or None."""
        return next((row["found"] for row in self.rows if row["key"] == dict(key)), None)

    def add(self, key: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Put one measurement on file, in place of an older one with the same key."""
        row = {"key": dict(key), "found": dict(found), "machine": machine(), "versions": versions(), "date": date()}
        # read anew: another process may have put rows there meanwhile
        self.rows = [old for old in self._read() if old["key"] != row["key"]] + [row]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(self.file.name + ".partial")
        partial.write_text(json.dumps({"rows": self.rows}, indent=1) + "\n")
        os.replace(partial, self.file)


def options(description: str | None) -> argparse.ArgumentParser:
    """The parser that every script starts from."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the JSON files")
    parser.add_argument("--again", action="store_true", help="measure rows that are on file once more")
    return parser


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, bytes of memory, and the load when the row was written."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": round(os.getloadavg()[0], 1),
    }


def _cpu() -> str:
    """The model name, with the numbers that tell processors of the same name apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    if "model" in fields:
        name += f" (family {fields.get('cpu family')}, model {fields['model']}, stepping {fields.get('stepping')})"
    return name


def versions() -> dict[str, str]:
    """Python, the libraries that matter, and the commit; `+` after it: the tree had changes."""
    found = {"python": platform.python_version(), "commit": _commit()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "compress") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def date() -> str:
    """Now, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def say(line: str) -> None:
    """One line, at once."""
    print(line, flush=True)
