"""Proximal policy optimisation (PPO) for a policy whose action is a text.

One environment step is one PPO action, however many tokens the policy wrote. Its log-probability is

    log pi(a | o, v_in) = lambda * log p(v_tht | o, v_in) + log p(v_act | o, v_in, v_tht)

v_tht is the chain of thought (CoT), v_act the action, and lambda in [0, 1] the CoT scale (paper,
section 4.3). The thoughts are many tokens and the action few. Where thoughts vary, most of the
noise in this sum comes from them if lambda = 1; with lambda = 0 no thought is ever reinforced.

Read from the top, from `Rollout` to `normalise`. The rest can wait. Letters in shapes: T steps,
N environments (or samples of a batch), L answer tokens.

`python ppo.py` computes the advantages of five steps.
"""
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.functional import huber_loss

DRIFT_LIMIT = 5.0  # of natural log-probability (nats); see `drift_from_sft`


@dataclass
class Rollout:
    """T steps of N environments that are played together. Tensors are (T, N), float32 or bool.

    A state s is what the model sees: the picture o and the prompt v_in.
    """

    answers: list                # T * N; answers[t * N + n] is of step t in environment n
    logp_cot: torch.Tensor       # log p(v_tht | o, v_in) under the policy that sampled
    logp_action: torch.Tensor    # log p(v_act | o, v_in, v_tht) under the policy that sampled
    values: torch.Tensor         # V(s_t)
    next_values: torch.Tensor    # V(s_{t+1}); any number where the episode terminated
    rewards: torch.Tensor        # r_t of the game, less the penalty of an illegal answer
    terminated: torch.Tensor     # the episode ended in a final state: nothing follows
    truncated: torch.Tensor      # a time limit cut the episode off: it would have gone on
    legal: torch.Tensor          # the answer named one legal action

    # None where the settings do not ask for it
    sft_logp_cot: torch.Tensor | None = None     # as logp_cot, under the SFT policy
    sft_logp_action: torch.Tensor | None = None  # as logp_action, under the SFT policy
    token_logps: torch.Tensor | None = None      # (T, N, L) log p of each token, 0 after the end


def action_log_prob(logp_cot, logp_action, cot_scale):
    """log pi = lambda * log p(v_tht) + log p(v_act)   (paper, section 4.3)."""
    return cot_scale * logp_cot + logp_action


