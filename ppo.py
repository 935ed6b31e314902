"""Proximal policy optimisation for a policy whose action is a text: advantages and the update, in plain tensors.

One environment step is one PPO action, however many tokens it took to write. Its log-probability is

    log pi(a | o, v_in) = lambda * log p(v_tht | o, v_in) + log p(v_act | o, v_in, v_tht)

with the CoT scale lambda in [0, 1] (paper, section 4.3): the thoughts are many tokens and the action few, so
lambda = 1 drowns the action in the noise of the wording, and lambda = 0 never reinforces a thought.

`python ppo.py` walks through the advantages of five steps.
"""
import math
from dataclasses import dataclass

import torch

MAX_LOG_RATIO = 10.0  # a mini-batch with a larger log ratio has left the region where PPO means anything
MAX_SKIPPED = 5       # broken mini-batches in a row before the run stops


@dataclass
class Rollout:
    """T steps of N environments, in lockstep; every tensor is float32 or bool of shape (T, N)."""
    answers: list                # T * N answers as the policy made them, step by step; opaque here
    logp_cot: torch.Tensor       # log p(v_tht | o, v_in) under the policy that sampled
    logp_action: torch.Tensor    # log p(v_act | o, v_in, v_tht) under the policy that sampled
    values: torch.Tensor         # V(s_t)
    next_values: torch.Tensor    # V of the state that the step led to, seen before any reset
    rewards: torch.Tensor        # r_t, in the task's own units
    terminated: torch.Tensor     # the episode ended in a final state: nothing follows, nothing is bootstrapped
    truncated: torch.Tensor      # the episode was cut off (time limit): what would have followed is next_values
    sft_logp_cot: torch.Tensor | None = None  # log p(v_tht | o, v_in) under the SFT policy, for the penalty on drift from it


def action_log_prob(logp_cot, logp_action, cot_scale):
    """log pi = lambda * log p(v_tht) + log p(v_act)   (paper, equation 4.3)."""
    return cot_scale * logp_cot + logp_action


