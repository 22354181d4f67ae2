"""Losses: pure functions of tensors.  Modules that hold weights or state live in `relssl.nets`."""

from __future__ import annotations

from relssl.losses.assignment import assignment_cross_entropy, sinkhorn_assign
from relssl.losses.component_contrastive import component_contrastive, connected_components, nearest_neighbours
from relssl.losses.nt_xent import nt_xent
from relssl.losses.relation_pairs import relation_pairs_loss
from relssl.losses.relational import relational_cross_entropy
from relssl.losses.relicv2 import relicv2_loss, relicv2_terms

__all__ = [
    "assignment_cross_entropy",
    "component_contrastive",
    "connected_components",
    "nearest_neighbours",
    "nt_xent",
    "relation_pairs_loss",
    "relational_cross_entropy",
    "relicv2_loss",
    "relicv2_terms",
    "sinkhorn_assign",
]
