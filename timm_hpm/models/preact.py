"""`PreActNet`, the pre-activation residual network behind the WideResNets and PreActResNet-18."""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers import DropPath, create_classifier
from timm.models import checkpoint_seq
from torch import Tensor, nn

LAYOUTS: Final = ("trades", "deepmind")
SHORTCUTS: Final = ("activated", "raw", "raw3x3")


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
                          f"{self.describe_function(own)}. They would fit and give other logits; pass those arguments")
        super()._load_from_state_dict(state_dict, prefix, *args)


class EndPadConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 2 that pads one row below and one column to the right, and nothing else.

    For even sizes that is TensorFlow's SAME padding, which shifts the grid by one pixel from PyTorch's `padding=1`. As
    a `Conv2d` with its own padding it also works outside its model, as in timm's `features_only`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the convolution of `x` (B, in_channels, H, W), with H and W even, as (B, out_channels, H/2, W/2)."""
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def conv3x3(in_chs: int, out_chs: int, stride: int, layout: str, **factory: Any) -> nn.Conv2d:
    """Returns a 3x3 convolution without bias, with the padding of `layout`; `factory` is device and dtype."""
    if layout == "deepmind" and stride == 2:
        return EndPadConv2d(in_chs, out_chs, 3, stride=stride, bias=False, **factory)
    return nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False, **factory)


def activation(layout: str) -> nn.Module:
    """Returns the activation of a layout."""
    # Not in place: after a BatchNorm, which keeps its input and not its output, that would save no memory.
    return nn.SiLU() if layout == "deepmind" else nn.ReLU()


class PreActBlock(nn.Module):
    """A pre-activation basic block: act(bn1) → conv1 → act(bn2) → conv2, plus the shortcut.

    If the block changes the shape, the shortcut is a convolution (see `PreActNet`), else the raw input.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, layout: str, drop_path_rate: float = 0.0,
                 shortcut: str = "activated", **factory: Any):
        super().__init__()
        self.project = stride != 1 or in_chs != out_chs
        self.project_raw = shortcut != "activated"
        self.bn1 = nn.BatchNorm2d(in_chs, **factory)
        self.conv1 = conv3x3(in_chs, out_chs, stride, layout, **factory)
        self.bn2 = nn.BatchNorm2d(out_chs, **factory)
        self.conv2 = conv3x3(out_chs, out_chs, 1, layout, **factory)
        self.shortcut: nn.Module = nn.Identity()
        if self.project and shortcut == "raw3x3":
            self.shortcut = conv3x3(in_chs, out_chs, stride, layout, **factory)
        elif self.project:
            self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, **factory)
        self.act = activation(layout)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output (B, out_chs, H/stride, W/stride) for `x` (B, in_chs, H, W)."""
        out = self.act(self.bn1(x))
        shortcut = self.shortcut(x if self.project_raw else out) if self.project else x
        out = self.conv2(self.act(self.bn2(self.conv1(out))))
        return self.drop_path(out) + shortcut


