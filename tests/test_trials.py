"""The trials of other forms of the head: the forms compute what they say."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from timm_hpm import HPMHead, functional

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trials():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import trials
    return trials


def head_of(kind: type[HPMHead], **options) -> HPMHead:
    torch.manual_seed(0)
    head = kind(4, 3, **options)
    head.set_prototypes(torch.randn(3, 4))
    return head


@pytest.mark.parametrize(("form", "paper"), [("batch", "batch"), ("sample", "dataset"), ("fc", "fc")])
def test_a_form_without_options_is_a_head_of_the_package(trials, form, paper):
    features = torch.randn(12, 4)
    own, ours = head_of(trials.Form, inference=form), head_of(HPMHead, inference=paper)
    torch.testing.assert_close(own(features), ours(features))


def test_prototypes_without_an_image_are_those_of_the_batch_without_it(trials):
    features = torch.randn(12, 4)
    whole = head_of(trials.Form, inference="batch", leave_one_out=True)
    head = head_of(trials.Form, inference="batch")
    for temperature in (None, 1.0):
        for i in range(12):
            rest = torch.cat([features[:i], features[i + 1:]])
            expected = distances_of_one(head, features[i:i + 1], rest, temperature)
            torch.testing.assert_close(whole.squared_distances(features, temperature)[i:i + 1], expected)


def distances_of_one(head: HPMHead, feature: Tensor, others: Tensor, temperature: float | None) -> Tensor:
    """The squared distances (1, C) of a feature to prototypes mixed with those of a batch that it is no part of."""
    fc = head.fc_logits(others)
    a = functional.straight_through_assignment(fc) if temperature is None else (fc / temperature).softmax(dim=1)
    presence = functional.hard_presence(a) if temperature is None else functional.soft_presence(a)
    mixed = functional.mix_prototypes(head.prototypes, functional.batch_prototypes(others, a), presence, head.mix)
    return functional.squared_distances(feature, mixed)


def test_a_sum_lies_between_its_parts_and_an_attack_that_lowers_the_scale_does_not_change_it(trials):
    features, head = torch.randn(12, 4), head_of(trials.Form, inference="sample", fc_share=0.25)
    l2 = functional.l2_logits(features, head.prototypes, torch.ones(()))
    expected = 0.25 * head.fc_logits(features) + 0.75 * l2
    torch.testing.assert_close(head(features), expected)
    head.log_scale.data.sub_(5)
    torch.testing.assert_close(head(features), expected)


def test_features_and_prototypes_of_unit_length_do_not_depend_on_the_length(trials):
    features, head = torch.randn(12, 4), head_of(trials.Form, inference="sample", unit=True)
    torch.testing.assert_close(head(3 * features), head(features))


@pytest.mark.parametrize("unit", [True, False])
def test_an_untrained_classifier_becomes_the_linear_layer_that_predicts_as_the_form(trials, unit):
    features, head = torch.randn(200, 4), head_of(trials.Form, inference="sample", unit=unit, learning=True)
    head.shift.data.normal_()
    before = head(features)
    head.finish(fc_is_trained=False)
    torch.testing.assert_close(head(features), before)
    assert (head.fc_logits(features).argmax(dim=1) == before.argmax(dim=1)).all()


def test_surrogates_of_the_form_predict_as_the_form(trials):
    features = torch.randn(12, 4)
    for options in ({"inference": "batch", "leave_one_out": True}, {"inference": "sample", "fc_share": 0.5}):
        head = head_of(trials.Form, **options)
        head.own_log_scale.data.fill_(4.0)  # so that the logits lead by far
        logits = trials.softened(head, features, None)
        assert (logits.argmax(dim=1) == head(features).argmax(dim=1)).all()
        best = logits.topk(2, dim=1).values
        assert (best[:, 0] - best[:, 1]).quantile(0.95) <= trials.LEAD + 1e-3
