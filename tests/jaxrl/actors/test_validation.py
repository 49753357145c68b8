"""Every way in which rollouts can be poisoned is seen, named, and nothing sound is refused."""

import dataclasses

import numpy as np
import pytest

from jaxrl.types import REFERENCE_VERSION


def test_sound_rollouts_pass_whatever_their_number(checks, make_item, make_result):
    for number in range(50):
        item = make_item(number)
        assert checks.refusal(item, make_result(item), newest=2) is None


def changed(array, index, value):
    copy = np.array(array)
    copy[index] = value
    return copy


CASES = {
    "NaN reward": ("not finite", lambda r: r.replace(
        rewards={"reward": changed(r.reward, (0, 1), np.nan)})),
    "infinite cost": ("not finite", lambda r: r.replace(
        costs={"cost": changed(r.cost, (1, 2), np.inf)})),
    "NaN log-probability": ("not finite", lambda r: r.replace(
        behaviour_log_probs=changed(r.behaviour_log_probs, (0, 0, 0), np.nan))),
    "probability above 1": ("tokens", lambda r: r.replace(
        reference_log_probs=changed(r.reference_log_probs, (0, 0, 0), 0.5))),
    "short group": ("shape", lambda r: r.replace(tokens=r.tokens[:, :2])),
    "long completion": ("shape", lambda r: r.replace(mask=np.ones((2, 3, 6), bool))),
    "double precision": ("shape", lambda r: r.replace(
        behaviour_log_probs=r.behaviour_log_probs.astype(np.float64))),
    "no cost": ("shape", lambda r: r.replace(costs={})),
    "other prompt": ("prompts", lambda r: r.replace(
        prompts=r.prompts.replace(ids=np.int32([1, 2])))),
    "changed prompt": ("prompts", lambda r: r.replace(
        prompts=r.prompts.replace(tokens=r.prompts.tokens + 1))),
    "id above the vocabulary": ("tokens", lambda r: r.replace(
        tokens=changed(r.tokens, (1, 1, 1), 30))),
    "negative id": ("tokens", lambda r: r.replace(tokens=changed(r.tokens, (1, 1, 1), -1))),
    "gap in a completion": ("tokens", lambda r: r.replace(
        mask=np.broadcast_to([True, False, True, False, False], (2, 3, 5)))),
    "empty completion": ("tokens", lambda r: r.replace(mask=np.zeros((2, 3, 5), bool))),
    "tokens of another version": ("version", lambda r: r.replace(
        policy_version=changed(r.policy_version, (0, 0, 0), 1))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_poison_is_refused_by_its_name(checks, make_item, make_result, case):
    reason, poison = CASES[case]
    item = make_item(3)
    result = make_result(item)
    found = checks.refusal(
        item, dataclasses.replace(result, rollouts=poison(result.rollouts)), newest=2
    )
    assert (found.reason, found.item, found.actor) == (reason, 3, "actor-0")
    assert found.detail


@pytest.mark.parametrize("version", [3, -5, REFERENCE_VERSION])
def test_a_version_that_was_never_published_is_refused(checks, make_item, make_result, version):
    item = make_item(3)
    found = checks.refusal(item, make_result(item, version=version), newest=2)
    assert found.reason == "version"
    assert f"version {version} was never published; the newest is 2" in found.detail
