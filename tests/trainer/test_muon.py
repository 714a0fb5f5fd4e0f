"""Muon in float32: torch's, but for the rounding of its bfloat16; singular values near 1."""

import torch

from trainer.models.muon import Muon, orthogonal


def test_it_is_the_muon_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, 40), (40, 12), (16, 16))
    start = [torch.randn(*shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(m.clone()) for m in start] for _ in range(2))
    optimizers = (
        Muon(ours, lr=0.1),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for pair in zip(ours, theirs, strict=True):
            gradient = torch.randn(*pair[0].shape, generator=generator)
            for matrix in pair:
                matrix.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    for before, mine, other in zip(start, ours, theirs, strict=True):
        moved = other - before
        assert (mine - other).norm() < 0.02 * moved.norm()


def test_singular_values_are_near_one() -> None:
    for shape in ((8, 30), (30, 8)):
        matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        assert torch.linalg.svdvals(orthogonal(matrix)).sub(1).abs().max() < 0.45


def test_a_matrix_without_gradient_stays() -> None:
    matrix = torch.nn.Parameter(torch.ones(3, 4))
    Muon([matrix], lr=0.1).step()
    assert torch.equal(matrix.detach(), torch.ones(3, 4))
