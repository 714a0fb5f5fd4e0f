"""A checkpoint's tensors as parts of a rank's rows of the parameters."""

import torch

from trainer.models.hf_layout import HfTensor


def test_the_ranks_parts_of_a_tensor_make_up_the_whole() -> None:
    experts_ERC = torch.arange(5 * 4 * 3).view(5, 4, 3)
    whole = HfTensor(name="all", shape=(5, 4, 3), param="experts")
    gate = HfTensor(name="3.gate", shape=(2, 3), param="experts", row=3, within=(0, 2))
    up = HfTensor(name="3.up", shape=(2, 3), param="experts", row=3, within=(2, 4))
    for tensor, expected in ((whole, experts_ERC), (gate, experts_ERC[3, :2]), (up, experts_ERC[3, 2:])):
        found = torch.full(tensor.shape, -1)
        for first in (0, 2, 4):  # three ranks with two rows, two rows and one row
            part = tensor.part_in(experts_ERC[first : first + 2], first_row=first)
            if part is not None:
                view, start = part
                found[start : start + len(view)] = view
        assert torch.equal(found, expected)
    assert whole.part_in(experts_ERC[5:], first_row=5) is None
