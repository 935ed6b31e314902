"""Advantages by hand, and the update on a policy of two numbers."""
import math
import socket
from types import SimpleNamespace

import pytest
import torch

from policy import Scores
from ppo import (
    Rollout,
    action_log_prob,
    auto_cot_scale,
    compute_gae,
    drift_from_sft,
    explained_variance,
    normalise,
    ppo_loss,
    ppo_update,
    token_ratio_loss,
)


def rollout(rewards, values, next_values, terminated, truncated, answers=(), logp=None):
    """A `Rollout` of one environment, from lists."""
    shape = (len(rewards), 1)

    def numbers(x):
        return torch.tensor(x, dtype=torch.float32).reshape(shape)

    def flags(x):
        return torch.tensor(x, dtype=torch.bool).reshape(shape)

    return Rollout(
        answers=list(answers),
        logp_cot=torch.zeros(shape),
        logp_action=torch.zeros(shape) if logp is None else logp.reshape(shape),
        values=numbers(values),
        next_values=numbers(next_values),
        rewards=numbers(rewards),
        terminated=flags(terminated),
        truncated=flags(truncated),
        legal=torch.ones(shape, dtype=torch.bool),
    )


def settings(**changes):
    """What train.py's flags hold for `ppo_update`, with some changes."""
    values = dict(
        gamma=0.9, gae_lambda=0.95, clip=0.1, value_clip=0.1, epochs=4, minibatch=16, microbatch=64,
        value_coef=0.5, drift_coef=0.0, max_grad_norm=10.0, target_kl=0.0)
    return SimpleNamespace(**values | changes)


def test_gae_by_hand():
    r = rollout([0, 1, 0, -1, 0], [.5, .8, .2, .3, .1], [.8, 9, .3, .4, .6], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0])
    advantages, returns = compute_gae(r, gamma=0.9, gae_lambda=0.95)
    a1, a3, a4 = 1 - .8, -1 + .9 * .4 - .3, .9 * .6 - .1
    expected = [.9 * .8 - .5 + .855 * a1, a1, .9 * .3 - .2 + .855 * a3, a3, a4]
    torch.testing.assert_close(advantages[:, 0], torch.tensor(expected))
    torch.testing.assert_close(returns, advantages + r.values)


def test_gae_with_lambda_one_is_the_discounted_return():
    r = rollout([1, 2, 3], [5, 6, 7], [6, 7, 0], [0, 0, 1], [0, 0, 0])
    _, returns = compute_gae(r, gamma=0.5, gae_lambda=1.0)
    torch.testing.assert_close(returns[:, 0], torch.tensor([1 + .5 * 2 + .25 * 3, 2 + .5 * 3, 3.]))


def test_an_episode_does_not_see_the_next_one():
    args = [.1, .2, .3], [.2, .3, .4], [1, 0, 0], [0, 0, 0]
    one, other = (compute_gae(rollout([1, 0, x], *args), 0.9, 0.95)[0][0, 0] for x in (0, 100))
    assert one == other


def test_cot_scale_weighs_the_thoughts_alone():
    logp = action_log_prob(torch.tensor(-10.0), torch.tensor(-2.0), 0.3)
    assert logp.item() == pytest.approx(-5.0)


def test_explained_variance():
    x = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(x, x) == 1 and explained_variance(torch.zeros(3), x) == 0
    assert math.isnan(explained_variance(x, torch.ones(3)))


class Bandit(torch.nn.Module):
    """Two actions and no state: an `answer` is the index of the action."""

    def __init__(self):
        super().__init__()
        self.logits, self.v = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(()))

    def evaluate(self, answers):
        logp = self.logits.log_softmax(0)[torch.tensor(answers)]
        return Scores(torch.zeros_like(logp), logp, self.v.expand(len(answers)), torch.zeros(len(answers)))


def bandit_rollout(policy, n=32):
    answers = [i % 2 for i in range(n)]
    with torch.no_grad():
        logp = policy.evaluate(answers).logp_action
    return rollout([float(a) for a in answers], [0.0] * n, [0.0] * n, [1] * n, [0] * n, answers, logp)


