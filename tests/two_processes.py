"""A program for two processes: the first step of a training run, and a short run, each with its own images."""

import sys
from collections.abc import Callable

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import timm_hpm
from timm_hpm.attacks import pgd
from timm_hpm.training import Run, TrainConfig
from timm_hpm.training.distributed import reduced
from timm_hpm.training.objectives import cross_entropy
from timm_hpm.training.trunk import PixelTrunk, inputs_only


def first_step(images: torch.Tensor, labels: torch.Tensor, wrap: Callable[[nn.Module], nn.Module]) -> dict:
    """Returns adversarial images of the embedded network, their logits, and the gradients of a wrapped trunk."""
    model = timm.create_model("hpm_wrn10_2", pretrained=True, inference="batch").eval()
    trunk = PixelTrunk(model)
    trained = wrap(trunk)
    with inputs_only(trunk):
        found = pgd(lambda x: trunk.surrogate_logits("soft", x), images, labels, "Linf:0.1", steps=2,
                    random_start=False)
    output, = trained(found)
    cross_entropy([output], labels, TrainConfig()).backward()
    return {"found": found, "logits": output[1].detach(),
            "gradients": [parameter.grad for parameter in model.parameters()]}


def train_two(folder: str) -> None:
    """Asserts that weights, prototypes and BatchNorm's statistics are equal after a run on each process's images."""
    run = Run(TrainConfig(device="cpu", pretrained=True, epochs=1, lr=0.05, attack_steps=1, val_attack_steps=1,
                          batch_size=48, grad_accum_steps=2, prototype_features="both", model_ema=True,
                          model_ema_decay=0.5, awp_gamma=0.01, extra_data=f"{folder}/more.npz"), f"{folder}/run",
              log=lambda line: None)
    run.train()
    for name, tensor in [*run.model.state_dict().items(), *run.ema.module.state_dict().items()]:
        parts = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(parts, tensor)
        assert torch.equal(*parts), name
    assert run.head.num_updates.max() > 6
    accelerator = run.accelerator
    del run
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    images, labels = (part[:64] for part in timm_hpm.load_split("digits", "train").tensors)
    mine = slice(32 * rank, 32 * rank + 32)
    answers = first_step(images[mine], labels[mine], DistributedDataParallel)
    model = timm.create_model("hpm_wrn10_2", pretrained=True)
    shard = [(images[row].unsqueeze(0), labels[row].unsqueeze(0)) for row in range(rank, 64, 2)]
    timm_hpm.fit_prototypes(timm_hpm.PixelModel(model), shard, reduce=reduced)
    answers["prototypes"] = timm_hpm.find_head(model).prototypes
    torch.save(answers, f"{sys.argv[1]}/rank{rank}.pt")
    train_two(sys.argv[1])