class PreActNet(StatedFunction):
    """A pre-activation residual network of basic blocks, after timm's conventions.

    Arguments:
        depths: number of blocks of each stage. The first stage keeps the size of the map, each other halves it.
        channels: width of each stage.
        num_classes: number of classes C; 0 for no classifier (`fc` is then an identity).
        in_chans: channels of the input images.
        global_pool: pooling before the classifier, one of timm's names ("avg", "max", "avgmax", "catavgmax"), or ""
            for none, which needs `num_classes=0`.
        stem_chs: width of the stem, a 3x3 convolution.
        stem_stride: stride of the stem: 1, or more for less work.
        layout: "trades" (ReLU, padding 1) or "deepmind" (SiLU, and the convolutions of stride 2 pad below and to the
            right only; their maps must have even sizes). Weights of one give other logits in the other.
        final_norm: whether a BatchNorm and an activation follow the last stage.
        shortcut: of a block that changes the shape: "activated" (a 1x1 convolution of its activated input, as in the
            WideResNets), "raw" (the same of its raw input, as in PreActResNets of the fast adversarial training)
            or "raw3x3" (a 3x3 convolution of its raw input, as in DeepMind's PreActResNet). Weights of "activated"
            and "raw" fit each other and give other logits.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: rate of stochastic depth of the last block, in [0, 1); it grows linearly from 0 at the first.
    Sources: pre-activation blocks arXiv 1603.05027; wide networks arXiv 1605.07146; the layouts
    https://github.com/yaodongyu/TRADES and https://github.com/google-deepmind/deepmind-research
    (adversarial_robustness).
    """

    takes_unstated = True

    def __init__(
            self,
            *,
            depths: tuple[int, ...],
            channels: tuple[int, ...],
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = "avg",
            stem_chs: int,
            stem_stride: int = 1,
            layout: str = "trades",
            final_norm: bool = True,
            shortcut: str = "activated",
            drop_rate: float = 0.0,
            drop_path_rate: float = 0.0,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ):
        for name, value, known in (("layout", layout, LAYOUTS), ("shortcut", shortcut, SHORTCUTS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; expected one of {', '.join(known)}")
        if len(depths) != len(channels):
            raise ValueError(f"depths {tuple(depths)} and channels {tuple(channels)} differ in length")
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layout, self.shortcut, self.stem_stride = layout, shortcut, stem_stride
        self.state_function(LAYOUTS.index(layout), SHORTCUTS.index(shortcut), stem_stride, device=device)
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.grad_checkpointing = False

        self.conv1 = conv3x3(in_chans, stem_chs, stem_stride, layout, **factory)
        feature_info: list[dict[str, Any]] = [{"num_chs": stem_chs, "reduction": stem_stride, "module": "conv1"}]
        stages, in_chs, index = [], stem_chs, 0
        for stage, (depth, out_chs) in enumerate(zip(depths, channels, strict=True)):
            blocks = []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                rate = drop_path_rate * index / max(sum(depths) - 1, 1)
                blocks.append(PreActBlock(in_chs, out_chs, stride, layout, rate, shortcut, **factory))
                in_chs, index = out_chs, index + 1
            stages.append(nn.Sequential(*blocks))
            feature_info.append(
                {"num_chs": out_chs, "reduction": stem_stride * 2 ** stage, "module": f"stages.{stage}"})
        self.stages = nn.Sequential(*stages)
        self.feature_info, self.num_features = feature_info, in_chs
        self.norm: nn.Module = nn.BatchNorm2d(in_chs, **factory) if final_norm else nn.Identity()
        self.act: nn.Module = activation(layout) if final_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self._set_classifier(num_classes, global_pool, **factory)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def describe_function(self, numbers: Sequence[int]) -> str:
        """Returns the arguments of a network whose entry `function` holds these numbers."""
        layout, shortcut, stem_stride = numbers
        return (f"layout={dict(enumerate(LAYOUTS)).get(layout)!r}, "
                f"shortcut={dict(enumerate(SHORTCUTS)).get(shortcut)!r}, stem_stride={stem_stride}")

    def _set_classifier(self, num_classes: int, global_pool: str, **factory: Any) -> None:
        pool, fc = create_classifier(self.num_features, num_classes, global_pool, **factory)
        if num_classes > 0:
            nn.init.zeros_(fc.bias)
        self.num_classes, self.head_hidden_size = num_classes, self.num_features * pool.feat_mult()
        self.global_pool, self.fc = pool.train(self.training), fc.train(self.training)

    def get_classifier(self) -> nn.Module:
        """Returns the classifier, or an identity if the model has none."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one, or by none if `num_classes` is 0; None keeps the pooling."""
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._set_classifier(num_classes, pool, device=self.conv1.weight.device, dtype=self.conv1.weight.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns the regular expressions by which timm groups parameters, by stage if `coarse`, else by block."""
        if coarse:
            return {"stem": r"^conv1", "blocks": r"^stages\.(\d+)"}
        return {"stem": r"^conv1", "blocks": [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Sets whether a backward pass recomputes the blocks instead of keeping their activations.

        In training mode that updates the running statistics of the BatchNorms twice a step, as in timm's own networks.
        """
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the feature map (B, num_features, H', W') of normalised images `x` (B, in_chans, H, W)."""
        x = self.conv1(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.act(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns the logits (B, C) of a feature map, or the classifier's input (B, d) if `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (B, C) of normalised images `x` (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))
