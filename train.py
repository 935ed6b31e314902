"""Fine-tune a vision-language model as a decision-making agent: SFT, then PPO on the task's reward.

    python train.py --env blackjack --cot-scale 0.3

1. SFT (supervised fine-tuning) teaches the output format and the reading of pictures. Its
   demonstrations describe the picture correctly, but a share of their actions (`demo_noise`) is
   random.
2. PPO: sample answers, parse and play their actions, estimate advantages, update adapter and head.
3. Evaluation of both policies on the same episodes, beside the random and the expert policy.

Read `sft`, `Collector.collect`, `reinforce` and `train`. They stand between the settings and the
run directory. Letters in shapes: T steps, N environments.

A run directory holds config.json, metrics.jsonl (one JSON object a line), sft/ and adapter/
(safetensors), value_head.safetensors and curve.png. `python eval.py --run DIR` evaluates it again.
"""
import argparse
import atexit
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
import transformers
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import env
import prompts
from eval import (
    bounds_line,
    evaluate,
    expert_agent,
    first_line,
    model_agent,
    natural_int,
    number,
    plot,
    positive_int,
    random_agent,
    read_metrics,
    summary,
    sweep_table,
    table,
)
from policy import build_policy, count_parameters, model_identity, read_config
from ppo import (
    Rollout,
    auto_cot_scale,
    barrier,
    broadcast,
    from_first_process,
    gather,
    ppo_update,
    rank,
    sum_gradients,
    total_over_processes,
    world_size,
)

# -------------------------------------------------------------------------------------------------
# Settings: one flag a line, with the default of the built-in model

BEST_DEVICE = "cpu"
if torch.backends.mps.is_available():
    BEST_DEVICE = "mps"
if torch.cuda.is_available():
    BEST_DEVICE = "cuda"

# The authors' settings, where they differ from the flags' defaults below. Large models use them.
PAPER = dict(
    device=BEST_DEVICE, cot_scale=0.5,
    env_steps=15000, num_envs=16, rollout_steps=512, temperature=0.2, max_new_tokens=256,
    epochs=4, minibatch=128, microbatch=1, lr=1e-5, lr_end=1e-9, value_clip=0.1, max_grad_norm=0.01,
    target_kl=0.0, drift_coef=0.0, lora_rank=128, lora_alpha=256, gradient_checkpointing=True,
    sft_steps=1000, sft_batch=128, sft_lora=True, sft_lr=2e-5, demo_noise=0.5,
)

# A pretrained model that is small enough for a laptop or one small GPU. docs/large-models.md says
# how these were chosen.
SMALL_MODEL_LIMIT = 4e9  # parameters; a model with fewer is small
SMALL = dict(
    device=BEST_DEVICE, cot_scale=1.0,
    env_steps=768, num_envs=16, rollout_steps=64, temperature=0.5, max_new_tokens=128,
    epochs=1, minibatch=16, microbatch=4, lr=1e-4, lr_end=5e-5, clip=0.2, value_coef=0.1,
    sft_steps=50, sft_batch=8, sft_lora=True, sft_lr=5e-4, demo_noise=0.5, eval_episodes=200,
)

# Which settings are the defaults: --preset, else by the model
PRESETS = {"tiny": {}, "small": SMALL, "paper": PAPER}

# What a task changes, for each preset
TASK_SETTINGS = {
    ("tiny", "numberline"): dict(env_steps=6144),
    # Returns of 10 make squared errors of 100: they must not outweigh the policy's gradient. Few
    # hands need a product. With AdamW or more random actions some runs hardly learnt to write it.
    ("tiny", "ezpoints"): dict(
        sft_optimizer="muon", sft_lr=3e-3, demo_noise=0.7, env_steps=3072, value_coef=0.01),
    # Most of a reward is chance here, so a small learning rate would take too long. With one pass
    # over a rollout and twice this rate, one run of four lost what it had learned. Games of SFT go
    # on with the demonstrated action, often a random one: so more hands have three or four cards.
    ("tiny", "blackjack"): dict(
        sft_optimizer="muon", sft_lr=3e-3, demo_noise=0.7, demo_play=1.0,
        env_steps=6144, lr=8e-4, lr_end=3e-4),
    # Points24 and ALFWorld have longer episodes and answers, so they have settings of their own
    ("tiny", "points24"): dict(
        sft_optimizer="muon", sft_lr=3e-3, sft_steps=2400, sft_batch=64, sft_restart=0.5,
        demo_noise=0.65, demo_play=0.1, env_steps=3072, temperature=0.4, lr=6e-4, lr_end=2e-4,
        value_coef=0.01, value_clip=10.0),
    ("tiny", "alfworld"): dict(
        sft_optimizer="muon", sft_lr=3e-3, sft_steps=3000, demo_noise=0.5,
        env_steps=4096, rollout_steps=512, temperature=0.5,
        epochs=4, lr=6e-4, lr_end=3e-5, value_coef=0.001, value_clip=50.0, eval_episodes=300),
    # Returns of 10, and in ALFWorld of 50, as above
    ("small", "ezpoints"): dict(value_coef=0.002),
    ("small", "points24"): dict(value_coef=0.002),
    ("small", "alfworld"): dict(value_coef=0.0002),
    ("paper", "ezpoints"): dict(rollout_steps=1024),
    ("paper", "points24"): dict(rollout_steps=1024),
    ("paper", "alfworld"): dict(
        cot_scale=0.2, env_steps=12288, rollout_steps=1024, minibatch=256, eval_episodes=300),
}

# Defaults that a file of docs/projects changes, in every preset and task. That file puts them in
# here before it calls `main`. `project` is its own name.
PROJECT_SETTINGS = {}

# Types of flags: `number` of eval.py makes a function that refuses what is outside its limits
fraction = number(float, 0, 1)
positive = number(float, 1e-12)  # any number above 0
not_negative = number(float, 0)


def cot_scale(text):
    """A number in [0, 1], or auto."""
    if text == "auto":
        return text
    return fraction(text)


def setting(group, flag, default, help, **kwargs):
    """Add a flag; its help names the default, and the other presets' values where they differ."""
    name = flag.removeprefix("--").replace("-", "_")
    default = PROJECT_SETTINGS.get(name, default)
    values = [] if default is None else [str(default)]
    for preset in ("small", "paper"):
        # What a project sets holds in all presets
        value = (PRESETS[preset] | PROJECT_SETTINGS).get(name, default)
        if value != default:
            values.append(f"{preset}: {value}")
    if values:
        help += f" [{'; '.join(values)}]"
    group.add_argument(flag, default=default, help=help, **kwargs)


