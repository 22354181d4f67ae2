"""Projection heads, and the head that judges pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.errors import ConfigError, unknown_name
from relssl.nets.norm import BatchNorm1d

AGGREGATIONS = ("cat", "sum", "mean", "max")


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


class NormMLPHead(nn.Module):
    """Linear, BatchNorm, LeakyReLU, Linear: SimCLR's head and DeepCluster's classifier in the relational repository.

    Biases and PyTorch's initialisation; the state dict has the original's names `linear1.*`, `bn1.*`, `linear2.*`.

    Shape:
        (B, in_dim) -> (B, out_dim)
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, *, negative_slope: float = 0.01) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_dim, hidden_dim)
        self.bn1 = BatchNorm1d(hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, out_dim)
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.leaky_relu(self.bn1(self.linear1(x)), self.negative_slope))


class DeepMLPHead(nn.Module):
    """WCL's projection: Linear, BatchNorm, ReLU twice, then Linear, with biases and PyTorch's initialisation.

    The caller L2-normalises the output. Parameters are named `linear1.*`, `bn1.*`, `linear2.*`, `bn2.*`, `linear3.*`,
    as in the released checkpoints.

    Shape:
        (B, in_dim) -> (B, out_dim)
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_dim, hidden_dim)
        self.bn1 = BatchNorm1d(hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, hidden_dim)
        self.bn2 = BatchNorm1d(hidden_dim)
        self.linear3 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.linear1(x)), inplace=True)
        return self.linear3(F.relu(self.bn2(self.linear2(x)), inplace=True))


class RelationHead(nn.Module):
    """Do two feature vectors belong to one image?  (Patacchiola & Storkey, NeurIPS 2020.)

    Linear, BatchNorm, LeakyReLU, Linear on the aggregated pair, with biases and PyTorch's initialisation; the state
    dict has the original's names `linear1.*`, `bn1.*` and `linear2.*`.  Training goes through
    `relssl.losses.relation_pairs_loss`, which has no use for lists of pairs; calling the head judges given ones.

    BatchNorm stays local under `set_norm`: its statistics are those of a process's own pairs, which the loss
    computes.

    Args:
        feature_dim: D.
        hidden: units of the hidden layer, 256 in the original.
        aggregation: `cat` (2 D inputs, the left features first), `sum`, `mean` or `max` (element-wise, D inputs).

    Shape:
        left (R, D), right (R, D) -> logits (R,), positive for "one image"

    Raises:
        ConfigError: an unknown aggregation (the original's code goes on with it), a size below 1.
    """

    norm_locked = True
    negative_slope = 0.01

    def __init__(self, feature_dim: int, hidden: int = 256, aggregation: str = "cat") -> None:
        super().__init__()
        if aggregation not in AGGREGATIONS:
            raise ConfigError(unknown_name("aggregation", aggregation, AGGREGATIONS))
        if feature_dim < 1 or hidden < 1:
            raise ConfigError(f"A relation head needs sizes of at least 1; got {feature_dim} features, {hidden} units.")
        self.aggregation = aggregation
        self.linear1 = nn.Linear(2 * feature_dim if aggregation == "cat" else feature_dim, hidden)
        self.bn1 = BatchNorm1d(hidden)
        self.linear2 = nn.Linear(hidden, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        hidden = F.leaky_relu(self.bn1(self.linear1(self._aggregate(left, right))), self.negative_slope)
        return self.linear2(hidden).squeeze(1)

    def _aggregate(self, left: Tensor, right: Tensor) -> Tensor:
        if self.aggregation == "cat":
            return torch.cat([left, right], dim=1)
        if self.aggregation == "max":
            return torch.stack([left, right]).max(0).values  # at a tie the gradient is the left one's
        return (left + right) / 2 if self.aggregation == "mean" else left + right

    def move_statistics(self, mean: Tensor, unbiased_var: Tensor) -> None:
        """Move BatchNorm's running statistics towards those of a batch of pairs, as a forward pass would."""
        self.bn1.move_running_stats(mean, unbiased_var)

    def extra_repr(self) -> str:
        return f"aggregation={self.aggregation}"
