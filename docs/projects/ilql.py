"""ILQL, implicit language Q-learning (Snell et al. 2023, arXiv 2206.11871): offline, nothing is
sampled while it learns.

    python docs/projects/ilql.py --env blackjack

How it differs from ppo.py:
1. It learns from demonstrations with their rewards, of the same mediocre player that SFT imitates.
   Their number is `--env-steps`.
2. Two heads on the hidden states of the SFT model, which does not change: Q of every next token,
   and V. Only the action is a choice, so values skip all tokens without one. After an action token
   follows V of the next state, after a thought V of the action's first token.
3. The agent samples from the logits of SFT + beta (Q - V). There is no adapter and no lambda.
It writes no checkpoints of its own: `--resume` begins again after SFT.
"""
import copy
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[2]))
import train  # noqa: E402
from policy import VLMPolicy  # noqa: E402
from ppo import world_size  # noqa: E402


def ilql_losses(q, v, target_q, tokens, rewards, next_v, expectile):
    """The three losses of ILQL for N tokens (paper, section 4), each (N,).

        L_Q = 1/2 (r + V(next) - Q(token))^2      V(next) with its discount, 0 after the end
        L_V = |expectile - 1(u < 0)| u^2          u = Q_target(token) - V: V near the best tokens
        L_C = -log softmax(Q)(token)              conservative: low Q for tokens never shown

    q: (N, V) of the trained head; v, target_q, rewards, next_v: (N,), the last three without
    gradients; tokens: (N,) int64.
    """
    q_loss = 0.5 * (rewards + next_v - q.gather(1, tokens[:, None])[:, 0]) ** 2
    u = target_q - v
    v_loss = (expectile - (u < 0).float()).abs() * u ** 2
    return q_loss, v_loss, cross_entropy(q, tokens, reduction="none")


class Steering(nn.Module):
    """The language head of SFT, plus beta (Q - V) once it is trained. Reads hidden states."""

    def __init__(self, head):
        super().__init__()
        width, vocab_size = head.in_features, head.out_features
        self.head = head
        self.register_buffer("beta", torch.tensor(0.0))
        self.body = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.ReLU())
        self.q = nn.Linear(256, vocab_size)
        self.v = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.ReLU(),
                               nn.Linear(256, 1))

    @property
    def weight(self):
        return self.head.weight

    def forward(self, hidden):
        logits = self.head(hidden)                                             # (..., V)
        if self.beta == 0:
            return logits
        return logits + self.beta * (self.q(self.body(hidden)) - self.v(hidden))


class Policy(VLMPolicy):
    """`VLMPolicy` with a steered language head, which its run directory holds, too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.head = Steering(self.head).to(self.head.weight.device)

    def save(self, directory):
        super().save(directory)
        heads = {name: x for name, x in self.head.state_dict().items() if "head." not in name}
        save_file(heads, directory / "steering.safetensors")

    def load(self, directory):
        super().load(directory)
        self.head.load_state_dict(load_file(directory / "steering.safetensors"), strict=False)


@torch.no_grad()
def demonstrations(policy, config):
    """Play the demonstrator for `env_steps` steps; returns a list with a dict for each step.

    hidden (L + 1, D), tokens (L,), num_cot, reward, and next: the number of the step that follows
    in the same game, None at the end of an episode.
    """
    rng = np.random.default_rng(config.seed)
    games = train.make_games("rollout", config.num_envs, config)
    steps = []
    for _ in range(config.env_steps // config.num_envs):
        answers, actions = train.write_demonstrations(policy, games, rng, config)
        hidden = policy.read(answers)[0].cpu()                                 # (N, L + 1, D)

        played = games.step(actions)
        ended = played["terminated"] | played["truncated"]
        for i, answer in enumerate(answers):
            steps.append({
                "hidden": hidden[i, :len(answer.tokens) + 1].clone(),
                "tokens": answer.tokens,
                "num_cot": answer.num_cot_tokens,
                "reward": float(played["rewards"][i]),
                "next": None if ended[i] else len(steps) + config.num_envs,
            })
    return steps


def token_steps(step, steps, gamma):
    """Each of L tokens as a step of its own: hidden (L, D), the hidden state whose V follows
    (L, D), tokens, rewards and discounts of that V, (L,)."""
    length = len(step["tokens"])
    is_action = torch.arange(length) >= step["num_cot"]                        # (L,)
    next_hidden = step["hidden"][min(step["num_cot"], length)].repeat(length, 1)
    rewards = step["reward"] * is_action
    discounts = 1.0 - is_action.float()  # 1 within the thoughts; 0 after the end of the episode
    if step["next"] is not None:
        next_hidden[is_action] = steps[step["next"]]["hidden"][0]
        discounts[is_action] = gamma
    return step["hidden"][:-1], next_hidden, step["tokens"], rewards, discounts


def reinforce(policy, config, run):
    """Fit Q and V to the demonstrations (in the place of PPO), and switch the steering on."""
    steps = demonstrations(policy, config)
    known = [step for step in steps if step["next"] is None or step["next"] < len(steps)]
    scale = np.std([step["reward"] for step in steps]) + 1e-6  # one beta for all tasks

    heads = policy.head
    slow = copy.deepcopy(heads)  # the target network of Q
    trainable = [*heads.body.parameters(), *heads.q.parameters(), *heads.v.parameters()]
    optimizer = torch.optim.Adam(trainable, config.ilql_lr)
    for update in range(1, config.ilql_steps + 1):
        chosen = torch.randint(len(known), (64,)).tolist()
        columns = zip(*[token_steps(known[k], steps, config.gamma) for k in chosen])
        hidden, next_hidden, tokens, rewards, discounts = (
            torch.cat(column).to(heads.beta.device) for column in columns)
        with torch.no_grad():
            target_q = slow.q(slow.body(hidden)).gather(1, tokens[:, None])[:, 0]
            next_v = discounts * heads.v(next_hidden)[:, 0]
        losses = ilql_losses(heads.q(heads.body(hidden)), heads.v(hidden)[:, 0], target_q, tokens,
                             rewards / scale, next_v, config.expectile)
        q_loss, v_loss, conservative = (x.mean() for x in losses)
        (q_loss + v_loss + config.conservative_coef * conservative).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for old, new in zip(slow.parameters(), heads.parameters()):
                old.lerp_(new, 0.02)
        if run.signal:
            raise SystemExit(128 + run.signal)  # stopped by Ctrl-C
        if update % 100 == 0 or update == config.ilql_steps:
            run.log(stage="ilql", step=update, q_loss=q_loss.item(), v_loss=v_loss.item(),
                    conservative=conservative.item())
    heads.beta.fill_(config.beta)


def add_settings(parser):
    group = parser.add_argument_group("ILQL")
    train.setting(group, "--beta", 4.0, "weight of Q - V", type=train.positive)
    train.setting(group, "--expectile", 0.95, "of V; 0.5: the mean", type=train.fraction)
    train.setting(group, "--conservative-coef", 1.0, "its weight", type=train.not_negative)
    train.setting(group, "--ilql-steps", 3000, "of the optimiser", type=train.positive_int)
    train.setting(group, "--ilql-lr", 1e-3, "learning rate", type=train.positive)


def check_settings(parser, config):
    if config.policy == "cnn" or world_size() > 1:
        parser.error("ilql.py learns with a language model, in one process")


if __name__ == "__main__":
    train.reinforce = reinforce
    train.add_settings = add_settings
    train.check_settings = check_settings
    train.PROJECT_SETTINGS.update(project="ilql")  # eval.py finds `Policy` by this name
    train.main()