def make_parser():
    """All flags. A flag that is left out has the default of its preset and task, see
    `configure`."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Example: python train.py --env blackjack --cot-scale 0.3",
        usage=argparse.SUPPRESS)  # without a usage text an error is one line
    switch = dict(action=argparse.BooleanOptionalAction)  # --x turns it on, --no-x off

    task = parser.add_argument_group("what to train")
    setting(task, "--env", None, f"one of {', '.join(env.GAMES)}, or several with commas")
    setting(task, "--model", "tiny", "tiny (built in), a model of the hub, or a folder")
    setting(task, "--policy", "vlm", "cnn: the paper's baseline without language",
            choices=["vlm", "cnn"])
    setting(task, "--cot-scale", 0.3, "lambda in [0, 1], the weight of the thoughts' "
            "log-probability; auto: thoughts and action add equal noise to the gradient",
            type=cot_scale)
    setting(task, "--ratio", "step", "step: one probability ratio a step, with lambda; "
            "token: one ratio a token, without lambda", choices=["step", "token"])
    setting(task, "--prompt", "full", "what stands before the action. full (the paper's): "
            "key-state fields and thoughts; thoughts: thoughts alone; action: nothing; vision: as "
            "full, but the text does not tell the state; chatty: as full, with idle words",
            choices=prompts.STYLES)
    setting(task, "--obs", "image", "the picture; marked: with boxes around what matters; "
            "text: words in the prompt instead", choices=["image", "marked", "text"])
    setting(task, "--seed", 0, "fixes the run", type=natural_int)
    setting(task, "--eval-episodes", 1000, "episodes of each evaluation", type=positive_int)

    model = parser.add_argument_group("the model")
    setting(model, "--device", "cpu", "of the model", choices=["cuda", "mps", "cpu"])
    setting(model, "--dtype", None, "of the base weights; adapter and value head are float32 "
            "[float32; with --preset small or paper bfloat16 on cuda, and with small on a CPU that "
            "has it]",
            choices=["bfloat16", "float32"])
    setting(model, "--quantize", None, "base weights in 4 bits, with bitsandbytes on cuda",
            choices=["4bit"])
    setting(model, "--image-tiles", "one", "LLaVA-1.6 and Idefics3 cut a picture into tiles. "
            "one: read the whole alone, as in the paper; anyres: the tiles as well",
            choices=["one", "anyres"])
    setting(model, "--alfworld", "text", "text: its text engine, beside drawings; thor: its "
            "simulator", choices=["text", "thor"])
    setting(model, "--trust-remote-code", False, "run Python code of the model", **switch)

    rollout = parser.add_argument_group("rollout")
    setting(rollout, "--env-steps", 10240, "environment steps in all, down to a whole rollout",
            type=positive_int)
    setting(rollout, "--num-envs", 64, "environments played at a time", type=positive_int)
    setting(rollout, "--rollout-steps", 256, "environment steps an update, over all environments",
            type=positive_int)
    setting(rollout, "--temperature", 0.3, "of sampling and all log-probabilities", type=positive)
    setting(rollout, "--max-new-tokens", 96, "the longest answer", type=positive_int)

    ppo = parser.add_argument_group("PPO")
    setting(ppo, "--epochs", 2, "passes over a rollout", type=positive_int)
    setting(ppo, "--minibatch", 64, "environment steps of one optimiser step", type=positive_int)
    setting(ppo, "--microbatch", 32, "environment steps of one forward pass", type=positive_int)
    setting(ppo, "--lr", 4e-4, "learning rate at the start, cosine from there", type=positive)
    setting(ppo, "--lr-end", 3e-5, "learning rate at the end", type=not_negative)
    setting(ppo, "--adam-eps", 1e-7, "epsilon of Adam", type=positive)
    setting(ppo, "--clip", 0.1, "range of the ratio: 1 - clip to 1 + clip", type=positive)
    setting(ppo, "--value-clip", 1.0, "how far a value may move in an update", type=positive)
    setting(ppo, "--value-coef", 0.5, "weight of the value loss; 0: off", type=not_negative)
    setting(ppo, "--max-grad-norm", 0.5, "gradient clipping; 0: off", type=not_negative)
    setting(ppo, "--target-kl", 0.02, "end an update where approx_kl, the distance from the policy "
            "that sampled, exceeds 1.5 times this; 0: off",
            type=not_negative)
    setting(ppo, "--drift-coef", 0.1, "weight of KL(p, p_SFT) of thoughts, and of illegal actions; "
            "0: off", type=not_negative)
    setting(ppo, "--gamma", 0.9, "discount", type=fraction)
    setting(ppo, "--gae-lambda", 0.95, "lambda of generalised advantage estimation", type=fraction)
    setting(ppo, "--lora-rank", 16, "rank of the adapter", type=positive_int)
    setting(ppo, "--lora-alpha", 32, "the adapter counts alpha / rank times", type=positive_int)
    setting(ppo, "--gradient-checkpointing", False, "less memory, a third more time", **switch)

    sft = parser.add_argument_group("SFT")
    setting(sft, "--sft-steps", 400, "steps of the optimiser; 0: off", type=natural_int)
    setting(sft, "--sft-batch", 32, "demonstrations a step", type=positive_int)
    setting(sft, "--sft-lora", False, "train and merge an adapter, not all weights", **switch)
    setting(sft, "--sft-lr", 1e-3, "learning rate, cosine with 3 %% warm-up", type=positive)
    setting(sft, "--sft-optimizer", "adamw", "adamw, or muon for the matrices of linear layers",
            choices=["adamw", "muon"])
    setting(sft, "--sft-restart", 0.0, "share of games that begin anew after each step; it falls "
            "to 0 until the end of SFT", type=fraction)
    setting(sft, "--demo-noise", 0.75, "share of random actions in demonstrations", type=fraction)
    setting(sft, "--demo-play", 0.25, "share of games that go on with the demonstrated action, "
            "drawn at each step; the others go on with the expert's", type=fraction)

    run = parser.add_argument_group("the run")
    add = run.add_argument
    add("--preset", choices=PRESETS, help="defaults [tiny for --model tiny, small for other models "
        "of less than 4 billion parameters, else paper]")
    add("--out", type=Path, help="run directory [a new one under runs/]")
    add("--resume", type=Path, metavar="DIR", help="go on with this run; needs no other flag")
    add("--track", choices=["tensorboard", "wandb"], help="send the metrics there as well")
    add("--sweep", nargs="+", metavar="FLAG=V,V",
        help="an experiment: train once for each value of a flag (cot-scale=0,0.3,1 ratio=token) "
             "and each of --seeds, with all other flags of the line; writes table.md and "
             "curves.png into --out")
    add("--seeds", metavar="S,S", help="of --sweep [0]")
    add("--quick", action="store_true", help="--sweep at a size that shows only whether it works")
    add_settings(parser)
    parser.set_defaults(project=PROJECT_SETTINGS.get("project"))
    return parser


def add_settings(parser):
    """Add the flags of a project. Does nothing here: a file of docs/projects puts its own function
    in this place, by `train.add_settings = ...`."""


def check_settings(parser, config):
    """Refuse what a project cannot do, by `parser.error`. Does nothing here, as `add_settings`."""


# -------------------------------------------------------------------------------------------------
# Games and seeds


def process_seed(config):
    """A seed of its own for each process, far from the seeds that people choose."""
    return config.seed + 100_003 * rank()


def make_games(stream, num_envs, config):
    """`num_envs` games for this process.

    stream: what they are for: "sft", "rollout" or "evaluation". Each stream, seed and process has
    deals of its own. Several tasks are dealt over the games of all processes.
    """
    seeds = env.episode_seeds(stream, config.seed, rank())
    return env.Games(
        config.env, num_envs, seeds, config.obs,
        first=rank() * num_envs, total=world_size() * num_envs)


# -------------------------------------------------------------------------------------------------
# Stage 1: supervised fine-tuning


def sft(policy, config, run):
    """Imitate demonstrations: maximise log p(v_out | o, v_in), averaged over tokens.

    run: the run directory, a `Run`. It writes metrics, and saves and restores checkpoints.
    """
    # Each step shows one demonstration from each of N games
    num_games = config.sft_batch // world_size()
    games = make_games("sft", num_games, config)
    rng = np.random.default_rng(process_seed(config))
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    if config.sft_optimizer == "muon":
        optimizer = MuonAndAdamW(policy.model, parameters, config.sft_lr)
    else:
        optimizer = torch.optim.AdamW(parameters, config.sft_lr, weight_decay=0.0, fused=True)
    policy.temperature = 1.0  # for SFT alone; sampling and PPO use the temperature of the settings

    first_step = 0
    state = run.restore("sft", policy, optimizer)
    if state is not None:
        first_step = state["step"]
        rng.bit_generator.state = state["rng"]
        games.restore(state["games"])

    progress = progress_bar("SFT", config.sft_steps, first_step)
    for step in range(first_step, config.sft_steps):
        # 1. Write demonstrations
        infos = games.infos
        answers, actions = write_demonstrations(policy, games, rng, config)

        # 2. Add up the gradient of the mean of -log p over the tokens of all processes
        num_tokens = sum(len(answer.tokens) for answer in answers)
        num_tokens = total_over_processes([num_tokens])[0]
        loss = 0.0
        for i in range(0, num_games, config.microbatch):
            scores = policy.evaluate(answers[i: i + config.microbatch])
            piece_loss = -(scores.logp_cot + scores.logp_action).sum() / num_tokens
            piece_loss.backward()
            loss += piece_loss.item()
        sum_gradients(parameters)

        # 3. Take a step of the optimiser, with 3 % warm-up
        warm_up = min(1.0, (step + 1) / (0.03 * config.sft_steps))
        lr = warm_up * cosine(step, config.sft_steps, config.sft_lr, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not (grad_norm.isfinite() and math.isfinite(loss)):
            raise FloatingPointError(f"the loss or gradient of SFT step {step + 1} is not finite")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 4. Play on. In a share of the games, drawn anew at each step, play the action demonstrated
        # above. It is often random, so SFT also sees states after a mistake. In all others play the
        # expert's action: else most games would be lost early, and SFT would see few late states.
        plays_demonstration = rng.random(num_games) < config.demo_play         # (N,)
        for i, info in enumerate(infos):
            if not plays_demonstration[i]:
                actions[i] = env.expert_action(info)

        # After this step a share of the games is dealt anew: `sft_restart` at the beginning of SFT,
        # 0 at its end. So early in SFT more of the states are beginnings of games.
        restart_share = config.sft_restart * (1 - step / config.sft_steps)
        games.step(actions, restart=rng.random(num_games) < restart_share)

        # 5. Report, and save what --resume needs
        done = step + 1
        progress.update()
        if done % 50 == 0 or done == config.sft_steps:
            loss = total_over_processes([loss])[0]
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
            run.log(stage="sft", step=done, loss=loss, lr=lr)
        asked_to_stop = any(gather(run.signal))  # by Ctrl-C, in any process
        if done % 100 == 0 or done == config.sft_steps or asked_to_stop:
            run.checkpoint(
                "sft", done, policy, optimizer,
                step=done, rng=rng.bit_generator.state, games=games.snapshot())

    progress.close()
    policy.temperature = config.temperature


def write_demonstrations(policy, games, rng, config):
    """A demonstration for each of N games: (list of N `Answer`, list of N actions).

    Fields and thoughts are right, but a share of the actions (`demo_noise`) is random.
    """
    is_random = rng.random(len(games.infos)) < config.demo_noise               # (N,)
    questions = []
    texts = []
    actions = []
    for info, random in zip(games.infos, is_random):
        if random:
            action = str(rng.choice(info["legal_actions"]))
        else:
            action = env.expert_action(info)
        questions.append(prompts.build_prompt(info, config.prompt))
        texts.append(prompts.demonstration(info, action, config.prompt))
        actions.append(action)
    return policy.demonstrate(games.images, questions, texts), actions


def cosine(step, num_steps, start, end):
    """Learning rate at `step` of `num_steps`, on a half cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * step / num_steps)) / 2


