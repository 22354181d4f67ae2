"""Unit rows and how far they lie apart."""

from __future__ import annotations

import pytest
import torch

from relssl.ops.rows import at_least_float32, spread, unit_rows


def test_spread_is_one_over_the_sphere_and_nothing_at_a_point() -> None:
    x = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0))
    assert spread(x).item() == pytest.approx(1, abs=0.01)
    assert spread(100 * x).item() == pytest.approx(spread(x).item(), rel=1e-5)  # directions alone
    one = torch.randn(1, 16, generator=torch.Generator().manual_seed(1)).expand(50, 16)
    assert spread(one).item() < 1e-6
    assert spread(one * torch.linspace(0.1, 5, 50)[:, None]).item() < 1e-6
    assert spread(torch.zeros(4, 3)).item() == 0
    assert not spread(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_digits_are_kept(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert at_least_float32(x).dtype == unit_rows(x).dtype == wide
    torch.testing.assert_close(unit_rows(x).norm(dim=1), torch.ones(5, dtype=wide))
