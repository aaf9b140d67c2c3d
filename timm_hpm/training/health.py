"""Signs that a training run does not learn: each a name, and a text for the log and the folder of the run."""

import math
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

#: Factor by which the scale of a healthy head may change after its fit.
_LARGEST_CHANGE: Final = 1000.0
#: Clean accuracy by which a head may be behind its own FC classifier.
_FAR_BEHIND: Final = 0.03


def epoch_signs(row: Mapping[str, Any], epochs: int, num_classes: int, scale_change: float) -> dict[str, str]:
    """Returns the signs in the metrics `row` of an epoch, of `epochs` in all.

    A loss above ln C counts after the first third of the epochs, and after the first epoch. `scale_change` is the
    head's scale over the scale of its fit.
    """
    signs, bound = {}, math.log(num_classes)
    advice = "lower the learning rate (--lr), or fit the prototypes of an HPM head later (--prototype-epoch)"
    if row["epoch"] >= max(1, epochs // 3) and row["loss"] > bound:
        signs["loss"] = (f"the loss is {row['loss']:.4g} in epoch {row['epoch']}, above ln {num_classes} = "
                         f"{bound:.4g}, the loss of a model that knows nothing; {advice}")
    if not 1 / _LARGEST_CHANGE < scale_change < _LARGEST_CHANGE:
        signs["scale"] = (f"the scale of the head runs away: after epoch {row['epoch']} it is {scale_change:.3g} times "
                          f"the scale of its fit; {advice}")
    return signs


def kept_signs(row: Mapping[str, Any], labels: Tensor) -> dict[str, str]:
    """Returns the sign in the metrics `row` of the kept epoch, for the validation labels (N,), if there is one.

    Either accuracy at chance (the share of the commonest class and two standard errors more), or a head more than 3
    points less accurate than its own FC classifier.
    """
    share = labels.bincount().max().item() / len(labels)
    found = (f"the kept epoch {row['epoch']} has {100 * row['val_clean']:.1f} % clean accuracy on {len(labels)} "
             "validation images")
    if row["val_clean"] <= share + 2 * math.sqrt(share * (1 - share) / len(labels)):
        return {"chance": f"{found}, which is at chance: one class for all has {100 * share:.1f} %; train longer "
                          "(--epochs), or with another learning rate (--lr)"}
    if row["val_fc_clean"] - row["val_clean"] > _FAR_BEHIND:
        return {"behind": f"{found}, and its own FC classifier {100 * row['val_fc_clean']:.1f} %: the features have "
                          "not settled around the prototypes; train longer (--epochs, or a smaller --batch-size), or "
                          "keep the FC classifier (--model-kwargs inference=fc)"}
    return {}