class Muon(torch.optim.Optimizer):
    """An optimiser for matrices (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon).

    Muon keeps a running average of a matrix's gradients, as momentum does. Its singular value
    decomposition is a sum of directions (pairs of unit vectors), each with a size, its singular
    value. A few sizes are large and most are small. Muon's step has the same directions, with
    nearly equal sizes. So what has small gradients is learned, too.

    The step is that of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` and without weight
    decay. But that class computes in bfloat16. On a CPU without instructions for it this made SFT
    twice as long (docs/speed.md). This class computes in float32, the precision of the weights.
    """

    MOMENTUM = 0.95

    def __init__(self, matrices, lr):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for matrix in group["params"]:
                gradient = matrix.grad
                if gradient is None:  # this forward pass did not use the matrix
                    continue
                # 1. The running average (`lerp` mixes two tensors), then the newest gradient once
                # more (Nesterov)
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                average = state["momentum_buffer"]
                average.lerp_(gradient, 1 - self.MOMENTUM)
                update = gradient.lerp(average, self.MOMENTUM)

                # 2. Make the sizes nearly equal, and the root mean square of the numbers about 0.2.
                # AdamW's is similar, so one learning rate serves both (Liu et al., 2025,
                # https://arxiv.org/abs/2502.16982)
                scale = 0.2 * math.sqrt(max(matrix.shape))
                matrix.sub_(nearly_orthogonal(update), alpha=group["lr"] * scale)


def nearly_orthogonal(matrix):
    """A matrix with the directions of `matrix`, and with singular values from 0.68 to 1.21.

    Only a singular value that was less than 0.002 of the matrix's norm stays smaller. Each of five
    steps (called Newton-Schulz) turns every singular value s into
    3.4445 s - 4.775 s^3 + 2.0315 s^5, with numbers of Jordan et al. They were chosen so that small
    values grow fast; the others move up and down in that range. x x^T x has the directions of x and
    the sizes s^3, and (x x^T)^2 x has s^5. So a few products are enough, and no decomposition.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix  # the result is the same, but x x^T is smaller
    x = x / x.norm().clamp(min=1e-7)     # norm^2 is the sum of all s^2, so now no s is above 1
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if is_tall else x


class MuonAndAdamW:
    """Two optimisers that work as one: Muon for the matrices of linear layers, AdamW for all else.

    Embeddings and the language head are left to AdamW, as Muon's authors advise.
    """

    def __init__(self, model, parameters, lr):
        """parameters: those of `model` that are trained, a list."""
        head = model.get_output_embeddings()
        weights_of_layers = set()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                weights_of_layers.add(id(module.weight))
        matrices = [p for p in parameters if id(p) in weights_of_layers]
        others = [p for p in parameters if id(p) not in weights_of_layers]

        self.muon = Muon(matrices, lr)
        self.adamw = torch.optim.AdamW(others, lr, weight_decay=0.0, fused=True)
        self.num_matrices = len(matrices)

    @property
    def param_groups(self):
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self):
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none=True):
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self):
        """The running averages of both. Muon's parameters have the numbers from 0 to
        num_matrices - 1, and AdamW's follow. The groups (learning rates) are left out, because the
        constructor makes them again."""
        state = dict(self.muon.state_dict()["state"])
        for index, moments in self.adamw.state_dict()["state"].items():
            state[self.num_matrices + index] = moments
        return {"state": state, "param_groups": []}

    def load_state_dict(self, saved):
        """Load what `state_dict` has returned."""
        states = {self.muon: {}, self.adamw: {}}
        for index, moments in saved["state"].items():
            if index < self.num_matrices:
                states[self.muon][index] = moments
            else:
                states[self.adamw][index - self.num_matrices] = moments
        for optimizer, state in states.items():
            load_moments(optimizer, state)


def load_moments(optimizer, moments):
    """Load an optimiser's moments: the running averages that it keeps for each parameter.

    moments: the "state" of a `state_dict`. The groups, with the learning rate, stay as they are.
    """
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


# -------------------------------------------------------------------------------------------------
# Stage 2: reinforcement learning


class Collector:
    """Plays the policy in N environments, which go on from one rollout to the next."""

    def __init__(self, policy, config):
        self.policy = policy
        self.config = config
        self.num_envs = config.num_envs // world_size()
        self.games = make_games("rollout", self.num_envs, config)
        self.rng = np.random.default_rng(process_seed(config))  # for answers without a legal action
        self.episode_returns = np.zeros(self.num_envs)          # (N,), of the episodes in play

    def collect(self, progress):
        """Play `rollout_steps` environment steps; returns (`Rollout`, statistics as a dict)."""
        answers = []         # T * N, step after step
        rewards = []         # T arrays (N,), as the next three
        terminated = []
        truncated = []
        final_values = []    # V of the last picture of a truncated episode, else 0
        legal = []           # T * N bool: whether an answer named one legal action
        episodes = []        # (success, return) of each episode that ended
        # `config.num_envs` counts all processes, `self.num_envs` (N) this process alone
        num_steps = self.config.rollout_steps // self.config.num_envs          # T
        for _ in range(num_steps):
            # 1. See: the pictures o and the prompts v_in
            infos = self.games.infos
            questions = self.build_prompts(infos)

            # 2. Think and write: the answers v_out, with log-probabilities and values
            new_answers = self.policy.act(self.games.images, questions)

            # 3. Parse: the actions a = f(v_out)
            actions = []
            penalties = np.zeros(self.num_envs)                                # (N,)
            for i, info in enumerate(infos):
                action, was_legal = prompts.parse_action(
                    new_answers[i].text, info["legal_actions"], self.rng)
                actions.append(action)
                legal.append(was_legal)
                if not was_legal:  # some tasks punish it
                    penalties[i] = env.GAMES[info["env"]].illegal_penalty

            # 4. Play
            step = self.games.step(actions)
            reward = step["rewards"] - penalties                               # (N,)

            # 5. Keep what the update needs
            answers += new_answers
            rewards.append(reward)
            terminated.append(step["terminated"])
            truncated.append(step["truncated"])
            final_values.append(self.values_at_time_limit(step))

            # 6. Count the episodes that ended. If one has, self.games.infos already shows the next
            # episode; step["infos"] still shows the old one.
            self.episode_returns += reward
            for i in np.flatnonzero(step["terminated"] | step["truncated"]):
                episodes.append((step["infos"][i]["success"], self.episode_returns[i]))
                self.episode_returns[i] = 0
            progress.update(self.config.num_envs)
            if episodes:
                success_rate = np.mean([success for success, _ in episodes])
                progress.set_postfix(success=f"{success_rate:.1%}", refresh=False)

        self.rescore(answers)  # changes them in place; float32 does not need it

        values = self.grid([answer.value for answer in answers])               # (T, N)
        truncated = torch.tensor(np.array(truncated))                          # (T, N)
        final_values = torch.tensor(np.array(final_values)).float()            # (T, N)

        # next_values[t] is values[t + 1]: the next state is that of the next step. Where a time
        # limit ended the episode, the next step is of a new episode, and V of the last picture
        # takes its place. After a termination the number is wrong; `compute_gae` does not use it.
        last_row = self.values(self.games.images, self.games.infos)            # (N,)
        next_values = torch.cat([values[1:], last_row[None]])                  # (T, N)
        next_values = torch.where(truncated, final_values, next_values)

        rollout = Rollout(
            answers=answers,
            logp_cot=self.grid([answer.logp_cot for answer in answers]),
            logp_action=self.grid([answer.logp_action for answer in answers]),
            values=values,
            next_values=next_values,
            rewards=torch.tensor(np.array(rewards)).float(),
            terminated=torch.tensor(np.array(terminated)),
            truncated=truncated,
            legal=self.grid(legal),
        )
        self.add_optional(rollout)  # such as log-probabilities under the SFT policy
        return rollout, self.statistics(episodes, legal.count(False))

    def rescore(self, answers):
        """In bfloat16 sampling and scoring round differently: score as the update will."""
        if self.config.dtype == "bfloat16" and self.config.policy == "vlm":
            self.policy.rescore(answers, self.config.microbatch)

    def values_at_time_limit(self, step):
        """V (N,) of the last pictures of episodes that the time limit ended in this step; else 0.

        The task of such an episode was not over. Its game has already begun a new episode.
        """
        values = np.zeros(self.num_envs)                                       # (N,)
        ended = np.flatnonzero(step["truncated"] & ~step["terminated"])
        if len(ended):
            last_images = np.stack([step["last_images"][i] for i in ended])
            values[ended] = self.values(last_images, [step["infos"][i] for i in ended])
        return values

    def values(self, images, infos):
        """V of states as a tensor, one for each picture."""
        return self.policy.value(images, self.build_prompts(infos)).cpu()

    def build_prompts(self, infos):
        return [prompts.build_prompt(info, self.config.prompt) for info in infos]

    def grid(self, numbers):
        """T * N numbers or bools, step after step, as a tensor (T, N)."""
        return torch.tensor(numbers).reshape(-1, self.num_envs)

    def add_optional(self, rollout):
        """Add what `drift_from_sft` needs, and one ratio a token."""
        if self.config.drift_coef:
            # PPO trains an adapter alone; what SFT has taught is in the weights below it. So the
            # same network with its adapter off is the SFT policy.
            scores = []
            with torch.no_grad(), self.policy.model.disable_adapter():
                for i in range(0, len(rollout.answers), self.config.microbatch):
                    piece = rollout.answers[i: i + self.config.microbatch]
                    scores.append(self.policy.evaluate(piece))
            logp_cot = torch.cat([piece.logp_cot for piece in scores]).cpu()
            logp_action = torch.cat([piece.logp_action for piece in scores]).cpu()
            rollout.sft_logp_cot = logp_cot.reshape(rollout.values.shape)
            rollout.sft_logp_action = logp_action.reshape(rollout.values.shape)

        if self.config.ratio == "token":  # a variant
            logps = [answer.token_logps for answer in rollout.answers]
            padded = pad_sequence(logps, batch_first=True)                     # (T * N, L)
            rollout.token_logps = padded.unflatten(0, rollout.values.shape)

    def statistics(self, episodes, num_illegal):
        """Of a rollout, over all processes: episodes, success_rate, mean_return, illegal_rate."""
        successes = sum(success for success, _ in episodes)
        returns = sum(episode_return for _, episode_return in episodes)
        count, successes, returns, num_illegal = total_over_processes(
            [len(episodes), successes, returns, num_illegal])

        success_rate = math.nan  # if no episode ended
        mean_return = math.nan
        if count > 0:
            success_rate = successes / count
            mean_return = returns / count

        return {
            "episodes": count,
            "success_rate": success_rate,
            "mean_return": mean_return,
            "illegal_rate": num_illegal / self.config.rollout_steps,
        }

    def state(self):
        """What a checkpoint keeps, as a dict that JSON holds."""
        return {"returns": self.episode_returns.tolist(), "rng": self.rng.bit_generator.state,
                "games": self.games.snapshot()}

    def restore(self, state):
        self.episode_returns = np.array(state["returns"])
        self.rng.bit_generator.state = state["rng"]
        self.games.restore(state["games"])


def reinforce(policy, config, run):
    """PPO on the task's reward. It starts from the SFT policy, or from the checkpoint of `run`."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    broadcast([p.data for p in trainable])  # all processes begin with the first one's adapter
    optimizer = torch.optim.Adam(trainable, config.lr, eps=config.adam_eps, fused=True)
    collector = Collector(policy, config)

    first_update = 0
    state = run.restore("rl", policy, optimizer)
    if state is not None:
        first_update = state["update"]
        collector.restore(state)

    def checkpoint(update):
        index = config.sft_steps + 1 + update  # SFT's checkpoints have numbers up to sft_steps
        run.checkpoint("rl", index, policy, optimizer, update=update, **collector.state())

    if first_update == 0:
        if config.policy == "vlm":  # the value head first needs mean and variance of its input
            policy.standardise(example_states(policy, config), config.microbatch)
            broadcast(policy.value_head.buffers())
        checkpoint(0)
    num_updates = config.env_steps // config.rollout_steps
    began = time.time()
    progress = progress_bar(
        "PPO", num_updates * config.rollout_steps, first_update * config.rollout_steps)
    for update in range(first_update, num_updates):
        # 1. Play
        rollout, stats = collector.collect(progress)
        collected = time.time()

        # 2. Learn
        lambda_ = config.cot_scale
        if lambda_ == "auto":
            lambda_ = auto_cot_scale(
                [answer.token_logps for answer in rollout.answers],
                [answer.num_cot_tokens for answer in rollout.answers])
        lr = cosine(update, num_updates, config.lr, config.lr_end)
        optimizer.param_groups[0]["lr"] = lr
        stats |= ppo_update(policy, optimizer, rollout, lambda_, config)

        # 3. Report and save
        env_steps = (update + 1) * config.rollout_steps
        run.log(
            stage="rl", env_steps=env_steps, **stats, cot_scale=lambda_, lr=lr,
            logp_cot=rollout.logp_cot.mean().item(), logp_action=rollout.logp_action.mean().item(),
            update_seconds=round(time.time() - collected, 2))
        say(progress_line(env_steps, stats, time.time() - began))
        checkpoint(update + 1)
    progress.close()