def compute_gae(rollout, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016): (advantages, returns), each (T, N).

        delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)        V(s_{t+1}) = 0 after a termination
        A_t     = delta_t + gamma * gae_lambda * A_{t+1}   A_{t+1} = 0 after the end of an episode
        R_t     = A_t + V(s_t)

    A truncated episode would have gone on, so its last step keeps gamma * V(s_{t+1}).

    With gae_lambda = 0 an advantage is one delta: little noise, but the errors of V count. With
    gae_lambda = 1 it is the discounted return minus V(s_t): gamma V(s_{t+1}) of one delta cancels
    the -V(s_{t+1}) of the next. That is more noise, but the errors of V do not count.
    """
    # A termination ends the future of a state; a truncation does not
    next_values = rollout.next_values * ~rollout.terminated                    # (T, N)
    delta = rollout.rewards + gamma * next_values - rollout.values             # (T, N)

    # Go back in time; no advantage passes from one episode to the one before
    episode_continues = ~(rollout.terminated | rollout.truncated)              # (T, N)
    advantages = torch.zeros_like(delta)                                       # (T, N)
    next_advantage = torch.zeros_like(delta[0])                                # (N,)
    for t in reversed(range(len(delta))):
        advantages[t] = delta[t] + gamma * gae_lambda * episode_continues[t] * next_advantage
        next_advantage = advantages[t]

    returns = advantages + rollout.values                                      # (T, N)
    return advantages, returns


def ppo_loss(new, old, cot_scale, clip, value_clip):
    """The clipped losses of PPO (Schulman et al. 2017) for N steps: a dict of tensors (N,).

        rho      = pi_new(a | s) / pi_old(a | s)
        L_policy = -min(rho * A, clip(rho, 1 - eps, 1 + eps) * A)
        L_value  = 1/2 * max((V - R)^2, (clip(V, V_old - eps_v, V_old + eps_v) - R)^2)

    new: logp_cot, logp_action, value and entropy, each (N,), of the policy that is trained, with
    gradients. old: dict of what was stored when the answers were sampled, each (N,): log_prob,
    value, advantage, return. eps is `clip`, eps_v is `value_clip`.

    The dict has policy_loss and value_loss; log_ratio, by which broken mini-batches are found;
    approx_kl, which can end an update; and for the report clipfrac and entropy.
    """
    # One ratio for the whole answer, with lambda between its thoughts and its action
    log_prob = action_log_prob(new.logp_cot, new.logp_action, cot_scale)       # (N,)
    log_ratio = log_prob - old["log_prob"]                                     # (N,)
    ratio = log_ratio.exp()                                                    # (N,), rho

    # Of the two losses the larger one counts: -min(x, y) is max(-x, -y). If A > 0, the larger one
    # is constant where the ratio is above 1 + clip. If A < 0, it is constant where the ratio is
    # below 1 - clip. Where it is constant the gradient is 0.
    clipped_ratio = ratio.clamp(1 - clip, 1 + clip)
    policy_loss = -torch.min(ratio * old["advantage"], clipped_ratio * old["advantage"])

    # Fit the value to the return. Here too the larger loss counts: an update cannot move V by much
    # more than value_clip. Example: V_old = 0, R = 1, value_clip = 0.2. At V = 0.5 the clipped
    # value is 0.2, and its error (0.2 - 1)^2 is larger than (0.5 - 1)^2. It does not depend on V,
    # so the gradient is 0, and V stays. At V = -0.5, (-0.5 - 1)^2 is larger, and brings V back.
    clipped_value = old["value"] + (new.value - old["value"]).clamp(-value_clip, value_clip)
    value_error = (new.value - old["return"]) ** 2
    clipped_value_error = (clipped_value - old["return"]) ** 2
    value_loss = 0.5 * torch.max(value_error, clipped_value_error)

    return {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "log_ratio": log_ratio,
        # An estimate of KL(pi_old, pi_new). The mean of -log_ratio is an estimate already. Over
        # samples of pi_old the mean of pi_new / pi_old - 1 is 0. So adding it changes nothing on
        # average, and makes every term >= 0. (For lambda < 1 this is not exactly the KL, but it
        # also is 0 where nothing has changed, and grows with the change.)
        "approx_kl": ratio - 1 - log_ratio,
        "clipfrac": ((ratio - 1).abs() > clip).float(),
        "entropy": new.entropy,  # for the report; some PPO losses reward it, the paper's does not
    }


def drift_from_sft(new, old):
    """How far answers have drifted from those of the SFT policy, (N,).

    In the card games nothing rewards well-formed answers: after an illegal one a random action is
    played, and may win. So answers drift until many are illegal. A small weight on this term keeps
    what SFT has taught. Legal actions are not held, because to choose among them is what RL is for:

        x = log p(v_tht) - log p_SFT(v_tht), and if the action is illegal,
            log p(v_act) - log p_SFT(v_act) is added
        x^2 / 2 where |x| <= DRIFT_LIMIT, then a straight line      (Huber's loss)

    Why a square? Its gradient is x * grad log p. The KL divergence is the mean of x over samples of
    p, and its gradient is the mean of (x + 1) * grad log p. The 1 adds nothing, because the mean of
    grad log p is 0 (probabilities always sum to 1). So the two gradients are the same on average.
    This is exact where x is of the thoughts alone. It is an approximation for illegal actions, as
    the illegal answers are only some of the samples, and because the samples are of the policy
    before the update.

    Why a straight line? For texts that SFT would almost never write, x is 100 or more. With
    x^2 / 2, one of them would outweigh all other answers, and destroy the policy.

    new: logp_cot and logp_action, (N,), with gradients. old: dict of legal, sft_logp_cot and
    sft_logp_action, each (N,).
    """
    drift = new.logp_cot - old["sft_logp_cot"]                                 # (N,)
    action_drift = new.logp_action - old["sft_logp_action"]                    # (N,)
    drift = torch.where(old["legal"], drift, drift + action_drift)
    return huber_loss(drift, torch.zeros_like(drift), reduction="none", delta=DRIFT_LIMIT)


def ppo_update(policy, optimizer, rollout, cot_scale, config):
    """Fit the policy and its value function to one rollout, by clipped PPO.

    policy.evaluate(list of answers) returns `Scores` with gradients: logp_cot, logp_action, value,
    entropy, (N,). config has gamma, gae_lambda, clip, value_clip, epochs, minibatch, microbatch,
    value_coef, drift_coef, max_grad_norm and target_kl, as train.py's flags explain them. Shuffling
    uses torch's global generator.

    Under torch.distributed every process brings a rollout of the same size. A mini-batch is the
    union of their shares: gradients are summed, and the advantages are normalised over all
    processes.

    Returns a dict of means over mini-batches: policy_loss, value_loss, approx_kl, clipfrac,
    entropy, drift_from_sft (if drift_coef is not 0), grad_norm (before clipping); and
    explained_variance (how well the old values fit the returns: 1 is perfect), first_ratio_error
    (max |rho - 1| on the first mini-batch: 0 where sampling and scoring agree), skipped (how
    many mini-batches were broken).
    Raises FloatingPointError where too many mini-batches are broken.
    """
    # 1. Compute what stays fixed during the update: old log-probabilities, advantages, returns
    advantages, returns = compute_gae(rollout, config.gamma, config.gae_lambda)     # (T, N) each
    old = {
        "log_prob": action_log_prob(rollout.logp_cot, rollout.logp_action, cot_scale),
        "value": rollout.values,
        "advantage": normalise(advantages, returns),
        "return": returns,
    }
    if config.drift_coef:
        old["legal"] = rollout.legal
        old["sft_logp_cot"] = rollout.sft_logp_cot
        old["sft_logp_action"] = rollout.sft_logp_action
    if rollout.token_logps is not None:
        old["token_logps"] = rollout.token_logps
    old = {name: x.flatten(0, 1) for name, x in old.items()}   # (T * N,), in the answers' order

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    minibatch_size = config.minibatch // world_size()      # this process's share
    report = UpdateReport()
    for batch in shuffled_minibatches(len(rollout.answers), minibatch_size, config.epochs):

        # 2. Score the answers again and add up the gradient, in pieces that fit into memory
        pieces = []
        for indices in batch.split(config.microbatch):
            new = policy.evaluate([rollout.answers[i] for i in indices.tolist()])
            old_piece = {name: x[indices].to(new.value.device) for name, x in old.items()}
            losses = ppo_loss(new, old_piece, cot_scale, config.clip, config.value_clip)
            if rollout.token_logps is not None:  # a variant: the policy loss with one ratio a token
                losses |= token_ratio_loss(new, old_piece, config.clip)
            loss = losses["policy_loss"] + config.value_coef * losses["value_loss"]
            if config.drift_coef:
                losses["drift_from_sft"] = drift_from_sft(new, old_piece)
                loss = loss + config.drift_coef * losses["drift_from_sft"]

            # The mean over the mini-batch: what pieces and processes contribute is added up
            (loss.sum() / (len(batch) * world_size())).backward()
            pieces.append({name: x.detach() for name, x in losses.items()})
        sum_gradients(parameters)

        # 3. Clip the gradient, and take one step of the optimiser. A broken mini-batch, with an
        # infinite gradient or a ratio past exp(10), is skipped.
        max_grad_norm = config.max_grad_norm if config.max_grad_norm > 0 else math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
        broken = is_broken(pieces, grad_norm)
        if not broken:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report.add(pieces, grad_norm, broken)

        # 4. End the update where the policy has moved far enough from the one that sampled
        # (1.5 times the target, as in other implementations)
        if config.target_kl and report.last_approx_kl > 1.5 * config.target_kl:
            break

    return report.means() | {"explained_variance": explained_variance(rollout.values, returns)}


def normalise(advantages, returns):
    """Advantages (T, N), divided by the larger of two numbers: the root mean square of the
    advantages, and that of the returns. Both are taken over the rollouts of all processes.

    The mean is not subtracted, though many programs do it. The advantages of a policy that wins
    already are small and mostly positive: V still expects the slightly worse play of before. Minus
    their mean, half of the good steps would get a negative advantage, and the policy would unlearn
    them.

    The size of the returns is a lower limit, for the end of training. Once V is almost right, the
    advantages are only small errors of V. Divided by their own size they would become large, and
    the policy would unlearn.
    """
    all_advantages = torch.stack(gather(advantages))                           # (processes, T, N)
    all_returns = torch.stack(gather(returns))
    advantage_size = all_advantages.pow(2).mean().sqrt()
    return_size = all_returns.pow(2).mean().sqrt()
    return advantages / (torch.max(advantage_size, return_size) + 1e-8)


def shuffled_minibatches(num_steps, size, epochs):
    """Yield indices of steps: `epochs` passes over all, each in a new order, `size` at a time."""
    for _ in range(epochs):
        yield from torch.randperm(num_steps).split(size)


# -------------------------------------------------------------------------------------------------
# Report of an update: what the run prints and writes. The method does not need it.

MAX_LOG_RATIO = 10.0   # a ratio past exp(10) has left the region where PPO means anything
MAX_SKIPPED = 5        # broken mini-batches in a row before the run stops


def is_broken(pieces, grad_norm):
    """Whether the gradient of a mini-batch is not finite, or a ratio exploded, in any process."""
    largest = max(piece["log_ratio"].max().item() for piece in pieces)
    # All processes have the same gradient, their sum; each has ratios of its own
    return not math.isfinite(grad_norm) or max(gather(largest)) > MAX_LOG_RATIO


class UpdateReport:
    """Means over the mini-batches of one update."""

    def __init__(self):
        self.history = []              # a dict of means for each sound mini-batch
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.first_ratio_error = None
        self.last_approx_kl = 0.0      # of the last sound mini-batch

    def add(self, pieces, grad_norm, broken):
        """Take the losses of a mini-batch, a list of dicts of tensors.

        Raises FloatingPointError if more than MAX_SKIPPED mini-batches in a row were broken.
        """
        terms = {}
        for name in pieces[0]:
            parts = [piece[name].flatten() for piece in pieces]  # log_ratio may be (N, L)
            terms[name] = torch.cat(parts)
        log_ratio = terms.pop("log_ratio")
        stats = mean_over_processes({name: x.mean().item() for name, x in terms.items()})

        # Before the first step of the optimiser every ratio should be 1
        if self.first_ratio_error is None:
            self.first_ratio_error = (log_ratio.exp() - 1).abs().max().item()

        # Keep the means, or count the mini-batch as skipped
        if not broken:
            self.history.append(stats | {"grad_norm": grad_norm})
            self.last_approx_kl = stats["approx_kl"]
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        if self.skipped_in_a_row > MAX_SKIPPED:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} mini-batches in a row had an infinite gradient "
                "or an exploded ratio"
            )

    def means(self):
        """Means over the sound mini-batches. Raises FloatingPointError if there is none."""
        if not self.history:
            raise FloatingPointError("every mini-batch of an update was broken")
        means = {}
        for name in self.history[0]:
            means[name] = sum(stats[name] for stats in self.history) / len(self.history)
        return means | {"first_ratio_error": self.first_ratio_error, "skipped": self.skipped}


def explained_variance(values, returns):
    """1 - Var(R - V) / Var(R), over all processes: 1 is a perfect value function, 0 a constant
    one."""
    values = torch.stack(gather(values))
    returns = torch.stack(gather(returns))
    variance = returns.var()
    if variance == 0 or variance.isnan():
        return float("nan")
    return (1 - (returns - values).var() / variance).item()


# -------------------------------------------------------------------------------------------------
# Variants of the method: one ratio a token, and a CoT scale that is found


def token_ratio_loss(new, old, clip):
    """The loss with one ratio a token instead of one a step (VL-DAC, arXiv 2508.04280).

    Lambda plays no part in it. The dict replaces these entries of what `ppo_loss` returns.
    """
    # The stored rows are as long as the longest answer of the rollout; cut them to this piece's
    num_tokens = new.token_logps.shape[1]
    old_logps = old["token_logps"][:, :num_tokens]                             # (N, L)
    log_ratio = new.token_logps - old_logps                                    # (N, L)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip, 1 + clip)

    # Each answer counts once, however long it is
    weight = new.token_mask / new.token_mask.sum(1, keepdim=True)              # (N, L)
    advantage = old["advantage"][:, None]                                      # (N, 1)
    token_loss = -torch.min(ratio * advantage, clipped_ratio * advantage)      # (N, L)
    return {
        "policy_loss": (weight * token_loss).sum(1),
        "log_ratio": log_ratio,
        "approx_kl": (weight * (ratio - 1 - log_ratio)).sum(1),
        "clipfrac": (weight * ((ratio - 1).abs() > clip)).sum(1),
    }


def auto_cot_scale(token_logps, num_cot_tokens):
    """The lambda at which thoughts and action add equal noise to the policy gradient, at most 1.

    A step's gradient is A (lambda s_cot + s_act). Here s = grad log p is the score, summed over
    the tokens of the thoughts or of the action. (A multiplies both alike and is left out below.)
    Take two tokens: whatever the earlier one is, the later one's score has mean zero. So their
    product has mean zero, and variances add up:

        Var(lambda s_cot + s_act) = lambda^2 F_cot + F_act
        F_cot = sum of E |s|^2 over the tokens of the thoughts; F_act is that of the action

    Equal noise is lambda^2 F_cot = F_act, so lambda = sqrt(F_act / F_cot).

    To estimate F we take the gradient with respect to the logits, not to the weights: this is an
    approximation. There a token's score is onehot(token) - p, of squared length
    1 - 2 p(token) + sum p^2. The mean of p(token) is sum p^2, so this is 1 - sum p^2 on average.
    1 - p(token) has the same mean, and needs only what was stored. Thoughts of which the model is
    sure add no noise, however long they are.

    token_logps: list of (L,) log-probabilities of sampled answers; num_cot_tokens: how many of each
    are thoughts.
    """
    cot_noise = 0.0
    action_noise = 0.0
    for logps, num_cot in zip(token_logps, num_cot_tokens):
        noise = 1 - logps.double().exp()                                       # (L,)
        cot_noise += noise[:num_cot].sum().item()
        action_noise += noise[num_cot:].sum().item()
    cot_noise, action_noise = total_over_processes([cot_noise, action_noise])
    if cot_noise <= action_noise:
        return 1.0
    return math.sqrt(action_noise / cot_noise)


# -------------------------------------------------------------------------------------------------
# Several processes: one a GPU, each with its own environments. Without torch.distributed these do
# nothing.


def rank():
    """The number of this process, 0 for the first or only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x):
    """A list of every process's `x`, any object that can be pickled. One process gets [x]."""
    if not dist.is_initialized():
        return [x]
    everyone = [None for _ in range(world_size())]
    dist.all_gather_object(everyone, x)
    return everyone


