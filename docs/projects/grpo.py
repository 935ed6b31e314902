"""GRPO, group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300): PPO without a
value function.

    python docs/projects/grpo.py --env blackjack

How it differs from ppo.py:
1. The G episodes of a group begin with the same seed, so with the same deal.
2. No value is learned. The advantage of an answer is the return of its episode, compared with the
   group (formula below). All answers of an episode have the same advantage.
3. The rest is as before: the ratio with lambda on the thoughts, its clip, and the
   penalty towards SFT, which is a part of GRPO anyway.
It plays one task, in one process.

`train.py` does everything but the rollout, so all its flags, its run directory and `eval.py --run`
work. `GroupCollector` takes the place of `Collector`.
"""
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import env  # noqa: E402
import prompts  # noqa: E402
import train  # noqa: E402
from ppo import Rollout, world_size  # noqa: E402


def group_advantages(returns, group_size):
    """A_i = (R_i - mean(R_1 ... R_G)) / std(R_1 ... R_G), for each group of G episodes.

    returns: (N,) of episodes, group after group. A group whose returns are equal teaches nothing:
    its advantages are 0.
    """
    groups = np.asarray(returns, float).reshape(-1, group_size)                # (N / G, G)
    centred = groups - groups.mean(1, keepdims=True)
    return (centred / (groups.std(1, keepdims=True) + 1e-6)).flatten()


class GroupCollector(train.Collector):
    """Plays groups of episodes that begin alike, each to its end."""

    def __init__(self, policy, config):
        super().__init__(policy, config)
        self.num_groups = 0   # played so far
        self.surplus = 0      # steps that the rollouts so far have too many

    def collect(self, progress):
        """Play until the rollout has its steps; returns (`Rollout`, statistics) as `Collector`.

        An episode is never cut, so a rollout may have more steps. The next one then has fewer.
        """
        answers = []
        legal = []
        advantages = []
        episodes = []
        num_steps = self.config.rollout_steps - self.surplus
        while not answers or len(answers) < num_steps:
            played = self.play_groups()
            answers += played["answers"]
            legal += played["legal"]
            per_episode = group_advantages(played["returns"], self.config.group_size)
            advantages += per_episode[played["games"]].tolist()    # from episodes to their answers
            episodes += list(zip(played["successes"], played["returns"]))
            progress.update(len(played["answers"]))
        self.surplus = len(answers) - num_steps
        self.rescore(answers)

        # Each answer stands alone, as an episode of one step. With values of 0, `compute_gae` then
        # returns the reward of a step as its advantage.
        def row(numbers):
            return torch.tensor(numbers)[None]                                 # (1, answers)

        zeros = torch.zeros(1, len(answers))
        rollout = Rollout(
            answers=answers,
            logp_cot=row([answer.logp_cot for answer in answers]),
            logp_action=row([answer.logp_action for answer in answers]),
            values=zeros,
            next_values=zeros,
            rewards=row(advantages),
            terminated=torch.ones_like(zeros, dtype=torch.bool),
            truncated=torch.zeros_like(zeros, dtype=torch.bool),
            legal=row(legal),
        )
        self.add_optional(rollout)
        share = legal.count(False) / len(legal)
        return rollout, self.statistics(episodes, 0) | {"illegal_rate": share}  # of its length

    def play_groups(self):
        """Play one episode in each of N games, in groups; returns a dict.

        For each answer: `answers`, `legal`, `games` (the number of its game). For each game:
        `returns`, `successes`.
        """
        size = self.config.group_size
        num_groups = self.num_envs // size
        first = self.num_groups
        self.num_groups += num_groups
        seeds = []
        for seed in islice(env.episode_seeds("rollout", self.config.seed), first, self.num_groups):
            seeds += [seed] * size
        games = env.Games(self.config.env, len(seeds), iter(seeds), self.config.obs)

        played = {"answers": [], "legal": [], "games": []}
        returns = np.zeros(len(seeds))
        successes = np.zeros(len(seeds), bool)
        is_playing = np.ones(len(seeds), bool)
        while is_playing.any():
            # Answers for the episodes that go on. The other games play anything, unseen.
            playing = np.flatnonzero(is_playing)
            infos = [games.infos[i] for i in playing]
            answers = self.policy.act(games.images[playing], self.build_prompts(infos))
            actions = [info["legal_actions"][0] for info in games.infos]
            for i, answer in zip(playing, answers):
                actions[i], was_legal = prompts.parse_action(
                    answer.text, games.infos[i]["legal_actions"], self.rng)
                played["answers"].append(answer)
                played["legal"].append(was_legal)
                played["games"].append(i)

                if not was_legal:  # some tasks punish it
                    returns[i] -= env.GAMES[self.config.env].illegal_penalty

            step = games.step(actions)
            returns[playing] += step["rewards"][playing]
            ended = step["terminated"] | step["truncated"]
            for i in playing[ended[playing]]:
                successes[i] = step["infos"][i]["success"]
            is_playing &= ~ended
        return played | {"returns": returns, "successes": successes}

    def state(self):
        return super().state() | {"num_groups": self.num_groups, "surplus": self.surplus}

    def restore(self, state):
        super().restore(state)
        self.num_groups = state["num_groups"]
        self.surplus = state["surplus"]


def add_settings(parser):
    group = parser.add_argument_group("GRPO")
    train.setting(group, "--group-size", 8, "episodes that begin alike", type=train.positive_int)


def check_settings(parser, config):
    if config.policy == "cnn" or "," in config.env or world_size() > 1:
        parser.error("grpo.py plays one task with a language model, in one process")
    if config.num_envs % config.group_size:
        parser.error(f"--num-envs {config.num_envs} is not a multiple of "
                     f"--group-size {config.group_size}")


if __name__ == "__main__":
    train.Collector = GroupCollector
    train.add_settings = add_settings
    train.check_settings = check_settings
    # Few environments: a rollout has at least an episode of each
    train.PROJECT_SETTINGS.update(project="grpo", value_coef=0.0, num_envs=32)
    train.main()