def compute_gae(rollout, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016): (advantages, returns), each (T, N).

        delta_t = r_t + gamma * V(s_t+1) - V(s_t)                V(s_t+1) = 0 after a termination
        A_t     = delta_t + gamma * gae_lambda * A_t+1           A_t+1    = 0 after any end of an episode
        R_t     = A_t + V(s_t)

    A truncated episode would have gone on, so its last step keeps gamma * V(s_t+1).
    """
    delta = rollout.rewards + gamma * rollout.next_values * ~rollout.terminated - rollout.values
    goes_on = ~(rollout.terminated | rollout.truncated)
    advantages = torch.zeros_like(delta)
    following = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        following = advantages[t] = delta[t] + gamma * gae_lambda * goes_on[t] * following
    return advantages, advantages + rollout.values


def explained_variance(values, returns):
    """1 - Var(R - V) / Var(R): 1 is a perfect value function, 0 one no better than a constant."""
    variance = returns.var()
    return (1 - (returns - values).var() / variance).item() if variance > 0 else float("nan")


def kl_estimate(log_ratio):
    """Estimate of KL(p, q) from samples of p, log_ratio = log q - log p: unbiased, never negative, of low variance (Schulman 2020, k3)."""
    return log_ratio.exp() - 1 - log_ratio


def ppo_update(policy, optimizer, rollout, *, cot_scale, gamma=0.9, gae_lambda=0.95, clip=0.1, value_clip=0.1, epochs=4,
               minibatch=64, microbatch=64, value_coef=0.5, max_grad_norm=0.5, target_kl=None, kl_coef=0.0):
    """Fit the policy and its value function to one rollout by clipped PPO (Schulman et al. 2017).

    policy.evaluate(list of answers) gives logp_cot, logp_action, value, entropy, each (batch,), with
    gradients. A mini-batch of `minibatch` steps makes one optimiser step, in pieces of `microbatch` that fit
    into memory. target_kl ends the update early once a mini-batch's approx_kl passes 1.5 times it. kl_coef weighs
    KL(p, p_SFT) of the thoughts, where the rollout holds `sft_logp_cot`: SFT has taught how to read and reason, and
    the action is free. Shuffling takes torch's global generator. A mini-batch with a gradient that is not finite, or with a ratio past
    exp(MAX_LOG_RATIO), is skipped; more than MAX_SKIPPED in a row raise FloatingPointError.

    Returns a dict of means over mini-batches: policy_loss, value_loss, approx_kl, clipfrac, entropy, grad_norm
    (before clipping), kl_to_sft (of the thoughts; 0 without `sft_logp_cot`); and explained_variance of the old values, first_ratio_error (max |ratio - 1| on the first
    mini-batch), skipped (number of mini-batches).
    """
    advantages, returns = compute_gae(rollout, gamma, gae_lambda)
    normalised = ((advantages - advantages.mean()) / (advantages.std() + 1e-8)).flatten()
    old_logp = action_log_prob(rollout.logp_cot, rollout.logp_action, cot_scale).flatten()
    old_values, returns = rollout.values.flatten(), returns.flatten()
    sft_logp_cot = None if rollout.sft_logp_cot is None else rollout.sft_logp_cot.flatten()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    stats = {"policy_loss": [], "value_loss": [], "approx_kl": [], "clipfrac": [], "entropy": [], "grad_norm": [], "kl_to_sft": []}
    first_ratio_error, skipped, skipped_in_a_row = None, 0, 0
    for _ in range(epochs):
        for batch in torch.randperm(len(old_logp)).split(minibatch):
            sums, largest = dict.fromkeys(stats, 0.0), 0.0
            for index in batch.split(microbatch):
                scores = policy.evaluate([rollout.answers[i] for i in index])
                device = scores.value.device
                advantage, old_value, target, old = (
                    x[index].to(device) for x in (normalised, old_values, returns, old_logp))
                log_ratio = action_log_prob(scores.logp_cot, scores.logp_action, cot_scale) - old
                ratio = log_ratio.exp()  # rho = pi_new(a | s) / pi_old(a | s), one per environment step
                # L_policy = -mean min(rho * A, clip(rho, 1 - eps, 1 + eps) * A)
                policy_loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).sum()
                # L_value = 1/2 mean max((V - R)^2, (clip(V, V_old - eps_v, V_old + eps_v) - R)^2)
                clipped = old_value + (scores.value - old_value).clamp(-value_clip, value_clip)
                value_loss = 0.5 * torch.max((scores.value - target) ** 2, (clipped - target) ** 2).sum()
                loss = policy_loss + value_coef * value_loss
                if sft_logp_cot is not None:
                    kl = kl_estimate(sft_logp_cot[index].to(device) - scores.logp_cot).sum()
                    loss = loss + kl_coef * kl
                    sums["kl_to_sft"] += kl.item()
                (loss / len(batch)).backward()
                with torch.no_grad():
                    sums["policy_loss"] += policy_loss.item()
                    sums["value_loss"] += value_loss.item()
                    sums["approx_kl"] += kl_estimate(log_ratio).sum().item()
                    sums["clipfrac"] += ((ratio - 1).abs() > clip).sum().item()
                    sums["entropy"] += scores.entropy.sum().item()
                    largest = max(largest, log_ratio.max().item())
                    if first_ratio_error is None:
                        first_ratio_error = (ratio - 1).abs().max().item()
            sums = {key: total / len(batch) for key, total in sums.items()}
            sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
            broken = not math.isfinite(sums["grad_norm"]) or largest > MAX_LOG_RATIO
            if not broken:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            skipped, skipped_in_a_row = skipped + broken, (skipped_in_a_row + 1) * broken
            if skipped_in_a_row > MAX_SKIPPED:
                raise FloatingPointError(f"{skipped_in_a_row} mini-batches in a row had no finite gradient or an exploding ratio")
            if broken:
                continue
            for key, value in sums.items():
                stats[key].append(value)
            if target_kl and sums["approx_kl"] > 1.5 * target_kl:
                break
        else:
            continue
        break
    return {key: sum(values) / max(len(values), 1) for key, values in stats.items()} | {
        "explained_variance": explained_variance(old_values, returns), "first_ratio_error": first_ratio_error, "skipped": skipped}


def main():
    # Five steps of one environment: reward at step 1 with a termination, truncation at step 3.
    column = lambda *xs: torch.tensor(xs)[:, None]  # noqa: E731
    rollout = Rollout([], *[torch.zeros(5, 1)] * 2, values=column(0.5, 0.8, 0.2, 0.3, 0.1),
                      next_values=column(0.8, 9.0, 0.3, 0.4, 0.6), rewards=column(0.0, 1.0, 0.0, -1.0, 0.0),
                      terminated=column(False, True, False, False, False), truncated=column(False, False, False, True, False))
    advantages, returns = compute_gae(rollout, gamma=0.9, gae_lambda=0.95)
    print("step  reward  V(s)  V(s')  end         advantage  return")
    for t in range(5):
        end = "terminated" if rollout.terminated[t] else "truncated" if rollout.truncated[t] else ""
        print(f"{t:4}  {rollout.rewards[t, 0]:6.2f}  {rollout.values[t, 0]:.2f}  {rollout.next_values[t, 0]:5.2f}  {end:10}  "
              f"{advantages[t, 0]:9.4f}  {returns[t, 0]:6.4f}")
    print("by hand: A1 = 1 - 0.8 = 0.2 (V(s') does not count), A0 = 0.9 * 0.8 - 0.5 + 0.9 * 0.95 * A1 = 0.391,\n"
          "         A3 = -1 + 0.9 * 0.4 - 0.3 = -0.94 (V(s') counts), A2 = 0.9 * 0.3 - 0.2 + 0.9 * 0.95 * A3 = -0.7337")


if __name__ == "__main__":
    main()