def example_states(policy, config):
    """Inputs of the model for many states, for `VLMPolicy.standardise`.

    They come from games in which half of the actions are random. A rollout cannot give them: its
    values need the standardised head.
    """
    rng = np.random.default_rng(process_seed(config))
    games = make_games("sft", config.num_envs // world_size(), config)
    inputs = []
    while len(inputs) < config.rollout_steps:  # as many as a rollout has
        questions = [prompts.build_prompt(info, config.prompt) for info in games.infos]
        inputs += policy.encode(games.images, questions)
        games.step(half_random_actions(games.infos, rng))
    return inputs


def half_random_actions(infos, rng):
    """For each state the expert's action, or with probability 1/2 a random legal one."""
    actions = []
    for info in infos:
        action = env.expert_action(info)
        if rng.random() < 0.5:
            action = str(rng.choice(info["legal_actions"]))
        actions.append(action)
    return actions


# -------------------------------------------------------------------------------------------------
# The story of a run


def train(policy, config, run, weights=None):
    """The three stages. Every result is a line of metrics.jsonl.

    weights: the folder of the SFT weights that `policy` has already, if any. Returns a dict of
    dicts: results[task][name of a policy] is its row of metrics.jsonl (in the first process).
    """
    if config.policy == "cnn":
        return train_cnn(policy, config, run)

    # Stage 1: imitate demonstrations. If `weights` is given, this was done already: by another run
    # with the same settings, or by this run, which was stopped after SFT.
    if weights is None:
        if config.sft_lora:  # else SFT trains all weights
            policy.add_lora(config.lora_rank, config.lora_alpha)
        sft(policy, config, run)
        write_sft_weights(policy, config, run)
        if config.sft_lora:
            policy.merge_lora()
    elif rank() == 0:
        copy_folder(weights, run.out / "sft")

    # A run that was stopped in stage 2 has evaluated them already
    has_begun_rl = run.state["stage"] == "rl"  # the last checkpoint's; None: there is none
    if not has_begun_rl:
        # Seed again, so that random numbers do not depend on whether SFT ran or was loaded
        torch.manual_seed(process_seed(config))
        assess("random", policy, config, run)
        assess("SFT", policy, config, run)

    # Stage 2: PPO on the task's reward, with a fresh adapter
    policy.add_lora(config.lora_rank, config.lora_alpha)
    reinforce(policy, config, run)
    if rank() == 0:
        policy.save(run.out)

    # Stage 3: evaluate on the same episodes
    assess("RL", policy, config, run)
    assess("expert", policy, config, run)
    return finish(config, run)


def train_cnn(policy, config, run):
    """The paper's baseline: the same PPO without language, and without SFT."""
    resumed_in_stage_2 = run.state["stage"] == "rl"
    if not resumed_in_stage_2:
        torch.manual_seed(process_seed(config))
        assess("random", policy, config, run)

    reinforce(policy, config, run)
    if rank() == 0:
        policy.save(run.out)

    assess("CNN + RL", policy, config, run)
    assess("expert", policy, config, run)
    return finish(config, run)


def assess(name, policy, config, run):
    """Evaluate "random", "expert", or the policy under another name, on each task.

    The results go to metrics.jsonl.
    """
    if rank() > 0:
        return  # the others go on, and wait where they next exchange something
    for task in config.env.split(","):
        rng = np.random.default_rng(config.seed)
        agent = model_agent(policy, rng, config.prompt)
        if name == "random":
            agent = random_agent(rng)
        if name == "expert":
            agent = expert_agent

        # Play, and write the result; a signal stops the run between two evaluations
        num_envs = config.num_envs // world_size()  # as many at a time as in a rollout
        result = evaluate(
            agent, task, config.eval_episodes, config.seed, num_envs, config.obs,
            label=f"evaluating {name}")
        run.log(stage="eval", policy=name, env=task, **result)
        if run.signal:
            raise SystemExit(128 + run.signal)
        if name == "SFT":
            say(f"SFT: {task}, success {result['success_rate']:.1%}, {run.seconds():.0f} s")


def finish(config, run):
    """Draw the curve, print the table, delete the checkpoints; returns the results as `train`
    does."""
    barrier()  # wait for the first process: the launcher stops a run if some processes end early
    if rank() > 0:
        return None
    figure = plot({"RL, training episodes": [summary(run.rows, config.env)]})
    figure.savefig(run.out / "curve.tmp", dpi=110, format="png")
    (run.out / "curve.tmp").rename(run.out / "curve.png")  # the mark of a finished run
    for file in run.out.glob(run.pattern):
        file.unlink()

    results = {}
    seconds = run.rows[-1]["seconds"]
    print(f"\n{config.env}, CoT scale {config.cot_scale}, seed {config.seed}, {seconds:.0f} s")
    for task in config.env.split(","):
        results[task] = {row["policy"]: row for row in run.rows if row.get("env") == task}
        print(f"\n{task}")
        print(table(results[task]))
        print(bounds_line(task))
    print(f"\nrun: {run.out} (learning curve: {run.out / 'curve.png'})")
    return results


# -------------------------------------------------------------------------------------------------
# SFT weights that are kept. The method does not need it.

SFT_VERSION = 3  # to be raised when the code of SFT or of the built-in model changes


def sft_cache(config, out):
    """The folder that keeps SFT weights for other runs, named by all that they depend on."""
    names = [
        "env", "model", "prompt", "obs", "seed", "dtype", "device", "image_tiles", "quantize",
        "sft_steps", "sft_batch", "sft_lora", "sft_optimizer", "sft_lr", "sft_restart",
        "demo_noise", "demo_play",
    ]
    if config.sft_lora:
        names += ["lora_rank", "lora_alpha"]
    settings = {name: getattr(config, name) for name in names}

    # What is no setting, but changes the weights as well
    settings["base"] = getattr(config, "base", None)  # see `model_identity`; a CNN has none
    settings["versions"] = [SFT_VERSION, torch.__version__, transformers.__version__]
    settings["processes"] = world_size()
    if config.alfworld == "text":  # to start THOR's simulator would take too long
        settings["demonstrations"] = digest_of_demonstrations(config)
    if "alfworld" in config.env:
        settings["engine"] = config.alfworld
        settings["data"] = os.environ.get("ALFWORLD_DATA")

    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return out.parent / "sft-cache" / f"{config.env}-{digest}"


def digest_of_demonstrations(config):
    """A short text that changes when the games, the prompts or the thoughts of SFT do."""
    num_tasks = len(config.env.split(","))
    games = env.Games(config.env, 4 * num_tasks, env.episode_seeds("sft", 0), config.obs)
    digest = hashlib.sha256()
    for _ in range(8):  # steps, so that later states come in as well
        digest.update(games.images.tobytes())
        actions = [env.expert_action(info) for info in games.infos]
        for info, action in zip(games.infos, actions):
            digest.update(prompts.build_prompt(info, config.prompt).encode())
            digest.update(prompts.demonstration(info, action, config.prompt).encode())
        games.step(actions)
    return digest.hexdigest()[:12]


def kept_weights(config, out):
    """The folder with SFT weights for this run: its own, or the cache's; None if there is none."""
    if (out / "sft").exists():
        return out / "sft"
    cache = sft_cache(config, out)
    return cache if cache.exists() else None


def write_sft_weights(policy, config, run):
    """Write the weights (or the adapter alone) and the processor to the run directory.

    Other runs find a copy in the cache, if it can be written.
    """
    if rank() > 0:
        return
    scratch = run.out / "sft.tmp"
    policy.model.save_pretrained(scratch)
    policy.processor.save_pretrained(scratch)
    scratch.rename(run.out / "sft")
    try:
        copy_folder(run.out / "sft", sft_cache(config, run.out))
    except OSError as error:
        say(f"the SFT weights are not kept for other runs: {error}")


def copy_folder(source, target):
    """Copy a folder; the target is there as a whole, or not at all."""
    if target.exists():
        return
    scratch = Path(f"{target}.{os.getpid()}")
    try:
        shutil.copytree(source, scratch, dirs_exist_ok=True)
        scratch.rename(target)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        if not target.exists():  # else another process was faster
            raise


# -------------------------------------------------------------------------------------------------
# Run directory: metrics, checkpoints, signals. The method does not need it.


class Refused(Exception):
    """An error that the user can fix, said in one line."""


class Run:
    """A run directory, which one process at a time may use. It is a context manager.

    A checkpoint is one safetensors file: trained weights and Adam's moments, and all other state as
    JSON in its header. It is written aside, synced and renamed. Its name ends in the SHA-256 of its
    content, so a damaged file is recognised. The last two are kept. Nothing is pickled.
    """

    pattern = "checkpoint-*.safetensors"  # a number that grows, then the digest

    def __init__(self, out, config):
        """Lock the directory and find its newest whole checkpoint.

        Raises OSError, or Timeout where another process has the directory.
        """
        self.out = out
        self.program = program_of(config)
        self.signal = 0              # the number of the signal that asked the run to stop
        self.began = time.time()
        self.rows = []               # the lines of metrics.jsonl
        checkpoint = None
        # stage: None before the first checkpoint, then "sft" or "rl"; metrics: the size in bytes of
        # metrics.jsonl at the checkpoint
        state = {"stage": None, "metrics": 0}

        if rank() == 0:  # the other processes write nothing
            out.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(out / ".lock")  # the system lets go of it when the process dies
            self.lock.acquire(timeout=0)
            checkpoint, state = self.find_checkpoint(state)
            (out / "config.tmp").write_text(json.dumps(vars(config), indent=1))
            (out / "config.tmp").replace(out / "config.json")
            self.track = tracker(config, out)
            self.open_metrics(state["metrics"])
        self.checkpoint_file, self.state = from_first_process((checkpoint, state))

    def find_checkpoint(self, state):
        """(file, state) of the newest whole checkpoint; (None, the given state) if there is
        none."""
        for file in sorted(self.out.glob(self.pattern), reverse=True):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
            if file.stem.endswith(digest):
                with safe_open(file, "pt") as header:
                    return file, json.loads(header.metadata()["state"])
            print(f"{file} is damaged: kept as {file.name}.broken, trying the one before",
                  file=sys.stderr)
            file.rename(f"{file}.broken")
        return None, state

    def open_metrics(self, size):
        """Open metrics.jsonl, cut to `size` bytes: what came after the checkpoint will come
        again."""
        file = self.out / "metrics.jsonl"
        if size and (not file.exists() or file.stat().st_size < size):
            raise Refused(f"{file} has lost lines: begin a new run")
        self.metrics = open(file, "ab", buffering=0)
        self.metrics.truncate(size)
        self.metrics.seek(0, os.SEEK_END)  # truncating leaves the position where it was
        self.rows = read_metrics(self.out)
        if self.rows:
            self.began -= self.rows[-1]["seconds"]

    def __enter__(self):
        self.handlers = {}
        for signum in (signal.SIGINT, signal.SIGTERM):
            self.handlers[signum] = signal.signal(signum, self.on_signal)
        return self

    def __exit__(self, kind, error, trace):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        if rank() > 0:
            return
        (self.out / "checkpoint.tmp").unlink(missing_ok=True)  # a half one, if the disk is full
        self.metrics.close()
        self.lock.release()
        # Stopped by a signal, or by an error that may not come again
        if kind and kind not in (Refused, FloatingPointError):
            starter = "python" if world_size() == 1 else "torchrun ..."
            print(f"go on with: {starter} {self.program} --resume {self.out}", file=sys.stderr)

    def on_signal(self, signum, frame):
        if self.signal:
            raise SystemExit(128 + signum)
        self.signal = signum
        print("\nstopping at the next checkpoint (once more: at once)", file=sys.stderr)

    def seconds(self):
        """Seconds of training so far, those before a resume included."""
        return time.time() - self.began

    @property
    def last_step(self):
        """The newest step in metrics.jsonl: of SFT, or of the environments in RL; 0 if none."""
        for row in reversed(self.rows):
            if "env_steps" in row:
                return row["env_steps"]
            if "step" in row:
                return row["step"]
        return 0

    def log(self, **row):
        """Add a line to metrics.jsonl."""
        if rank() > 0:
            return
        row["seconds"] = round(self.seconds(), 2)
        for key, value in row.items():
            if isinstance(value, float):
                # Six digits; JSON has no NaN
                row[key] = None if math.isnan(value) else float(f"{value:.6g}")
        self.rows.append(row)
        self.metrics.write(json.dumps(row).encode() + b"\n")

        prefix = row.get("policy", row["stage"])
        numbers = {f"{prefix}/{key}": x for key, x in row.items() if isinstance(x, (int, float))}
        self.track(numbers, self.last_step)  # an evaluation stands at the step before it

    def checkpoint(self, stage, index, policy, optimizer, **state):
        """Save all that `restore` needs, under a number that grows; stop if a signal asked for
        it."""
        tensors = tensors_of(policy, optimizer)
        state["torch_rng"] = random_states()
        everyone = gather((self.signal, state))
        if rank() == 0:
            header = {
                "stage": stage,
                "metrics": self.metrics.tell(),
                "processes": [process_state for _, process_state in everyone],
            }
            os.fsync(self.metrics.fileno())  # on the disk, as the checkpoint below
            scratch = self.out / "checkpoint.tmp"
            save_file(tensors, scratch, {"state": json.dumps(header)})  # without a copy in memory
            with scratch.open("rb+") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            scratch.rename(self.out / f"checkpoint-{index:07}-{digest}.safetensors")
            for old in sorted(self.out.glob(self.pattern))[:-2]:
                old.unlink()

        stop = max(signal for signal, _ in everyone)
        if stop:
            raise SystemExit(128 + stop)

    def restore(self, stage, policy, optimizer):
        """Load the checkpoint; returns the state that `checkpoint` was given.

        None if there is no checkpoint, or one of another stage.
        """
        if self.state["stage"] != stage:
            return None
        states = self.state.get("processes", [])
        if len(states) != world_size():
            raise Refused(f"the run had {len(states)} processes, not {world_size()}")
        state = states[rank()]

        # Sort the tensors: weights of the policy, and the optimiser's moments of each parameter.
        # Their names are policy.NAME and optimizer.INDEX.NAME, see `tensors_of`.
        moments = {}
        weights = {}
        for key, x in load_file(self.checkpoint_file).items():
            owner, _, name = key.partition(".")
            if owner == "optimizer":
                index, _, name = name.partition(".")
                moments.setdefault(int(index), {})[name] = x
            else:
                weights[name] = x

        policy.load_state_dict(weights, strict=False)  # the file lacks what is not trained
        load_moments(optimizer, moments)
        set_random_states(state["torch_rng"])
        return state


def tensors_of(policy, optimizer):
    """Trained weights, the value head and Adam's moments, under names for a checkpoint."""
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    tensors = {}
    for name, x in policy.state_dict().items():
        if name in trained or "value_head" in name:
            tensors[f"policy.{name}"] = x
    for index, moments in optimizer.state_dict()["state"].items():
        for name, x in moments.items():
            tensors[f"optimizer.{index}.{name}"] = x
    return tensors


def random_states():
    """The states of torch's generators, as lists of numbers."""
    states = [torch.get_rng_state().tolist()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state().tolist())
    return states


def set_random_states(states):
    """Set the generators to what `random_states` returned.

    Without a GPU now, or without one then, only the CPU's generator is set.
    """
    torch.set_rng_state(torch.tensor(states[0], dtype=torch.uint8))
    if torch.cuda.is_available() and len(states) > 1:
        torch.cuda.set_rng_state(torch.tensor(states[1], dtype=torch.uint8))


def tracker(config, out):
    """A function (dict of numbers, step) that sends numbers to where --track says."""
    kind = getattr(config, "track", None)
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(out)

        def track(numbers, step):
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
        return track

    if kind == "wandb":
        import wandb
        wandb_run = wandb.init(project="vlm-agents", name=out.name, dir=out, config=vars(config))
        return lambda numbers, step: wandb_run.log(numbers | {"step": step})

    return lambda numbers, step: None


# -------------------------------------------------------------------------------------------------
# What the terminal shows


def progress_bar(name, total, done):
    """A progress bar of the first process. Where there is no terminal, it is a line a minute."""
    bar = dict(desc=name, total=total, initial=done, unit="step", disable=rank() > 0)
    if not sys.stderr.isatty():
        bar |= dict(mininterval=60, maxinterval=60, delay=60, ascii=True)  # seconds
    return tqdm(**bar)


def say(text):
    """Print a line above the progress bars, in the first process only."""
    if rank() == 0:
        tqdm.write(text, file=sys.stdout)


def progress_line(env_steps, stats, seconds):
    line = (
        f"{env_steps:6} steps  success {stats['success_rate']:6.1%}  "
        f"return {stats['mean_return']:+6.2f}  illegal {stats['illegal_rate']:5.1%}  "
        f"kl {stats['approx_kl']:.4f}  clipped {stats['clipfrac']:5.1%}  "
        f"explained {stats['explained_variance']:+.2f}  {seconds:4.0f} s"
    )
    if stats["skipped"]:
        line += f"  {stats['skipped']} mini-batches skipped"
    return line


# -------------------------------------------------------------------------------------------------
# Memory: what a run will need, before it begins. The method does not need it.


def memory_plan(policy, config):
    """Expected peak in GB (10^9 bytes) of the model's device, and its parts as a dict."""
    if config.policy == "cnn":
        return 0.2, {"CNN": 0.2}
    model = policy.model
    text = model.config.get_text_config()
    bytes_per_value = model.dtype.itemsize
    layers = text.num_hidden_layers
    width = text.hidden_size
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]

    # The longest sequence: a prompt with its picture, then an answer
    num_tasks = len(config.env.split(","))
    games = env.Games(config.env, num_tasks, seeds=0, obs=config.obs)
    questions = [prompts.build_prompt(info, config.prompt) for info in games.infos]
    inputs = policy.encode(games.images, questions)
    tokens = max(x["input_ids"].shape[1] for x in inputs) + config.max_new_tokens

    # What this process does at a time; no piece is larger than the batch that it is cut from
    num_envs = config.num_envs // world_size()
    largest_batch = max(config.minibatch, config.sft_batch) // world_size()
    microbatch = min(config.microbatch, largest_batch)

    # What is trained, in numbers of 4 bytes: PPO has the adapter's weights, their gradients and two
    # moments of Adam. SFT may train every weight of the model; the weights are counted below.
    adapter = config.lora_rank * sum(m.in_features + m.out_features for m in linear)
    trained_bytes = 4 * 4 * adapter
    if not config.sft_lora:
        trained_bytes = max(trained_bytes, 3 * 4 * model.num_parameters())

    # Activations of a sample, in values. What is kept for the backward pass was measured: a token
    # keeps 36 * width values in each layer, and 24 * width outside of the layers. A patch of the
    # picture keeps 30 * width in each vision layer.
    # With gradient checkpointing, one layer at a time is there in full (36), and of each layer its
    # input (1). The inputs of the vision layers are small, and left out.
    activations = tokens * width * (24 + 36 + layers)
    if not config.gradient_checkpointing:
        # Models name these differently; Qwen says depth, some give a patch's height and width
        vision = getattr(model.config, "vision_config", None)
        vision_width = getattr(vision, "hidden_size", 1024)
        vision_layers = getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", 24)
        patch_size = np.ravel(getattr(vision, "patch_size", 14))[0]
        num_pixels = inputs[0]["pixel_values"].numel() / 3  # of three colours each
        num_patches = num_pixels / patch_size ** 2
        activations = tokens * width * (24 + 36 * layers)
        activations += num_patches * vision_width * 30 * vision_layers
    logit_bytes = 3 * 4 * config.max_new_tokens * text.vocab_size  # three float32 copies

    # Sampling: the cache of keys and values, and one layer that reads the prompts
    heads = text.num_key_value_heads
    head_size = getattr(text, "head_dim", None) or width // text.num_attention_heads
    keys_and_values = tokens * 2 * layers * heads * head_size
    one_layer = tokens * 36 * width

    weights = model.get_memory_footprint()
    if policy.head is not model.get_output_embeddings():  # in bfloat16 the head has a float32 copy
        weights += policy.head.weight.nbytes

    parts = {
        "weights": weights,
        "adapter and optimiser": trained_bytes,
        "KV cache and prompts": num_envs * (keys_and_values + one_layer) * bytes_per_value,
        "activations": microbatch * (activations * bytes_per_value + logit_bytes),
    }
    parts = {name: count / 1e9 for name, count in parts.items()}
    # Sampling and training take turns, so only the larger of the two counts
    peak = max(parts["KV cache and prompts"], parts["activations"])
    peak += parts["weights"] + parts["adapter and optimiser"]
    return peak, parts