def update(policy, **kwargs):
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    return ppo_update(policy, optimizer, bandit_rollout(policy), 0.3, settings(**kwargs))


def test_the_update_prefers_the_better_action_and_learns_the_value():
    policy = Bandit()
    stats = update(policy)
    assert policy.logits[1] > policy.logits[0] and policy.v > 0
    assert stats["first_ratio_error"] == 0 and stats["approx_kl"] > 0


def test_the_first_gradient_is_the_policy_gradient():
    policy = Bandit()
    update(policy, epochs=1, minibatch=32, value_coef=0.0)
    advantages = torch.tensor([0.0, 1.0] * 16)  # the rewards, since V is 0
    advantages /= 0.5 ** 0.5  # their root mean square
    # d/dlogit_1 of mean(A * log pi) = mean(A * (1[a = 1] - pi_1))
    expected = 0.1 * (advantages * (torch.tensor([0.0, 1.0] * 16) - 0.5)).mean()
    torch.testing.assert_close(policy.logits[1].detach(), expected)


def test_micro_batches_change_nothing():
    one, other = Bandit(), Bandit()
    torch.manual_seed(0)
    update(one, microbatch=16)
    torch.manual_seed(0)
    update(other, microbatch=3)
    torch.testing.assert_close(one.logits, other.logits)


def test_clipped_samples_give_no_gradient():
    policy = Bandit()
    r = bandit_rollout(policy)
    r.logp_action = r.logp_action - torch.tensor([-1.0, 1.0] * 16)[:, None]  # ratios beyond the clip, the advantage's way
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    ppo_update(policy, optimizer, r, 0.3, settings(epochs=1, minibatch=32, value_coef=0.0))
    assert policy.logits.abs().max() == 0


def test_target_kl_ends_the_update():
    def mini_batches(target_kl):
        policy, calls = Bandit(), []
        evaluate = policy.evaluate
        r = bandit_rollout(policy)
        policy.evaluate = lambda answers: calls.append(len(answers)) or evaluate(answers)
        optimizer = torch.optim.SGD(policy.parameters(), 0.1)
        ppo_update(policy, optimizer, r, 0.3, settings(epochs=5, max_grad_norm=0.5, target_kl=target_kl))
        return len(calls)
    assert mini_batches(0.0) == 10 and mini_batches(1e-9) == 2  # the first has no KL yet


def test_broken_mini_batches_are_skipped_and_too_many_stop_the_update():
    policy = Bandit()
    r = bandit_rollout(policy)
    r.logp_action[0] = torch.nan
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    stats = ppo_update(policy, optimizer, r, 0.3, settings(epochs=3, minibatch=4))
    assert stats["skipped"] == 3 and policy.logits.isfinite().all() and math.isfinite(stats["policy_loss"])
    r.logp_action[:] = -50.0  # every ratio explodes
    with pytest.raises(FloatingPointError, match="in a row"):
        ppo_update(policy, optimizer, r, 0.3, settings(epochs=3, minibatch=4))
    with pytest.raises(FloatingPointError, match="every mini-batch"):  # too few to be many in a row
        ppo_update(policy, optimizer, r, 0.3, settings(epochs=1, minibatch=16))
    assert policy.logits.isfinite().all()


def test_the_penalty_draws_answers_back_to_the_sft_policy():
    policy = Bandit()
    r = bandit_rollout(policy)
    r.logp_action, r.rewards = torch.full((32, 1), math.log(0.5)), torch.zeros(32, 1)  # no advantage pulls elsewhere
    r.sft_logp_cot, r.sft_logp_action = r.logp_cot, torch.tensor([0.2, 0.8] * 16).log()[:, None]
    r.legal = torch.zeros(32, 1, dtype=torch.bool)
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    stats = ppo_update(policy, optimizer, r, 0.3, settings(epochs=50, minibatch=32, drift_coef=1.0))
    assert 0.65 < policy.logits.softmax(0)[1] < 0.85 and stats["drift_from_sft"] > 0


