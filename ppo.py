"""Proximal policy optimisation for a policy whose action is a text: advantages and the update, in plain tensors.

One environment step is one PPO action, however many tokens it took to write. Its log-probability is

    log pi(a | o, v_in) = lambda * log p(v_tht | o, v_in) + log p(v_act | o, v_in, v_tht)

with the CoT scale lambda in [0, 1] (paper, section 4.3): the thoughts are many tokens and the action few, so
lambda = 1 drowns the action in the noise of the wording, and lambda = 0 never reinforces a thought. Two other answers
to the same question: `auto_cot_scale`, and one ratio a token instead of one a step.

`python ppo.py` walks through the advantages of five steps.
"""
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

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
    # For one ratio a token: (T, N, longest answer) log p of each token, 0 past an answer's end.
    logps: torch.Tensor | None = None
    # For the penalty on drift: log p(v_tht | o, v_in) under the SFT policy.
    sft_logp_cot: torch.Tensor | None = None


def action_log_prob(logp_cot, logp_action, cot_scale):
    """log pi = lambda * log p(v_tht) + log p(v_act)   (paper, equation 4.3)."""
    return cot_scale * logp_cot + logp_action


def auto_cot_scale(logps, action_at):
    """The lambda at which thoughts and action add equal noise to the policy gradient.

    A step's gradient is A (lambda s_cot + s_act), with the scores s = grad log p. A token's score has mean zero
    whatever came before it, so scores of different tokens are uncorrelated and their variances add up:

        Var(lambda s_cot + s_act) = lambda^2 F_cot + F_act,      F = sum over the part's tokens of E |s|^2

    With respect to the logits a token's score is onehot - p, and E |onehot - p|^2 = 1 - sum p^2
    = E[1 - p(sampled token)]: the sampled tokens' own probabilities estimate F. Equal shares, lambda^2 F_cot = F_act,
    give lambda = sqrt(F_act / F_cot), here at most 1. A thought that is certain adds no noise, however long it is.

    logps: list of (length,) log-probabilities of sampled answers; action_at: list of where each one's action begins.
    """
    noise = [(1 - x.exp()).double() for x in logps]
    total = torch.stack([torch.stack([x[:at].sum(), x[at:].sum()]) for x, at in zip(noise, action_at)]).sum(0)
    cot, action = sum(gather(total)).tolist()
    return min(1.0, math.sqrt(action / cot)) if cot > action else 1.0


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


def loss_terms(scores, old, cot_scale, clip, value_clip):
    """What a batch of steps adds to the loss and to the report, a dict of tensors (batch,).

    scores: of the policy being trained; old: dict of what the rollout knew: logp, value, advantage, return, maybe
    sft_logp_cot, and logps where every token has a ratio of its own (VL-DAC, arXiv 2508.04280: without lambda).
    """
    if "logps" in old:
        log_ratio = scores.logps - old["logps"][:, :scores.logps.shape[1]]  # (batch, tokens)
        share = scores.written / scores.written.sum(1, keepdim=True)
    else:
        log_ratio = (action_log_prob(scores.logp_cot, scores.logp_action, cot_scale) - old["logp"])[:, None]
        share = torch.ones_like(log_ratio)
    ratio, advantage = log_ratio.exp(), old["advantage"][:, None]  # rho = pi_new(a | s) / pi_old(a | s)
    near = old["value"] + (scores.value - old["value"]).clamp(-value_clip, value_clip)
    return {
        # L_policy = -min(rho * A, clip(rho, 1 - eps, 1 + eps) * A)
        "policy_loss": (share * torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))).sum(1),
        # L_value = 1/2 max((V - R)^2, (clip(V, V_old - eps_v, V_old + eps_v) - R)^2)
        "value_loss": 0.5 * torch.max((scores.value - old["return"]) ** 2, (near - old["return"]) ** 2),
        # KL(p, p_SFT) of the thoughts: SFT has taught how to read and reason, and the action is free
        # (the square has the gradient of KL itself, and no exponential that an unlikely thought could blow up)
        "kl_to_sft": 0.5 * (old.get("sft_logp_cot", scores.logp_cot) - scores.logp_cot) ** 2,
        "approx_kl": (share * (ratio - 1 - log_ratio)).sum(1),  # unbiased, never negative (Schulman's k3)
        "clipfrac": (share * ((ratio - 1).abs() > clip)).sum(1),
        "entropy": scores.entropy,
        "exploded": (log_ratio > MAX_LOG_RATIO).any(1).float(),
        "ratio_error": (ratio - 1).abs().amax(1),
    }


