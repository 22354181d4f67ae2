"""Numerical primitives that losses are built from; each keeps its memory small and states its formula."""
