"""auto-round: W8A16 by rounding to nearest (iters=0), written as compressed-tensors.

One scale a row: with its default, groups of 128 columns, this export refuses SmolLM2, whose 576 columns are no
multiple; its own format takes them, but stock transformers does not load that without auto-round.
"""

from __future__ import annotations

import shutil

from _report import Job, main
from auto_round import AutoRound


def rounded(job: Job) -> None:
    AutoRound(
        str(job.model), scheme="W8A16", group_size=-1, iters=0, disable_opt_rtn=True, device_map="cpu"
    ).quantize_and_save(str(job.out), format="llm_compressor")
    (folder,) = (path.parent for path in job.out.rglob("config.json"))  # it appends the names of model and scheme
    if folder != job.out:
        shutil.copytree(folder, job.out, dirs_exist_ok=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main({"W8A16": rounded}, ("auto-round", "compressed-tensors"))
