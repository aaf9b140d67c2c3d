"""How often an attack waits for the device: counted on the CPU, by the operations that would wait on a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from timm_hpm import PixelModel, ThreatModel, find_head
from timm_hpm.evaluation import ATTACKS, Budget
from timm_hpm.evaluation.attacked import AttackedModel
from timm_hpm.evaluation.batch import AttackBatch

NUM_DIGITS = 12
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select",
           "aten::unique_consecutive", "aten::_unique2"}


class Waits(TorchDispatchMode):
    """Counts the operations whose result the host reads."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        masks = name.startswith("aten::index") and any(
            isinstance(part, torch.Tensor) and part.dtype == torch.bool
            for argument in args if isinstance(argument, list | tuple) for part in argument)
        self.count += name in WAITING or masks
        return function(*args, **(kwargs or {}))


def waits(model, digits, attack, norm, iterations, surrogates=("fc", "ste")):
    batch = AttackBatch(AttackedModel(PixelModel(model), digits[0]), list(surrogates), *digits)
    torch.manual_seed(0)
    with Waits() as counted:
        ATTACKS[attack].run(batch, ThreatModel(norm, 1e-3), Budget(iterations, targets=1))
    return counted.count


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(("attack", "most"), [("apgd-ce", 0), ("apgd-t", 0), ("square", 1), ("joint", 0),
                                              ("joint-subset", 0)])
def test_a_step_waits_for_no_more_than_it_must(model, digits, attack, norm, most):
    find_head(model).inference = "batch"
    surrogates = ("soft", "ste") if "joint" in attack else ("fc", "ste")
    few, many = (waits(model, digits, attack, norm, steps, surrogates) for steps in (10, 30))
    assert many - few == 20 * most


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_fab_waits_for_its_projection_alone(model, digits, norm):
    """On a CPU it looks after each step of Newton's method, of which a projection needs a few; on a GPU after five."""
    few, many = (waits(model, digits, "fab-t", norm, steps) for steps in (10, 30))
    assert many - few <= 20 * 8
