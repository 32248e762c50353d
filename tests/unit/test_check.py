"""The part of the self-check that really loads: as many layers as the memory holds, told, and red where it differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress import check
from compress.arch import family_of
from compress.checkpoint.headers import Header, read_header
from compress.errors import SelfCheckError
from tests import tiny

IDS = torch.randint(0, 190, (1, 16), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.usefixtures("one_thread")


def room(header: Header, layers: int) -> int:
    """The least memory in which so many layers are loaded."""
    family, low, high = family_of(header), 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if check._loadable(family, header, IDS, middle) >= layers else (middle, high)
    return high


@pytest.mark.parametrize(
    ("family", "format"),
    [
        ("llama", "w8a16"),
        ("mistral", "bnb-int8"),
        ("glm4v", "bf16"),
        ("glm46v", "w8a8"),
        ("glm46v_interleaved", "int8"),
    ],
)
def test_as_many_layers_as_there_is_room_for(family: str, format: str, tmp_path: Path) -> None:
    model = getattr(tiny, family)(tmp_path / "model", dtype=torch.bfloat16)
    small = compress.quantize(model, tmp_path / "small", format=format, machine=compress.Machine(1)).out
    header = read_header(small)
    described, total = family_of(header), family_of(header).sizes(header).layers
    assert total > 1

    def load(memory: int) -> str:
        return check._stock_load(small, described, header, IDS, memory)

    for layers in range(1, total + 1):
        assert load(room(header, layers)) == f"{layers} of {total} layers: same distribution"
    assert load(room(header, 1) - 1) == "left out: not one layer of it fits in the memory that the plan asks for"


def test_what_the_loader_has_otherwise_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(tmp_path / "model")
    header = read_header(model)
    right = check._stock_logits

    def wrong(*arguments: object) -> torch.Tensor:
        logits = right(*arguments)  # type: ignore[arg-type]
        return logits + 0.1 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))

    monkeypatch.setattr(check, "_stock_logits", wrong)
    with pytest.raises(SelfCheckError, match=r"model: 1 of 3 layers loaded by stock transformers differ by KL 0\.00"):
        check._stock_load(model, family_of(header), header, IDS, room(header, 1))


def test_what_was_loaded_stands_in_measured_json(tmp_path: Path) -> None:
    result = compress.prune(
        tiny.llama(tmp_path / "model"),
        tmp_path / "out",
        ratio=0.2,
        data={"source": "builtin", "samples": 4, "length": 32},
        machine=compress.Machine(1),
    )
    (step,) = result.measured["steps"]
    assert step["stock_load"] == "3 of 3 layers: same distribution"
    assert "stock_load" not in result.receipt["steps"][0]["self_check"]
