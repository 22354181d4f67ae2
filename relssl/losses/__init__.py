"""Losses: pure functions of tensors.  Modules that hold weights or state live in `relssl.nets`."""

from __future__ import annotations

from relssl.losses.relational import relational_cross_entropy

__all__ = ["relational_cross_entropy"]
