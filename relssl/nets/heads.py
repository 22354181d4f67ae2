"""Projection heads."""

from __future__ import annotations

from torch import Tensor, nn


class MLPHead(nn.Module):
    """ReSSL's projection: Linear, ReLU, Linear with biases and PyTorch's initialisation, no BatchNorm.

    The caller L2-normalises the output.  Parameters are named `linear1.*` and `linear2.*`, as in the released
    checkpoints.

    Shape:
        (B, in_dim) -> (B, out_dim)
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_dim, hidden_dim)
        self.relu = nn.ReLU(inplace=True)
        self.linear2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.relu(self.linear1(x)))
