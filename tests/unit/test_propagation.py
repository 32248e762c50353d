"""What is wanted of an FFN in front of the norm through which its layer adds what it gives."""

from __future__ import annotations

import torch
from torch import nn

from compress.arch import Cut, Group
from compress.steps.prune.gauss_newton import Seen
from compress.steps.prune.propagation import Shifting
from compress.stream.fed import Fed

H, N = 12, 20


class Layer(nn.Module):
    """x -> x + norm(down(tanh(up x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(H, N, bias=False), nn.Linear(N, H, bias=False)
        self.post_mlp_layernorm = nn.RMSNorm(H, eps=1e-6)
        self.post_mlp_layernorm.weight.data.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gave: torch.Tensor = x + self.post_mlp_layernorm(self.down_proj(torch.tanh(self.up_proj(x))))
        return gave


@torch.no_grad()
def test_behind_the_norm_it_is_what_the_dense_model_gave_more() -> None:
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(3, 5, H)
    inside = torch.tanh(layer.up_proj(x))
    alone = layer.down_proj(inside)
    sideways = 1e-3 * torch.randn_like(alone)  # a norm does not see how long its input is
    sideways -= alone * (sideways * alone).sum(-1, keepdim=True) / alone.square().sum(-1, keepdim=True)
    more = layer.post_mlp_layernorm(alone + sideways) - layer.post_mlp_layernorm(alone)
    group = Group("ffn", N, "down_proj", 1, (Cut("up_proj.weight", 0), Cut("down_proj.weight", 1)), "n", N)
    shifting, seen = Shifting(Fed(x), layer(x) + 2 * more, 0.5, group, "cpu"), Seen(x, alone.clone())
    with shifting.watching(layer, seen):
        for part in x.split(2):
            layer(part)
    moved = layer.post_mlp_layernorm(seen.outputs) - layer.post_mlp_layernorm(alone)
    assert float((moved - more).norm() / more.norm()) < 0.03
    shift, found = seen.outputs - alone, shifting.result()
    torch.testing.assert_close(found.product, shift.flatten(0, 1).T @ inside.flatten(0, 1) / 15, rtol=1e-4, atol=1e-7)
    assert abs(found.energy / float(shift.square().sum() / 15) - 1) < 1e-4
