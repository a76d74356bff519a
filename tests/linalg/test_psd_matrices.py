"""A multiple of the identity is what it multiplies with."""

import torch

from keeptune.linalg.symmetric import Identity


def test_an_identity_multiplies_as_its_matrix():
    X = torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(Identity(7, torch.tensor(0.75)) @ X, 0.75 * torch.eye(7, dtype=torch.float64) @ X)