# -------------------------------------------------------------------------------------------------
# Time: how long a run will take, before it begins. The method does not need it.


def time_plan(policy, config, sft_is_done):
    """Expected seconds of each stage of a run, a dict. It tries a few steps, and takes the time.

    A gradient is counted as two forward passes, and with gradient checkpointing as three.
    """
    # Let the expert play: how long does a step take, and how long is an episode?
    num_tasks = len(config.env.split(","))
    games = make_games("sft", 8 * num_tasks, config)
    began = time.perf_counter()
    num_steps = 0
    num_episodes = 0
    for _ in range(20):
        step = games.step([env.expert_action(info) for info in games.infos])
        num_steps += len(games.infos)
        num_episodes += np.sum(step["terminated"] | step["truncated"])
    play_seconds = (time.perf_counter() - began) / num_steps
    steps_per_episode = num_steps / max(num_episodes, 1)

    # Sample and score some answers; put the random generator back afterwards
    devices = [torch.cuda.current_device()] if config.device == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        sample_seconds, score_seconds = seconds_per_answer(policy, config)
    learn_seconds = score_seconds * (4 if config.gradient_checkpointing else 3)

    # A step of a rollout is played, sampled, and learned from in each epoch. Sometimes it is scored
    # as well: again in bfloat16, and under the SFT policy.
    rollout_seconds = play_seconds + sample_seconds + config.epochs * learn_seconds
    if config.dtype == "bfloat16" and config.policy == "vlm":
        rollout_seconds += score_seconds
    if config.drift_coef:
        rollout_seconds += score_seconds

    # Four policies are evaluated; the random one and the expert write nothing. A CNN has no SFT.
    num_policies = 4
    num_writers = 2
    sft_samples = config.sft_steps * config.sft_batch / world_size()
    if config.policy == "cnn":
        num_policies = 3
        num_writers = 1
    if config.policy == "cnn" or sft_is_done:
        sft_samples = 0
    eval_steps = config.eval_episodes * steps_per_episode * num_tasks  # of one policy
    return {
        "SFT": sft_samples * (play_seconds + learn_seconds),
        "RL": config.env_steps / world_size() * rollout_seconds,
        "evaluation": eval_steps * (num_policies * play_seconds + num_writers * sample_seconds),
    }


