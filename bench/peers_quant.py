"""8-bit weights and one-shot pruning of SmolLM2, by others and by us, in one run: time, peak memory, quality.

    make peers-env && .venv/bin/python bench/peers_quant.py [--rows ours-w8a16 auto-round]

Every method is a process of its own, others' in an environment of their own (bench/peers). Peaks are of the whole
process, libraries included, with its children where it has any. Quality is judged by bench/judge.py on WikiText-2 test:
the folder that was written, loaded by stock transformers; where that does not take it, the model in its maker's memory,
and the row says so. Our runs contain their self-check, which no peer has.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _process import PYTHON, command, measured, recipe, weights
from _results import ROOT, WORK, Results, say
from _texts import WikiText, judged_options, wikitext

from compress.checkpoint.source import locate

ENVIRONMENTS = ROOT / ".venv" / "peers"
SCRIPTS = ROOT / "bench" / "peers"
SAMPLES = 64  # calibration windows of the methods that prune


@dataclass(frozen=True)
class Ours:
    """A recipe of one step."""

    group: str
    step: dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A method of bench/peers/run_SCRIPT.py; `environment` None: ours."""

    group: str
    script: str
    environment: str | None
    method: str

    @property
    def python(self) -> Path:
        return Path(PYTHON) if self.environment is None else ENVIRONMENTS / self.environment / "bin" / "python"


ROWS: dict[str, Ours | Peer] = {
    "ours-w8a16": Ours("W8A16", {"quantize": {"format": "w8a16"}}),
    "llm-compressor-w8a16": Peer("W8A16", "llm_compressor", "llm-compressor", "W8A16"),
    "llm-compressor-w8a16-model-free": Peer("W8A16", "llm_compressor", "llm-compressor", "W8A16-model-free"),
    "auto-round-w8a16": Peer("W8A16", "auto_round", "auto-round", "W8A16"),
    "modelopt-int8-weight-only": Peer("W8A16", "modelopt", "modelopt", "INT8-weight-only"),
    "ours-w8a8": Ours("W8A8", {"quantize": {"format": "w8a8"}}),
    "llm-compressor-w8a8": Peer("W8A8", "llm_compressor", "llm-compressor", "W8A8"),
    "llm-compressor-w8a8-model-free": Peer("W8A8", "llm_compressor", "llm-compressor", "W8A8-model-free"),
    "ours-prune": Ours("FFN, 20 %", {"prune": {"ratio": 0.2}}),
    "torch-pruning-magnitude": Peer("FFN, 20 %", "torch_pruning", None, "magnitude"),
    "torch-pruning-taylor": Peer("FFN, 20 %", "torch_pruning", None, "taylor"),
}


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    model: Path
    text: WikiText
    windows: int
    threads: int

    def row(self, name: str) -> dict[str, Any]:
        """Run one method and judge what it wrote; CalledProcessError when it fails."""
        row, out, log = ROWS[name], WORK / f"peers-{name}", WORK / f"peers-{name}.log"
        shutil.rmtree(out, ignore_errors=True)
        line = self._ours(name, row, out) if isinstance(row, Ours) else self._peer(row, out)
        ran = measured(line, threads=self.threads, log=log)
        found = {} if isinstance(row, Ours) else ran.document()
        found |= {"group": row.group, "seconds": round(ran.seconds, 1), "peak": ran.peak, "bytes": weights(out)}
        found |= self._judged(row, out, log) | {"threads": self.threads}
        shutil.rmtree(out)
        return found

    def _ours(self, name: str, row: Ours, out: Path) -> list[str]:
        data = {"calibration": {"source": str(self.text.valid), "samples": SAMPLES}}
        document = {"model": str(self.model), "data": data, "steps": [row.step], "evaluate": "never"}
        return command(recipe(f"peers-{name}", document), out, self.threads)

    def _peer(self, row: Peer, out: Path) -> list[str]:
        script = str(SCRIPTS / f"run_{row.script}.py")
        line = [str(row.python), script, str(self.model), str(out), row.method, "--threads", str(self.threads)]
        return [*line, "--calibration", str(self.text.valid)]

    def _judged(self, row: Ours | Peer, out: Path, log: Path) -> dict[str, Any]:
        """The judge's findings, and on what: `stock` or `memory`."""
        judge = [PYTHON, str(ROOT / "bench" / "judge.py"), str(out), str(self.text.test)]
        asked = ["--windows", str(self.windows)]
        try:
            line = [*judge, *asked, "--ref", str(self.model)]
            return {**measured(line, threads=self.threads, log=log).document(), "judged": "stock"}
        except subprocess.CalledProcessError:
            if isinstance(row, Ours):
                raise
            reason = _last(log)
        line = [*self._peer(row, out.with_name(out.name + "-judged")), "--judge", str(self.text.test), *asked]
        try:
            found = measured(line, threads=self.threads, log=log).document()
        finally:
            shutil.rmtree(out.with_name(out.name + "-judged"), ignore_errors=True)
        return {**found, "judged": "memory", "stock_load": reason}


def main() -> None:
    given = _arguments()
    text = wikitext(given.data)
    if text is None:
        return
    results = Results("peers_quant", given.results)
    bench = Bench(locate(given.model).folder, text, given.windows, given.threads)
    failed = False
    for name in given.rows:
        key = {"row": name, "model": given.model, "windows": given.windows}
        found = None if given.again else results.find(key)
        if found is None:
            row = ROWS[name]
            if isinstance(row, Peer) and not row.python.exists():
                say(f"{name:34} not measured: its environment is not there; make peers-env")
                continue
            try:
                found = bench.row(name)
            except subprocess.CalledProcessError as error:
                log = WORK / f"peers-{name}.log"
                say(f"{name:34} not measured: exit code {error.returncode}, {_last(log)} ({log})")
                failed = True
                continue
            results.add(key, found)
        say(
            f"{name:34} {found['seconds']:6.1f} s  {found['peak'] / 2**20:6.0f} MiB  "
            f"{found['bytes'] / 2**20:5.0f} MiB  perplexity {found['ppl']:.3f}  KL {found['kl']:.5f}  {found['judged']}"
        )
    if failed:
        raise SystemExit(1)


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").replace(f"{ROOT}/", "").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


def _arguments() -> argparse.Namespace:
    parser, names = judged_options(__doc__), list(ROWS)
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=", ".join(names))
    return parser.parse_args()


if __name__ == "__main__":
    main()