def from_first_process(x):
    """What the first process has for `x`."""
    return gather(x)[0]


def total_over_processes(numbers):
    """Each process brings a list of numbers; entry i of the result is the sum of all entries i."""
    return [sum(column) for column in zip(*gather(numbers))]


def mean_over_processes(stats):
    """Means of a dict of numbers over all processes; a dict."""
    totals = total_over_processes(list(stats.values()))
    return {name: total / world_size() for name, total in zip(stats, totals)}


def barrier():
    """Wait until all processes are here."""
    gather(None)


def broadcast(tensors):
    """Give all processes the first process's `tensors`, in place."""
    if dist.is_initialized():
        for x in tensors:
            dist.broadcast(x, src=0)


def sum_gradients(parameters):
    """Add up the gradients of all processes, in place."""
    if not dist.is_initialized():
        return
    for p in parameters:
        if p.grad is None:  # no sample of this process reached it, but another's may have
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)


# -------------------------------------------------------------------------------------------------
# On its own: the advantages of five steps


def main():
    def column(*numbers):
        return torch.tensor(numbers)[:, None]                                  # (T, 1)

    # One environment. The episode ends at step 1; a time limit cuts the next one off at step 3.
    rollout = Rollout(
        answers=[],
        logp_cot=torch.zeros(5, 1),
        logp_action=torch.zeros(5, 1),
        values=column(0.5, 0.8, 0.2, 0.3, 0.1),
        next_values=column(0.8, 9.0, 0.3, 0.4, 0.6),  # 9.0 must not count
        rewards=column(0.0, 1.0, 0.0, -1.0, 0.0),
        terminated=column(False, True, False, False, False),
        truncated=column(False, False, False, True, False),
        legal=column(True, True, True, True, True),
    )
    advantages, returns = compute_gae(rollout, gamma=0.9, gae_lambda=0.95)

    print("step  reward  V(s)  V(s')  end         advantage  return")
    for t in range(5):
        end = ""
        if rollout.terminated[t]:
            end = "terminated"
        if rollout.truncated[t]:
            end = "truncated"
        print(
            f"{t:4}  {rollout.rewards[t, 0]:6.2f}  {rollout.values[t, 0]:.2f}  "
            f"{rollout.next_values[t, 0]:5.2f}  {end:10}  "
            f"{advantages[t, 0]:9.4f}  {returns[t, 0]:6.4f}"
        )
    print("by hand: A1 = 1 - 0.8 = 0.2                        terminated: V(s') does not count")
    print("         A0 = 0.9 * 0.8 - 0.5 + 0.9 * 0.95 * A1 = 0.391")
    print("         A3 = -1 + 0.9 * 0.4 - 0.3 = -0.94         truncated: V(s') counts")
    print("         A2 = 0.9 * 0.3 - 0.2 + 0.9 * 0.95 * A3 = -0.7337")


if __name__ == "__main__":
    main()