def seconds_per_answer(policy, config):
    """(seconds to sample one answer, seconds to score one). N answers are sampled together."""
    games = make_games("sft", config.num_envs // world_size(), config)
    images = games.images
    questions = [prompts.build_prompt(info, config.prompt) for info in games.infos]

    def sample(num_tokens):
        policy.max_new_tokens = num_tokens
        answers, seconds = timed(lambda: policy.act(images, questions))
        policy.max_new_tokens = config.max_new_tokens
        return answers, seconds

    # An untrained model does not end its answers. So sample 1 token of each, then 9, and compute
    # the time of answers that are as long as demonstrations:
    #     seconds(L tokens) = seconds(1) + (L - 1) * (seconds(9) - seconds(1)) / 8
    sample(1)  # not counted: the first call is slower
    answers, seconds = sample(1)
    if config.policy == "vlm":
        answers, _ = write_demonstrations(policy, games, np.random.default_rng(0), config)
        longest = max(len(answer.tokens) for answer in answers)
        _, seconds_of_nine = sample(9)
        seconds += (longest - 1) * max(seconds_of_nine - seconds, 0) / 8

    # .tolist() waits until a GPU has finished
    piece = answers[:config.microbatch]
    policy.evaluate(piece).value.tolist()
    _, score_seconds = timed(lambda: policy.evaluate(piece).value.tolist())
    return seconds / len(images), score_seconds / len(piece)


def warn_of_busy_cores(policy, config):
    """Say so if other programs make several threads much slower than one (docs/running.md).

    After each piece of work, PyTorch's threads wait for the slowest of them. If another program
    keeps a core busy, the thread on this core makes all others wait. The pieces of the built-in
    model are small, so this happens often. In larger models it matters less, and a try is longer.
    """
    num_threads = torch.get_num_threads()
    if config.device != "cpu" or config.model != "tiny" or num_threads == 1:
        return

    games = make_games("sft", 8, config)
    questions = [prompts.build_prompt(info, config.prompt) for info in games.infos]

    def work():
        with torch.no_grad():
            for _ in range(6):
                policy.value(games.images, questions)

    _, seconds = timed(work)
    torch.set_num_threads(1)
    _, seconds_of_one = timed(work)
    torch.set_num_threads(num_threads)
    if seconds > 2 * seconds_of_one:
        say(f"other programs are busy: {num_threads} threads take {seconds / seconds_of_one:.0f} "
            "times as long as one. Stop them, or stop this run (Ctrl-C) and put OMP_NUM_THREADS=1 "
            "before its command")


def timed(work):
    """(what work() returns, how many seconds it took)."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def time_line(plan):
    """The plan in one line; a stage without any time is left out."""
    parts = ", ".join(f"{stage} {in_words(seconds)}" for stage, seconds in plan.items() if seconds)
    return f"time expected: about {in_words(sum(plan.values()))} ({parts})"


def in_words(seconds):
    """A time with its unit: "45 s", "12 min" or "3.4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# -------------------------------------------------------------------------------------------------
# Command line: from flags to a run, and from errors of a user to one line


def configure(argv):
    """(configuration, run directory) of a command line; an error of the user is one line, exit code
    2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        return resume(parser, args.resume, argv)
    if (args.seeds or args.quick) and not args.sweep:
        parser.error("--seeds and --quick belong to --sweep; one run has one --seed")
    check_tasks(parser, args.env)

    # Parse once more: what the line leaves out is now the default of preset and task
    preset = args.preset or from_first_process(preset_for(parser, args))
    parser.set_defaults(preset=preset, **PRESETS[preset])
    parser.set_defaults(**TASK_SETTINGS.get((preset, args.env), {}))
    parser.set_defaults(**PROJECT_SETTINGS)
    if args.policy == "cnn":
        parser.set_defaults(drift_coef=0.0)  # without SFT there is nothing to stay near
    config = parser.parse_args(argv)
    if config.dtype is None:
        config.dtype = from_first_process(best_dtype(config))

    check(parser, config)
    config.model = absolute(config.model)
    out = config.out
    if out is None:
        now = time.strftime("%Y%m%d-%H%M%S")
        out = Path("runs") / f"{config.env.replace(',', '+')}-{now}"
    if (out / "config.json").exists():
        parser.error(f"{out} already holds a run: "
                     f"go on with --resume {out}, or choose another --out")
    return settings_of(config), out


def preset_for(parser, args):
    """The name of the preset for --model. A model that cannot be read ends in one line."""
    if args.model == "tiny":
        return "tiny"
    try:
        size = count_parameters(args.model, args.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        parser.error(f"cannot play --env {args.env} with --model {args.model}: "
                     f"{first_line(error)}")
    return "small" if size < SMALL_MODEL_LIMIT else "paper"


def absolute(model):
    """--model, a folder as an absolute path: so it is found from any working directory."""
    if model != "tiny" and Path(model).is_dir():
        return str(Path(model).resolve())
    return model


def best_dtype(config):
    """The precision of the base weights, where no flag gives it."""
    if config.preset == "tiny" or not config.sft_lora or config.policy == "cnn":
        return "float32"
    if config.device == "cuda":
        return "bfloat16"
    # Some CPUs compute with bfloat16. The others have to convert it, and are faster with float32.
    cpu = torch.cpu.get_capabilities()
    cpu_has_bfloat16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    if config.preset == "small" and config.device == "cpu" and cpu_has_bfloat16:
        return "bfloat16"
    return "float32"


def resume(parser, directory, argv):
    """The configuration for --resume: that of the run. Flags in `argv` must agree with it."""
    kept = kept_config(parser, directory)
    if getattr(kept, "project", None) != PROJECT_SETTINGS.get("project"):
        parser.error(f"{directory} is a run of {program_of(kept)}: go on with that")

    # Every flag that is given must be as it was, but for those of another machine (device, dtype).
    # --trust-remote-code is never taken from a file: each command must give it.
    parser.set_defaults(**vars(kept))
    args = parser.parse_args(argv)
    args.model = absolute(args.model)
    config = settings_of(args)
    for name, value in vars(config).items():
        kept_value = getattr(kept, name, value)
        if value != kept_value and name not in ("trust_remote_code", "device", "dtype"):
            parser.error(f"--{name.replace('_', '-')} {value} contradicts the run's {kept_value}: "
                         "leave it out, or begin a new run")
    if args.out or args.sweep or args.seeds or args.quick:
        parser.error("--resume goes without --out, --sweep, --seeds and --quick")
    if config.device != "cpu" and not getattr(torch, config.device).is_available():
        parser.error(f"the run needs {config.device}, which is not there: "
                     "add --device cpu --dtype float32")
    # A task may have gone since; the number of processes or the precision may be another
    check_tasks(parser, config.env)
    check(parser, config)
    return config, directory


def kept_config(parser, directory, trust_remote_code=False):
    """The configuration of the run in `directory`; where there is none, an error of one line."""
    try:
        return read_config(directory, trust_remote_code)
    except (OSError, ValueError, TypeError):
        parser.error(f"{directory} holds no run (no config.json that can be read)")


def program_of(config):
    """The program that makes runs with this configuration."""
    project = getattr(config, "project", None)
    return f"docs/projects/{project}.py" if project else "train.py"


def settings_of(args):
    """The flags that are settings of one run: all but --out, --resume and those of a sweep."""
    settings = dict(vars(args))
    for name in ("out", "resume", "sweep", "seeds", "quick"):
        del settings[name]
    return argparse.Namespace(**settings)


def check_tasks(parser, names):
    if not names or not set(names.split(",")) <= set(env.GAMES):
        parser.error(f"--env is one of {', '.join(env.GAMES)}, or several with commas between them")
    for name in names.split(","):
        if name not in prompts.TASKS:
            parser.error(f"--env {name} has no entry in TASKS, in prompts.py")


def check(parser, config):
    """End with one line where settings do not fit together."""
    if config.policy == "cnn":
        game = env.GAMES.get(config.env)  # None for several tasks
        # A game whose actions change has a method legal_actions of its own
        if game is None or game.legal_actions is not env.Game.legal_actions:
            parser.error("--policy cnn plays one task whose actions never change")
    if config.policy == "cnn" and config.model != "tiny":
        parser.error("--policy cnn is a model of its own: it goes without --model")
    if config.policy == "cnn" and config.drift_coef:
        parser.error("--drift-coef keeps answers near those of SFT: --policy cnn has none")
    if getattr(config, "track", None) and not find_spec(config.track):
        parser.error(f"--track {config.track} needs a package: pip install {config.track}")
    if config.sft_optimizer == "muon" and config.sft_lora:
        parser.error("--sft-optimizer muon trains all weights: it goes with --no-sft-lora")
    check_settings(parser, config)

    # The machine and the numbers
    if config.device != "cpu" and not getattr(torch, config.device).is_available():
        parser.error(f"--device {config.device} is not there, or this PyTorch cannot use it")
    if config.quantize and (config.device != "cuda" or config.model == "tiny"):
        parser.error("--quantize 4bit is for large models on --device cuda")
    if config.quantize and not find_spec("bitsandbytes"):
        parser.error("--quantize 4bit needs a package: pip install bitsandbytes")
    if config.quantize and not config.sft_lora:
        parser.error("--quantize 4bit needs --sft-lora: weights in 4 bits cannot be trained")
    if config.dtype == "bfloat16" and not config.sft_lora and config.policy == "vlm":
        parser.error("--dtype bfloat16 needs --sft-lora: "
                     "a step of SFT is smaller than the rounding of the weights")

    # What must be a multiple of what
    if config.rollout_steps % config.num_envs:
        parser.error(f"--rollout-steps {config.rollout_steps} is not a multiple of "
                     f"--num-envs {config.num_envs}")
    if config.env_steps < config.rollout_steps:
        parser.error(f"--env-steps {config.env_steps} is less than one rollout, "
                     f"--rollout-steps {config.rollout_steps}")
    for name in ("num_envs", "sft_batch"):
        num_tasks = len(config.env.split(","))
        if getattr(config, name) < num_tasks:
            parser.error(f"--{name.replace('_', '-')} {getattr(config, name)} is less than the "
                         f"number of tasks, {num_tasks}")
    for name in ("num_envs", "minibatch", "sft_batch"):
        if getattr(config, name) % world_size():
            parser.error(f"--{name.replace('_', '-')} {getattr(config, name)} cannot be split over "
                         f"{world_size()} processes")


ADVICE = ("try --quantize 4bit, --gradient-checkpointing, a smaller --microbatch, --num-envs, "
          "--lora-rank or --max-new-tokens")


def launch(config, out):
    """Train in the directory `out`, or go on there; an error that a user can fix is one line, exit
    code 2."""
    try:
        return run_in(config, out)
    except Exception as error:
        line = explain(error, out)
        if line is None:  # a bug keeps its traceback
            raise
        make_parser().error(line)


def run_in(config, out):
    """Build the policy, check that there is memory for it, and train."""
    if (out / "curve.png").exists():
        raise Refused(f"{out} holds a finished run: begin a new one with another --out")
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # "high": float32 products may round to 11 bits (TF32) and are five times as fast. That is
        # exact enough beside base weights of bfloat16, which have 8 bits.
        torch.set_float32_matmul_precision("high" if config.dtype == "bfloat16" else "highest")

    weights = None
    try:
        # `base` says with which weights the run begins. config.json keeps it for --resume.
        if getattr(config, "base", None) is None and config.policy == "vlm":
            config.base = model_identity(config.model, config.trust_remote_code)
        weights = from_first_process(kept_weights(config, out))  # on all machines the same
        policy = build_policy(config, weights)
    except (OSError, ValueError) as error:
        source = weights or config.model
        raise Refused(f"cannot play --env {config.env} with --model {source}: {error}") from None

    needed, parts = memory_plan(policy, config)
    available = psutil.virtual_memory().total / 1e9
    if config.device == "cuda":
        _, total = torch.cuda.mem_get_info()  # (free bytes, all bytes)
        available = total / 1e9
    if needed > available:
        raise Refused(f"{needed:.0f} GB do not fit into the {available:.0f} of {config.device}: "
                      f"{ADVICE}")

    with Run(out, config) as run:
        if run.state["stage"] == "rl" and not weights and config.policy == "vlm":
            raise Refused(f"{out / 'sft'} is missing")
        describe(policy, config, out, weights, needed, parts)
        # Of a run that goes on, of a project with an update of its own and of a simulator, the time
        # is not known
        is_new = run.state["stage"] is None
        if rank() == 0 and is_new and config.project is None and config.alfworld == "text":
            say(time_line(time_plan(policy, config, sft_is_done=weights is not None)))
            warn_of_busy_cores(policy, config)
            run.began = time.time()
        return train(policy, config, run, weights)


def describe(policy, config, out, weights, needed, parts):
    """Say what is trained, where, and in how much memory."""
    if config.policy == "vlm":
        name = config.model
        size = policy.model.num_parameters()
    else:
        name = "CNN"
        size = sum(p.numel() for p in policy.parameters())
    place = f"{config.device}, {config.dtype}"
    if world_size() > 1:
        place += f", {world_size()} processes"
    say(f"{config.env}: {name} ({size / 1e6:.1f} M parameters) on {place}; into {out}")
    memory = ", ".join(f"{part} {gigabytes:.1f}" for part, gigabytes in parts.items())
    say(f"memory expected: {needed:.1f} GB, without Python and its libraries ({memory})")
    if weights is not None and weights != out / "sft":
        say(f"SFT: weights reused from {weights}")


def explain(error, out):
    """The line that tells a user what to do about an error; None for what is a bug."""
    line = first_line(error)

    # Files
    if isinstance(error, Timeout):
        return f"another process is training in {out}"
    if isinstance(error, OSError):
        return f"{error.filename or out}: {error.strerror or error}"
    if isinstance(error, (Refused, SafetensorError)):
        return line

    # Memory, numbers, other processes
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {ADVICE}"
    if isinstance(error, FloatingPointError):
        return (f"{error}; the checkpoint before is whole: "
                "try a smaller --lr or --max-grad-norm in a new run")
    if world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return f"process {rank()}: another one died, which ends the run ({line})"
    return None


def connect_processes():
    """Join the other processes that torchrun started, if there are any."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"  # rollouts are gathered on the CPU
    # The timeout is long: the others wait while the first process evaluates
    dist.init_process_group(backend, timeout=timedelta(hours=12))
    atexit.register(dist.destroy_process_group)  # its threads could abort a process that ends


def sweep(args, argv):
    """An experiment: runs that differ in one flag, each with several seeds, then a table and a
    plot.

    Runs that are there are reused and runs that stopped go on, so the same line resumes the
    experiment.
    """
    parser = make_parser()
    if not args.out:
        parser.error("--sweep needs --out")
    if args.quick:
        small = "--sft-steps 20 --env-steps 512 --rollout-steps 512 --eval-episodes 50"
        argv = small.split() + argv  # if a flag comes twice, argparse takes the last: the user's
    # Check all settings before the first run
    parser.set_defaults(seed=None)
    has_seed = parser.parse_args(argv).seed is not None
    flags = [axis.partition("=")[0] for axis in args.sweep]
    if has_seed or "seed" in flags:
        parser.error("--sweep takes its seeds from --seeds")
    for flag in ("out", "resume", "sweep", "seeds", "quick"):
        if flag in flags:
            parser.error(f"--sweep {flag}=... is not possible: --{flag} is no setting of a run")
    seeds = (args.seeds or "0").split(",")
    if len(set(seeds)) < len(seeds):
        parser.error(f"--seeds {args.seeds} has the same seed twice")
    settings = []  # (flag, value, configuration, folder) of each run
    for axis in args.sweep:
        flag, _, values = axis.partition("=")
        for value in values.split(","):
            for seed in seeds:
                # `configure` drops --sweep and --out; each run gets a folder of its own
                config, _ = configure([*argv, f"--{flag}", value, "--seed", seed])
                folder = args.out / f"{flag}-{value}-seed{seed}"
                settings.append((flag, value, config, folder))

    runs = {}    # name of a task and setting -> `summary` of each seed
    curves = {}  # the same, but for several tasks in one run: these have one curve
    for flag, value, config, folder in settings:
        train_once(parser, config, folder)
        if rank() > 0:
            continue  # the first process alone has results
        rows = read_metrics(folder)
        setting_name = "" if flag == "env" else f", {flag} {value}"
        for task in config.env.split(","):
            runs.setdefault(task + setting_name, []).append(summary(rows, task))
        curves.setdefault(config.env + setting_name, []).append(summary(rows, config.env))

    if rank() == 0:
        command = f"python {program_of(config)} {' '.join(sys.argv[1:])}"
        text = sweep_table(runs, ",".join(seeds), command)
        (args.out / "table.md").write_text(text)
        (args.out / "table.json").write_text(json.dumps(runs | curves, indent=1))
        plot(curves).savefig(args.out / "curves.png", dpi=110)
        print(f"{text}{args.out / 'curves.png'}")


def train_once(parser, config, folder):
    """Train in `folder`, unless a finished run with the same settings is there."""
    if (folder / "config.json").exists():
        kept = kept_config(parser, folder, config.trust_remote_code)
        # `base` is no setting: `run_in` adds it when a run begins (a CNN has none)
        if hasattr(kept, "base"):
            config.base = kept.base
        if vars(kept) != vars(config):
            parser.error(f"{folder} has other settings: choose another --out")
    if not (folder / "curve.png").exists():
        launch(config, folder)


def main(argv=None):
    if argv is None:
        argv = sys.argv[1:]
    connect_processes()
    args = make_parser().parse_args(argv)
    if args.sweep:
        return sweep(args, argv)
    config, out = configure(argv)
    return launch(config, out)


if __name__ == "__main__":
    main()
