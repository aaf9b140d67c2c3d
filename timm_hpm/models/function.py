"""The entry `function` of a state dict, which tells weights apart that fit several networks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class StatedFunction(nn.Module):
    """Mixin of a network whose weights also fit others, and would give silently wrong predictions there.

    Its buffer `function` holds numbers that differ between those networks; loading other numbers is an error.
    """

    #: Whether weights without the entry load, as those of other projects.
    takes_unstated = False

    def state_function(self, *numbers: int, device: Any = None) -> None:
        """Registers the buffer."""
        self.function_numbers = numbers
        self.register_buffer("function", torch.tensor(numbers, device=device))

    def describe_function(self, numbers: Sequence[int]) -> str:
        """Returns the description of a network with these numbers, for a message."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key, own, errors = f"{prefix}function", list(self.function_numbers), args[-1]
        if self.takes_unstated:
            state_dict.setdefault(key, torch.tensor(own))
        given = state_dict.get(key, torch.tensor(own))
        if not isinstance(given, Tensor) or given.dtype != torch.int64 or given.shape != (len(own),):
            found = f"{given.dtype} of the shape {tuple(given.shape)}" if isinstance(given, Tensor) else (
                type(given).__name__)
            errors.append(f"the entry {key} is {found}; expected {len(own)} int64 numbers. The file is damaged, or of "
                          "another version of timm_hpm: save the weights again")
        elif not given.is_meta and given.tolist() != own:
            errors.append(f"the weights are of a network with {self.describe_function(given.tolist())}; this one has "
                          f"{self.describe_function(own)}. They would fit and give other logits; create the model with "
                          "those arguments")
        super()._load_from_state_dict(state_dict, prefix, *args)