def ppo_update(policy, optimizer, rollout, *, cot_scale, gamma=0.9, gae_lambda=0.95, clip=0.1, value_clip=0.1, epochs=4,
               minibatch=64, microbatch=64, value_coef=0.5, max_grad_norm=0.5, target_kl=None, kl_coef=0.0):
    """Fit the policy and its value function to one rollout by clipped PPO (Schulman et al. 2017).

    policy.evaluate(list of answers) gives `Scores`: logp_cot, logp_action, value, entropy, each (batch,), with
    gradients. With rollout.logps every token has a ratio of its own. A mini-batch of `minibatch` steps makes one
    optimiser step, in pieces of `microbatch` that fit into memory. target_kl ends the update early once a mini-batch's
    approx_kl passes 1.5 times it; kl_coef weighs the drift of the thoughts. Shuffling takes torch's global generator.
    A mini-batch with a gradient that is not finite, or with a ratio past exp(MAX_LOG_RATIO), is skipped; more than
    MAX_SKIPPED in a row raise FloatingPointError.

    Under torch.distributed every process brings a rollout of the same size, and a mini-batch is the union of their
    shares: the advantages are normalised and the gradients summed over all of them.

    Returns a dict of means over mini-batches: policy_loss, value_loss, approx_kl, clipfrac, entropy, kl_to_sft,
    grad_norm (before clipping); and explained_variance of the old values, first_ratio_error (max |ratio - 1| on the
    first mini-batch), skipped (number of mini-batches).
    """
    advantages, returns = compute_gae(rollout, gamma, gae_lambda)
    everyone = torch.stack(gather(advantages))  # (processes, T, N)
    old = {"logp": action_log_prob(rollout.logp_cot, rollout.logp_action, cot_scale), "value": rollout.values,
           "advantage": (advantages - everyone.mean()) / (everyone.std() + 1e-8), "return": returns,
           "sft_logp_cot": rollout.sft_logp_cot, "logps": rollout.logps}
    old = {key: x.flatten(0, 1) for key, x in old.items() if x is not None}  # (T * N,), logps (T * N, tokens)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    steps, share = len(old["logp"]), minibatch // len(everyone)
    history, first_ratio_error, skipped, skipped_in_a_row = [], 0.0, 0, 0
    for batch in (batch for _ in range(epochs) for batch in torch.randperm(steps).split(share)):
        stats = {}
        for index in batch.split(microbatch):
            scores = policy.evaluate([rollout.answers[i] for i in index])
            here = {key: x[index].to(scores.value.device) for key, x in old.items()}
            terms = loss_terms(scores, here, cot_scale, clip, value_clip)
            loss = terms["policy_loss"] + value_coef * terms["value_loss"] + kl_coef * terms["kl_to_sft"]
            (loss.sum() / (len(batch) * len(everyone))).backward()
            ratio_error = terms.pop("ratio_error").max().item()
            if not history and not skipped:
                first_ratio_error = max(ratio_error, first_ratio_error)  # in this order NaN stays
            stats = {key: stats.get(key, 0.0) + x.sum().item() / len(batch) for key, x in terms.items()}
        sum_gradients(parameters)
        means = torch.tensor(gather(list(stats.values()))).mean(0).tolist()
        stats = dict(zip(stats, means), grad_norm=torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item())
        broken = not math.isfinite(stats["grad_norm"]) or stats["exploded"] > 0
        if not broken:
            optimizer.step()
            history.append(stats)
        optimizer.zero_grad(set_to_none=True)
        skipped, skipped_in_a_row = skipped + broken, (skipped_in_a_row + 1) * broken
        if skipped_in_a_row > MAX_SKIPPED:
            raise FloatingPointError(f"{skipped_in_a_row} mini-batches in a row had no finite gradient or exploded")
        if target_kl and not broken and stats["approx_kl"] > 1.5 * target_kl:
            break
    means = {key: sum(stats[key] for stats in history) / max(len(history), 1) for key in stats if key != "exploded"}
    values, returns = (torch.stack(gather(x)) for x in (rollout.values, returns))
    return means | {"explained_variance": explained_variance(values, returns),
                    "first_ratio_error": first_ratio_error, "skipped": skipped}


# ---------------------------------------------------------------------------------------------------
# Data parallel: one process a GPU, each with its own environments (nothing happens without torch.distributed)


def gather(x):
    """What all processes have for `x`, any object, in a list; alone, [x]."""
    everyone = [x] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(everyone, x)
    return everyone


def sum_gradients(parameters):
    """Add up the gradients of all processes, in place."""
    for p in parameters if dist.is_initialized() else ():
        if p.grad is None:  # no sample here reached it, but one elsewhere may have
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)


def main():
    # Five steps of one environment: reward at step 1 with a termination, truncation at step 3.
    column = lambda *xs: torch.tensor(xs)[:, None]  # noqa: E731
    rollout = Rollout([], *[torch.zeros(5, 1)] * 2, values=column(0.5, 0.8, 0.2, 0.3, 0.1),
                      next_values=column(0.8, 9.0, 0.3, 0.4, 0.6), rewards=column(0.0, 1.0, 0.0, -1.0, 0.0),
                      terminated=column(False, True, False, False, False),
                      truncated=column(False, False, False, True, False))
    advantages, returns = compute_gae(rollout, gamma=0.9, gae_lambda=0.95)
    print("step  reward  V(s)  V(s')  end         advantage  return")
    for t in range(5):
        end = "terminated" if rollout.terminated[t] else "truncated" if rollout.truncated[t] else ""
        print(f"{t:4}  {rollout.rewards[t, 0]:6.2f}  {rollout.values[t, 0]:.2f}  {rollout.next_values[t, 0]:5.2f}  "
              f"{end:10}  {advantages[t, 0]:9.4f}  {returns[t, 0]:6.4f}")
    print("by hand: A1 = 1 - 0.8 = 0.2 (V(s') does not count), A0 = 0.9 * 0.8 - 0.5 + 0.9 * 0.95 * A1 = 0.391,\n"
          "         A3 = -1 + 0.9 * 0.4 - 0.3 = -0.94 (V(s') counts), A2 = 0.9 * 0.3 - 0.2 + 0.9 * 0.95 * A3 = -0.7337")


if __name__ == "__main__":
    main()
