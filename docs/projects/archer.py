"""ArCHer, an actor with a hierarchical critic (Zhou et al. 2024, arXiv 2402.19446).

    python docs/projects/archer.py --env blackjack

How it differs from ppo.py:
1. A critic judges whole answers ("utterances"): Q(s, v_out), and V(s) of a state. Both read hidden
   states of the SFT model, which does not change, so what they have read can be kept.
2. All steps that were played stay in a replay buffer. The critic takes many steps of temporal
   differences on it after each rollout, against slow copies of itself (target networks).
3. The advantage of an answer is A = min(Q1, Q2)(s, v_out) - V(s), not GAE. The actor then takes a
   policy gradient with it over the tokens, by `ppo_update`: lambda and the clip stay as they are.

The paper's critic is a language model of its own. It samples new answers for V's target; here the
answers of the newest rollout take their place. A checkpoint does not hold the critic: `--resume`
begins with a fresh one.
"""
import copy
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
import train  # noqa: E402
from ppo import world_size  # noqa: E402


def critic_losses(q1, q2, v, rewards, next_v, target_q, gamma, terminated):
    """The critic's two losses (paper, equations 1 and 2), means over a batch (N,) of steps.

        L_Q = 1/2 (Q1 - y)^2 + 1/2 (Q2 - y)^2     y = r + gamma V_target(s'), V = 0 after the end
        L_V = 1/2 (V - Q_target)^2                Q_target = min(Q1, Q2) of the target networks
    """
    y = rewards + gamma * next_v * ~terminated                                 # (N,)
    q_loss = 0.5 * ((q1 - y) ** 2 + (q2 - y) ** 2)
    v_loss = 0.5 * (v - target_q) ** 2
    return q_loss.mean(), v_loss.mean()


class Critic(nn.Module):
    """Q1, Q2 and V of features: of a state (N, D), and of a state with its answer (N, 2 D)."""

    def __init__(self, width):
        super().__init__()

        def mlp(size):
            return nn.Sequential(
                nn.BatchNorm1d(size, affine=False),  # standardised, as the value head's input is
                nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))

        self.q1 = mlp(2 * width)
        self.q2 = mlp(2 * width)
        self.v = mlp(width)

    def q(self, features):
        """min(Q1, Q2) of features (N, 2 D): the smaller one, because errors of Q are picked up."""
        return torch.min(self.q1(features), self.q2(features)).squeeze(-1)


class ArcherCollector(train.Collector):
    """Plays as `Collector` does, trains the critic, and puts its advantages into the rollout."""

    def __init__(self, policy, config):
        super().__init__(policy, config)
        self.critic = Critic(policy.head.in_features).train()
        self.target = copy.deepcopy(self.critic).eval()
        self.optimizer = torch.optim.Adam(self.critic.parameters(), config.critic_lr)
        self.buffer = []   # a dict of tensors for each rollout

    def collect(self, progress):
        rollout, statistics = super().collect(progress)
        self.buffer.append(self.steps_of(rollout))
        self.train_critic()

        # Each answer stands alone, as an episode of one step: then `compute_gae` returns
        # reward - value = Q - V as its advantage. `--value-coef 0`: the policy's own V is not used.
        with torch.no_grad():
            self.critic.eval()
            newest = self.buffer[-1]
            shape = rollout.rewards.shape
            rollout.rewards = self.critic.q(newest["answers"]).reshape(shape)
            rollout.values = self.critic.v(newest["states"]).reshape(shape)
            rollout.terminated = torch.ones_like(rollout.terminated)
            self.critic.train()
        return rollout, statistics

    def steps_of(self, rollout):
        """What the critic reads of a rollout: features (T * N, ...), rewards, ends."""
        states, answers = self.features(rollout.answers)
        shape = rollout.rewards.shape
        grid = states.unflatten(0, shape)                                      # (T, N, D)
        next_states = torch.cat([grid[1:], grid[-1:]])
        # The state after the last step was not read: its step is left out of the critic's batches
        known = torch.ones(shape, dtype=torch.bool)
        known[-1] = rollout.terminated[-1]
        known &= ~(rollout.truncated & ~rollout.terminated)  # nor that after a time limit
        return {"states": states, "answers": answers, "next_states": next_states.flatten(0, 1),
                "rewards": rollout.rewards.flatten(), "known": known.flatten(),
                "terminated": rollout.terminated.flatten()}

    @torch.no_grad()
    def features(self, answers):
        """Hidden states of the SFT model: (states (N, D), states with answers (N, 2 D)).

        A state is the last token of the prompt. An answer is the mean over the tokens of its
        action, which have read the thoughts before them.
        """
        states = []
        pairs = []
        size = self.config.microbatch
        with self.policy.model.disable_adapter():
            for i in range(0, len(answers), size):
                read = self.policy.read(answers[i: i + size])
                hidden, _, token_mask, is_cot = (x.cpu() for x in read)        # as the critic
                is_action = token_mask & ~is_cot
                is_action |= token_mask & ~is_action.any(1, keepdim=True)      # none: all tokens
                weight = is_action / is_action.sum(1, keepdim=True)            # (N, L)
                action = (hidden[:, 1:] * weight[:, :, None]).sum(1)           # (N, D)
                states.append(hidden[:, 0])
                pairs.append(torch.cat([hidden[:, 0], action], 1))
        return torch.cat(states), torch.cat(pairs)

    def train_critic(self):
        """Temporal differences on all steps for Q, on the newest rollout's for V."""
        columns = {name: torch.cat([steps[name] for steps in self.buffer])
                   for name in self.buffer[0]}
        known = columns["known"].nonzero().squeeze(1)
        newest = self.buffer[-1]
        for _ in range(self.config.critic_steps):
            i = known[torch.randint(len(known), (256,))]
            j = torch.randint(len(newest["states"]), (256,))
            with torch.no_grad():
                next_v = self.target.v(columns["next_states"][i]).squeeze(-1)
                target_q = self.target.q(newest["answers"][j])
            q_loss, v_loss = critic_losses(
                self.critic.q1(columns["answers"][i]).squeeze(-1),
                self.critic.q2(columns["answers"][i]).squeeze(-1),
                self.critic.v(newest["states"][j]).squeeze(-1),
                columns["rewards"][i], next_v, target_q,
                self.config.gamma, columns["terminated"][i])
            self.optimizer.zero_grad()
            (q_loss + v_loss).backward()
            self.optimizer.step()

            # The target networks follow slowly
            with torch.no_grad():
                for slow, fast in zip(self.target.state_dict().values(),
                                      self.critic.state_dict().values()):
                    slow.copy_(torch.lerp(slow.float(), fast.float(), 0.05))


def add_settings(parser):
    group = parser.add_argument_group("ArCHer")
    train.setting(group, "--critic-steps", 200, "of the critic, after each rollout",
                  type=train.positive_int)
    train.setting(group, "--critic-lr", 3e-4, "learning rate of the critic", type=train.positive)


def check_settings(parser, config):
    if config.policy == "cnn" or world_size() > 1:
        parser.error("archer.py plays with a language model, in one process")
    if config.rollout_steps < 2 * config.num_envs:
        parser.error(f"--rollout-steps {config.rollout_steps} is less than two steps of each "
                     "environment: the critic learns from the step that follows")


if __name__ == "__main__":
    train.Collector = ArcherCollector
    train.add_settings = add_settings
    train.check_settings = check_settings
    train.PROJECT_SETTINGS.update(project="archer", value_coef=0.0)
    train.main()
