"""Memory of evaluations: files written part by part, and the peaks of real processes."""

from pathlib import Path

import pytest
import torch
from processes import ROOT, python
from safetensors import safe_open
from safetensors.torch import load_file

from timm_hpm.files import Parts, save_parts

# Files, part by part


TENSORS = {
    "images": torch.rand(5, 3, 4, 4),
    "labels": torch.arange(7) - 3,
    "nothing": torch.empty(0, 3, 4, 4),
    "no pixels": torch.empty(3, 0),
    "ste/apgd-ce": torch.rand(5, 3, 4, 4).transpose(1, 2),
    "one": torch.tensor([2 ** 40]),
}


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_a_file_that_was_written_part_by_part_is_read_equal(tmp_path, size):
    path = tmp_path / "tensors.safetensors"
    metadata = {"protocol": '{"name": "été ∞"}', "other": ""}
    save_parts({name: Parts(tensor, iter(tensor.split(size))) for name, tensor in TENSORS.items()}, path, metadata)
    found = load_file(path)
    assert found.keys() == TENSORS.keys() and list(tmp_path.iterdir()) == [path]
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata


# Prints the most memory in MiB that this process had, after each evaluation of so many images.
SCRIPT = """
import sys
import torch
import timm_hpm
from timm_hpm import HPMHead, ThreatModel, mixed_surrogate_attack
from timm_hpm.evaluation import PROTOCOLS, Budget


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, SIDE // 4, SIDE // 4)
        self.fc = HPMHead(128, 10, inference="batch")

    def forward(self, x):
        return self.fc(self.conv(x).relu().flatten(1))


def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM"))


def evaluate(num_images, folder=None, save=False, **protocol):
    images = torch.rand(num_images, 3, SIDE, SIDE)
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(dim=1) for part in images.split(100)])
    changed = PROTOCOLS["standard"].changed(budgets=BUDGETS, surrogates_at_once=5, **protocol)
    report = mixed_surrogate_attack(model, images, labels, threat, protocol=changed, batch_size=100, folder=folder,
                                    save_adversarial=save)
    if save:
        verdicts = timm_hpm.rejudge(model, folder + "/adversarial.safetensors")
        assert verdicts.items() <= report.verdicts.items()
    print(peak(), len(report.correct) - 1, report.robust_accuracy, flush=True)


BUDGETS = {"apgd-ce": Budget(1), "apgd-t": Budget(1, 1), "fab-t": Budget(1, 1), "square": Budget(1),
           "apgd-chain": Budget(1), "joint": Budget(1), "joint-subset": Budget(1, restarts=2)}
torch.manual_seed(0)
torch.set_num_threads(1)
model = Net().eval()
model.fc.set_prototypes(torch.randn(10, 128))
threat = ThreatModel("Linf", 0.3)
"""


def peaks(side: int, *calls: str) -> list[tuple[int, int, float]]:
    """Returns peak in MiB, number of candidate sets and robust accuracy after each call of the script's `evaluate`."""
    code = "\n".join([f"SIDE = {side}", SCRIPT, *calls])
    # The threshold above which glibc gives memory back moves, and the peak with it, unless it is set.
    done = python("-c", code, folder=ROOT, MALLOC_MMAP_THRESHOLD_="65536")
    return [(int(peak), int(sets), float(robust)) for peak, sets, robust in map(str.split, done.stdout.splitlines())]


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for a process's peak memory")


@linux
def test_images_that_are_broken_do_not_stay_in_memory(tmp_path):
    few, many = peaks(64, *(f"evaluate({number}, {str(tmp_path / str(number))!r}, attacks=['apgd-ce'], "
                            "surrogates=['fc', 'ste'])" for number in (200, 1200)))
    assert few[1] == many[1] == 2 and many[2] < 0.5
    # The images themselves, and what an allocator does not give back. What broke an image in an attack, what did in
    # the assembled batch, and each set of candidates, would be as much again.
    images = 1000 * 3 * 64 ** 2 * 4 / 2 ** 20
    assert many[0] - few[0] <= 1.4 * images


@linux
@pytest.mark.slow
def test_ten_thousand_images_under_every_attack_fit_in_4_gib(tmp_path):
    few, saved = peaks(32, "evaluate(2000)", f"evaluate(10_000, {str(tmp_path)!r}, True)")
    assert few[1] == saved[1] == 5 * 5 + 2 * (1 + 2) + 1
    images = 8000 * 3 * 32 ** 2 * 4 / 2 ** 20
    # Judging again has one set of candidates in memory at a time.
    assert saved[0] - few[0] <= 3 * images and saved[0] < 4096
