"""`ATTACKS`: the attacks of the Mixed Surrogate Attack, a record for each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from ..attacks import probability_margin
from ..surrogates import SURROGATES
from ..threat import ThreatModel
from .attacked import AttackedModel
from .batch import AttackBatch, Budget
from .components import apgd_t, apgd_untargeted, fab_t, search, square
from .joint import apgd_chain, joint, joint_subset


@dataclass(frozen=True)
class Attack:
    """An attack on a batch of B images, through S surrogates side by side."""

    name: str  # in protocols and reports
    run: Callable[[AttackBatch, ThreatModel, Budget], Tensor]  # to the candidates (S·B, channels, H, W)
    budget: Budget  # the standard one; if it has targets, the attack is targeted
    needs_gradient: bool = True  # False for a black-box attack, which also attacks the true model's own logits
    # Whether it moves all images for a common loss, through batch-dependent surrogates, from the points so far.
    whole_batch: bool = False
    chained: bool = False  # whether it goes from one surrogate to the next; it needs two or more
    nearest: float = 1.0  # fraction of a batch's unbroken images that it attacks: those nearest to an error
    seeded_as: str | None = None  # the name that seeds its random numbers; None means its own

    @property
    def by_image(self) -> bool:
        """Returns whether the attack treats each image and each surrogate by itself."""
        return not (self.whole_batch or self.chained)

    def candidates(self, batch: AttackBatch, threat: ThreatModel, budget: Budget) -> Tensor:
        """Returns the candidates (S·B, channels, H, W) of `run`, inside the ball also if some arithmetic overflowed."""
        points = self.run(batch, threat, budget)
        return threat.project(torch.where(points.isfinite(), points, batch.clean), batch.clean)

    def rows(self, restarts: int) -> list[str]:
        """Returns the names of the attack's candidate sets, such as `"apgd-ce#2"` for a second start."""
        return [self.name] if restarts == 1 else [f"{self.name}#{i + 1}" for i in range(restarts)]

    def seed_name(self, row: str) -> str:
        """Returns the name that seeds a row of this attack; the first start does not depend on the others."""
        return row.removesuffix("#1") if self.seeded_as is None else row.replace(self.name, self.seeded_as, 1)

    def surrogates(self, model: AttackedModel, names: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the surrogates among `names` that the attack uses; none if it does not apply to the model."""
        if self.whole_batch:
            return tuple(name for name in names if model.batch_dependent(name) and SURROGATES[name].in_joint)
        return () if self.chained and len(names) == 1 else names


#: The attacks by name, in the order of the tables. An attack of one's own is one more entry.
ATTACKS: Final = {
    attack.name: attack
    for attack in (
        Attack("apgd-ce", apgd_untargeted, Budget(100)),
        Attack("apgd-pm", partial(apgd_untargeted, loss=probability_margin), Budget(100)),
        Attack("apgd-t", apgd_t, Budget(100, targets=9)),
        Attack("fab-t", fab_t, Budget(100, targets=9)),
        Attack("search", search, Budget(1_000)),
        Attack("search-on", partial(search, repeated=True), Budget(10_000)),
        Attack("square", square, Budget(5_000), needs_gradient=False),
        Attack("square-on", square, Budget(5_000), needs_gradient=False, nearest=1 / 16),
        Attack("apgd-chain", apgd_chain, Budget(50), chained=True),
        Attack("joint", joint, Budget(100), whole_batch=True),
        Attack("joint-subset", joint_subset, Budget(25, restarts=30), whole_batch=True, seeded_as="joint-rest"),
    )
}