class Linear(torch.nn.Module):
    """An `answer` is a vector of features; thoughts, action and value are linear in it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(5, 3)

    def evaluate(self, answers):
        cot, action, value = self.layer(torch.stack(answers)).unbind(-1)
        return Scores(cot, action, value, torch.zeros(len(answers)))


def linear_update(rank, ranks, port, answers, rewards, result):
    """One update with the environments (columns) that belong to `rank`; the weights after it go into `result`."""
    if ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    mine = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    policy, shape = Linear(), (6, 4 // ranks)
    flat = [answer for row in answers for answer in row[mine]]
    with torch.no_grad():
        scores = policy.evaluate(flat)
    never = torch.zeros(shape, dtype=torch.bool)
    r = Rollout(flat, *[x.reshape(shape) for x in (scores.logp_cot, scores.logp_action, scores.value)],
                torch.zeros(shape), rewards[:, mine], ~never, never, ~never)
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    stats = ppo_update(policy, optimizer, r, 0.3, settings(epochs=3, minibatch=24, max_grad_norm=0.1))
    torch.save((policy.layer.weight.detach(), stats), f"{result}-{ranks}-{rank}")
    if ranks > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_make_the_update_of_one(tmp_path):
    generator = torch.Generator().manual_seed(1)
    answers, rewards = torch.randn(6, 4, 5, generator=generator), torch.randn(6, 4, generator=generator)
    linear_update(0, 1, None, answers, rewards, tmp_path / "weights")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(linear_update, (2, port, answers, rewards, tmp_path / "weights"), nprocs=2)
    alone, stats = torch.load(tmp_path / "weights-1-0")
    for rank in (0, 1):
        weights, its_stats = torch.load(tmp_path / f"weights-2-{rank}")
        assert (weights - alone).norm() / (alone - Linear().layer.weight).norm() < 1e-5
        assert its_stats["approx_kl"] == pytest.approx(stats["approx_kl"], rel=1e-4)


def test_the_automatic_cot_scale_gives_both_parts_the_same_noise():
    """On tokens drawn from known distributions, lambda^2 times the thoughts' Fisher trace is the action's, 1 - sum p^2 a token."""
    generator = torch.Generator().manual_seed(0)
    thought, action = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.9, 0.1])
    logps = []
    for _ in range(4000):
        words = torch.multinomial(thought, 5, True, generator=generator)
        logps.append(torch.cat([thought[words], action[torch.multinomial(action, 2, True, generator=generator)]]).log())
    expected = (2 * (1 - (action ** 2).sum()) / (5 * (1 - (thought ** 2).sum()))).sqrt().item()
    assert auto_cot_scale(logps, [5] * 4000) == pytest.approx(expected, rel=0.03)
    assert auto_cot_scale([torch.zeros(3)], [2]) == 1.0  # nothing is uncertain


def test_with_one_ratio_a_token_each_token_is_clipped_alone():
    token_logps = torch.tensor([[-1.0, -1.0, 0.0]]).requires_grad_()
    scores = Scores(
        torch.tensor([-1.0]), torch.tensor([-1.0]), torch.zeros(1), torch.zeros(1),
        token_logps=token_logps, token_mask=torch.tensor([[True, True, False]]))
    old = {"advantage": torch.ones(1), "token_logps": torch.tensor([[-1.0, -2.0, 0.0, 0.0]])}
    loss = token_ratio_loss(scores, old, clip=0.1)["policy_loss"]
    loss.sum().backward()
    assert loss.item() == pytest.approx(-(1 + 1.1) / 2)  # the second token's ratio e is clipped to 1.1
    assert token_logps.grad.tolist() == [[-0.5, 0.0, 0.0]]  # it has no gradient, nor has the padding


def test_the_loss_by_hand():
    new = Scores(
        logp_cot=torch.tensor([-2.0, -1.0]), logp_action=torch.tensor([-1.0, -0.5]),
        value=torch.tensor([1.0, 0.2]), entropy=torch.zeros(2))
    old = {"log_prob": torch.tensor([-2.0, -1.0]), "advantage": torch.tensor([2.0, -1.0]),
           "value": torch.tensor([0.0, 0.0]), "return": torch.tensor([2.0, 1.0])}
    losses = ppo_loss(new, old, cot_scale=0.5, clip=0.1, value_clip=0.5)
    # log pi = 0.5 * -2 - 1 = -2 and 0.5 * -1 - 0.5 = -1: both ratios are 1
    assert losses["policy_loss"].tolist() == [-2.0, 1.0]
    # V: 1 is clipped to 0.5, whose error (0.5 - 2)^2 is the larger one; 0.2 stays
    assert losses["value_loss"].tolist() == pytest.approx([0.5 * 1.5 ** 2, 0.5 * 0.8 ** 2])

    old["log_prob"] = torch.tensor([-2.0 - math.log(1.5), -1.0 - math.log(1.5)])
    losses = ppo_loss(new, old, cot_scale=0.5, clip=0.1, value_clip=0.5)
    assert losses["policy_loss"].tolist() == pytest.approx([-1.1 * 2, 1.5])  # only a gain is clipped
    assert losses["clipfrac"].tolist() == [1.0, 1.0]


def test_good_steps_stay_good_when_advantages_are_normalised():
    """A policy that wins has small advantages of one sign; none may change its sign."""
    advantages = torch.tensor([[0.1, 0.2], [0.5, 0.4]])
    normalised = normalise(advantages, torch.full((2, 2), 0.1))  # the returns are smaller
    assert (normalised > 0).all() and normalised.pow(2).mean() == pytest.approx(1)
    assert torch.isfinite(normalise(torch.zeros(2, 2), torch.zeros(2, 2))).all()
    assert torch.isfinite(normalise(torch.ones(1, 1), torch.ones(1, 1))).all()  # one step


def test_small_errors_of_a_right_value_function_are_not_blown_up():
    errors = torch.tensor([[0.01, -0.01], [0.01, -0.01]])
    assert normalise(errors, torch.ones(2, 2)).abs().max() == pytest.approx(0.01)
    # in the task's own units: ten times the returns, ten times the errors
    assert normalise(10 * errors, 10 * torch.ones(2, 2)).abs().max() == pytest.approx(0.01)


def drift_of(cot, action, sft_cot, sft_action, legal):
    """(penalties, their gradients towards thoughts, towards actions) of N answers."""
    cot = torch.tensor(cot, requires_grad=True)
    action = torch.tensor(action, requires_grad=True)
    old = {"sft_logp_cot": torch.tensor(sft_cot), "sft_logp_action": torch.tensor(sft_action),
           "legal": torch.tensor(legal)}
    terms = drift_from_sft(SimpleNamespace(logp_cot=cot, logp_action=action), old)
    terms.sum().backward()
    return terms.tolist(), cot.grad.tolist(), action.grad.tolist()


def test_one_strange_answer_does_not_outweigh_all_others():
    terms, cot_gradient, _ = drift_of([-1.0, -2.0, -3.0], [0.0] * 3, [-1.5, -2.0, -1000.0], [0.0] * 3, [True] * 3)
    assert terms == [0.125, 0.0, 5 * (997 - 2.5)]  # x^2 / 2, then a straight line
    assert cot_gradient == [0.5, 0.0, 5.0]  # its gradient is x, at most 5


def test_legal_actions_are_free_and_illegal_ones_are_held():
    terms, cot_gradient, action_gradient = drift_of([-1.0] * 2, [-1.0] * 2, [-1.5] * 2, [-4.0] * 2, [True, False])
    assert terms == [0.125, 3.5 ** 2 / 2]  # 0.5 of the thoughts, and 3 of the illegal action
    assert cot_gradient == [0.5, 3.5] and action_gradient == [0.0, 3.5]
