"""Damping mixes a matrix with the identity of the same trace; a multiple of the identity is what it multiplies with."""

import pytest
import torch

from keeptune.linalg.symmetric import Identity, damped

N = 7
ROOT = torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("rho", [0.0, 0.25, 1.0])
def test_damping_mixes_with_the_identity_of_the_same_trace(rho):
    F = ROOT @ ROOT.T
    before = F.clone()
    found = damped(F, rho)
    assert torch.allclose(found, (1 - rho) * F + rho * F.trace() / N * torch.eye(N).double(), rtol=0, atol=1e-12)
    assert torch.allclose(found.trace(), F.trace(), rtol=1e-12)
    assert torch.equal(F, before), "damping changed the matrix it was asked of"


@pytest.mark.parametrize("rho", [-0.1, 1.1])
def test_damping_outside_its_range_is_refused(rho):
    with pytest.raises(ValueError, match="rho"):
        damped(ROOT, rho)


def test_an_identity_multiplies_as_its_matrix():
    assert torch.equal(Identity(N, torch.tensor(0.75)) @ ROOT, 0.75 * torch.eye(N, dtype=torch.float64) @ ROOT)
