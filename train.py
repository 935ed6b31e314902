"""Fine-tune a vision-language model as a decision-making agent: SFT on demonstrations, then PPO on the task reward.

    python train.py --env blackjack --cot-scale 0.3

1. SFT teaches the output format and the reading of pictures, from demonstrations whose perception is right
   and whose actions are mediocre (`--demo-noise` of them are random).
2. PPO: sample answers, parse and play their actions, estimate advantages, update LoRA and value head.
3. Evaluate both policies on the same episodes, beside the random and the expert policy.

A run directory holds config.json, metrics.jsonl (one JSON object a line), sft/ and adapter/ (safetensors),
value_head.safetensors and curve.png. `python eval.py --run DIR` evaluates it again.
"""
import argparse
import atexit
import gc
import hashlib
import inspect
import itertools
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
from filelock import FileLock, Timeout
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import env
import prompts
from eval import evaluate, expert_agent, model_agent, random_agent, table
from policy import CNNPolicy, VLMPolicy, load_model
from ppo import Rollout, auto_cot_scale, gather, ppo_update, sum_gradients

# Under torchrun, several processes train together: each plays its share of the environments and of the mini-batches.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
OWN_SEEDS = 100_003 * RANK  # a process adds it to the seed of all that it plays
BEST_DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
RANDOM = [torch, torch.cuda] if torch.cuda.is_available() else [torch]  # whose random states checkpoints keep

PUBLISHED = {"ezpoints": "50.0 %", "points24": "2.3 %", "alfworld": "21.7 %"}  # LLaVA-1.6-7B + RL, the paper's tables
BOUNDS = {"blackjack": 0.4316, "points24": 0.7309}  # best possible success rates: computed, for an infinite deck

# ---------------------------------------------------------------------------------------------------
# Settings

rate, positive, size = env.number(float, 0, 1), env.number(float, 1e-12), env.positive_int
switch = argparse.BooleanOptionalAction
# What a setting takes, its values in the presets paper (the authors') and tiny (the embedded model's), and what it is.
SETTINGS = {
    "what to train": {
        "env": (str, None, None, f"the task, one of {', '.join(env.GAMES)}, or several with commas between them"),
        "model": (str, "tiny", "tiny", "tiny (built in), a model of the hub, or a folder"),
        "policy": (["vlm", "cnn"], "vlm", "vlm", "vlm, or cnn: the paper's baseline without language and without SFT"),
        "prompt": (prompts.STYLES, "full", "full",
                   "before the action: key-state fields and thoughts (full, the paper's), thoughts, nothing (action); "
                   "vision is full, told by the picture, not by the text; chatty is full, with idle words"),
        "obs": (["image", "marked", "text"], "image", "image",
                "the picture; marked, with boxes and labels around what matters; or text in the prompt instead"),
        "image_tiles": (["one", "anyres"], "one", "one", "of LLaVA-1.6, Idefics3: one, as in the paper, or all"),
        "device": (["cuda", "mps", "cpu"], BEST_DEVICE, "cpu", "of the model; the embedded one is too small for a GPU"),
        "dtype": (["bfloat16", "float32"], "bfloat16", "float32",
                  "of the base weights, off cuda float32 if left out; adapter and value head are always float32"),
        "alfworld": (["text", "thor"], "text", "text",
                     "its engine: text, with drawings, or the simulator thor (ai2thor, a display, the data set)"),
        "trust_remote_code": (switch, False, False, "run Python code that a model brings along"),
        "quantize": (["4bit"], None, None, "base weights in 4 bits instead, with bitsandbytes on cuda"),
        "cot_scale": (lambda text: text if text == "auto" else rate(text), 0.5, 0.3,
                      "lambda in [0, 1]: weight of the thoughts' log-probability; auto: gives them half of the noise"),
        "ratio": (["step", "token"], "step", "step", "one probability ratio a step, with lambda, or a token, without"),
        "seed": (env.natural_int, 0, 0, "fixes the run"),
        "eval_episodes": (size, 1000, 1000, "episodes of the evaluations at the end"),
    },
    "rollout": {
        "env_steps": (size, 15000, 15360, "environment steps in all"),
        "num_envs": (size, 16, 64, "environments played at a time"),
        "rollout_steps": (size, 512, 512, "environment steps an update, over all environments"),
        "temperature": (positive, 0.2, 0.5, "of sampling and of all log-probabilities"),
        "max_new_tokens": (size, 256, 96, "longest answer"),
    },
    "PPO": {
        "epochs": (size, 4, 4, "passes over a rollout"),
        "minibatch": (size, 128, 64, "environment steps an optimiser step"),
        "microbatch": (size, 1, 32, "environment steps a forward pass; smaller needs less memory"),
        "lr": (positive, 1e-5, 3e-4, "learning rate at the start, cosine from there"),
        "lr_end": (positive, 1e-9, 3e-5, "learning rate at the end"),
        "adam_eps": (positive, 1e-7, 1e-7, "epsilon of Adam"),
        "clip": (positive, 0.1, 0.1, "range of the probability ratio: 1 - clip to 1 + clip"),
        "value_clip": (positive, 0.1, 1.0, "how far a value may move in an update, in units of return"),
        "value_coef": (positive, 0.5, 0.5, "weight of the value loss"),
        "max_grad_norm": (positive, 0.01, 0.5, "gradient clipping"),
        "target_kl": (positive, None, 0.02, "end an update early past 1.5 times this approx_kl"),
        "kl_coef": (env.number(float, 0), 0.0, 0.1, "weight of KL(p, p_SFT) of the thoughts: stay near SFT"),
        "gamma": (rate, 0.9, 0.9, "discount"),
        "gae_lambda": (rate, 0.95, 0.95, "lambda of generalised advantage estimation"),
        "lora_rank": (size, 128, 16, "rank of the adapter"),
        "lora_alpha": (size, 256, 32, "scale of the adapter, over its rank"),
        "gradient_checkpointing": (switch, True, False, "keep no activations: less memory, a third more time"),
    },
    "SFT": {
        "sft_steps": (size, 1000, 400, "optimiser steps"),
        "sft_batch": (size, 128, 32, "demonstrations a step"),
        "sft_lora": (switch, True, False, "train an adapter and merge it, instead of all weights"),
        "sft_lr": (positive, 2e-5, 1e-3, "learning rate, cosine with 3 %% warm-up"),
        "sft_restart": (rate, 0.0, 0.0, "share of episodes cut short a step, falling to 0: first states first"),
        "demo_noise": (rate, 0.5, 0.75, "share of the demonstrated actions that are random"),
    },
}
PRESETS = {kind: {name: row[column] for group in SETTINGS.values() for name, row in group.items() if name != "env"}
           for column, kind in ((1, "paper"), (2, "tiny"))}
TASK_PRESETS = {
    ("tiny", "numberline"): dict(env_steps=6144),
    ("tiny", "ezpoints"): dict(value_coef=0.01),  # returns up to 10: the squares must not drown the policy's gradient
    ("tiny", "blackjack"): dict(demo_noise=0.85, sft_steps=800),
    ("tiny", "points24"): dict(demo_noise=0.3, sft_steps=3000, sft_batch=64, sft_restart=0.5, value_coef=0.01,
                               value_clip=10.0, temperature=0.4),
    ("tiny", "alfworld"): dict(demo_noise=0.5, sft_steps=1500, env_steps=12288, value_coef=0.001, value_clip=50.0,
                               temperature=0.8, eval_episodes=300),
    ("paper", "ezpoints"): dict(rollout_steps=1024),
    ("paper", "points24"): dict(rollout_steps=1024),
    ("paper", "alfworld"): dict(cot_scale=0.2, env_steps=12288, rollout_steps=1024, minibatch=256, eval_episodes=300),
}


def complete(config):
    """The dict `config`, with `env` and `preset`, and the defaults of all that it leaves out."""
    defaults = PRESETS[config["preset"]] | TASK_PRESETS.get((config["preset"], config["env"]), {})
    if config.get("device", defaults["device"]) != "cuda":
        defaults["dtype"] = "float32"
    if config.get("policy") == "cnn":
        defaults["kl_coef"] = 0.0  # no SFT, nothing to stay near
    return defaults | config


def read_config(directory, trust_remote_code=False):
    """The configuration of the run in `directory`; whether to trust code is for the caller to say, not for a file.

    Raises OSError, ValueError, KeyError or TypeError where there is none.
    """
    config = complete(json.loads((directory / "config.json").read_text()))
    return argparse.Namespace(**config | {"trust_remote_code": trust_remote_code})


def make_parser():
    parser = env.Parser(description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS,  # absent if not given
                        usage="%(prog)s --env ENV [--cot-scale LAMBDA] [other flags]")
    groups = {title: parser.add_argument_group(title) for title in SETTINGS}
    for title, settings in SETTINGS.items():
        for name, (takes, paper, tiny, help) in settings.items():
            kind = "action" if takes is switch else "type" if callable(takes) else "choices"
            default = f" [paper {paper}, tiny {tiny}]" if paper != tiny else f" [{tiny}]" if tiny is not None else ""
            groups[title].add_argument(f"--{name.replace('_', '-')}", help=help + default, **{kind: takes})
    add = groups["what to train"].add_argument
    add("--preset", choices=PRESETS, help="settings behind the flags left out [tiny for --model tiny, else paper]")
    add("--out", type=Path, help="run directory [a new one under runs/]")
    add("--resume", type=Path, metavar="DIR", help="go on with the run in this directory, exactly; needs no other flag")
    add("--track", choices=["tensorboard", "wandb"], help="send the metrics to TensorBoard or Weights & Biases as well")
    add("--sweep", nargs="+", metavar="FLAG=V,V",
        help="an experiment: the rest of the line with each value of a flag (cot-scale=0,0.3,1 ratio=token), for every "
             "one of --seeds; writes table.md, table.json and curves.png into --out")
    add("--seeds", metavar="S,S", help="of --sweep [0]")
    add("--quick", action="store_true", help="--sweep at a size that shows only whether it works")
    return parser


def parse_args(argv=None):
    """(parser, configuration, run directory); the configuration of a run that goes on is its own."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    if directory := given.pop("resume", None):
        try:
            config = read_config(directory, given.pop("trust_remote_code", False))
        except (OSError, ValueError, KeyError, TypeError):
            parser.error(f"{directory} holds no run (no config.json that can be read)")
        for name, value in given.items():
            kept = (vars(config) | {"out": directory}).get(name)
            if value != kept:
                parser.error(f"--{name.replace('_', '-')} {value} contradicts the run's {kept}: leave it out, "
                             "or begin a new run")
        return parser, config, directory
    out, axes, seeds, quick = (given.pop(name, None) for name in ("out", "sweep", "seeds", "quick"))
    if (seeds or quick) and not axes:
        parser.error("--seeds and --quick belong to --sweep; one run has one --seed")
    if not set(given.get("env", "").split(",")) <= set(env.GAMES):
        parser.error(f"--env is one of {', '.join(env.GAMES)}, or several with commas between them")
    preset = given.get("preset", "tiny" if given.get("model", "tiny") == "tiny" else "paper")
    config = argparse.Namespace(**complete({"preset": preset} | given))
    if config.policy == "cnn" and config.env not in prompts.CARD_TASKS:
        parser.error(f"--policy cnn has one fixed list of actions: --env is one of {', '.join(prompts.CARD_TASKS)}")
    if config.device != "cpu" and not getattr(torch, config.device).is_available():
        parser.error(f"--device {config.device} is not there, or this build of PyTorch cannot use it")
    if config.quantize and (config.device != "cuda" or config.model == "tiny" or not find_spec("bitsandbytes")):
        parser.error("--quantize 4bit is for large models on --device cuda, and needs pip install bitsandbytes")
    if config.dtype == "bfloat16" and not config.sft_lora and config.policy == "vlm":
        parser.error("--dtype bfloat16 needs --sft-lora: steps of SFT are smaller than what its weights are rounded to")
    if config.rollout_steps % config.num_envs:
        parser.error(f"--rollout-steps {config.rollout_steps} is not a multiple of --num-envs {config.num_envs}")
    if config.env_steps < config.rollout_steps:
        parser.error(f"--env-steps {config.env_steps} is less than one rollout, --rollout-steps {config.rollout_steps}")
    for name in ("num_envs", "minibatch", "sft_batch"):
        if getattr(config, name) % RANKS:
            parser.error(f"--{name.replace('_', '-')} {getattr(config, name)} cannot be split over {RANKS} processes")
    out = out or Path("runs") / f"{config.env.replace(',', '+')}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (out / "config.json").exists():
        parser.error(f"{out} already holds a run: go on with --resume {out}, or choose another --out")
    return parser, config, out


# ---------------------------------------------------------------------------------------------------
# Stage 1: supervised fine-tuning


def cosine(step, steps, start, end):
    """Learning rate at `step` of `steps` on a half cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def sft(policy, config, run):
    """Train on demonstrations: maximise log p(v_out | o, v_in), averaged over tokens; from `run`'s checkpoint on."""
    n, rng, start = config.sft_batch // RANKS, np.random.default_rng(config.seed + OWN_SEEDS), 0
    games = env.Games(config.env, n, config.seed + OWN_SEEDS, config.obs)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, config.sft_lr, weight_decay=0.0, fused=True)
    policy.temperature = 1.0  # likelihood as it is; only sampling is sharpened
    if state := run.restore("sft", policy, optimizer):
        start, rng.bit_generator.state = state["step"], state["rng"]
        games.restore(state["games"])
    steps, hidden = config.sft_steps, RANK > 0 or None  # None: hidden where there is no terminal
    for step in (bar := tqdm(range(start, steps), "SFT", steps, initial=start, unit="step", disable=hidden)):
        lr = min(1.0, (step + 1) / (0.03 * steps)) * cosine(step, steps, config.sft_lr, 0)  # 3 % warm-up
        optimizer.param_groups[0]["lr"] = lr
        infos, noisy = games.infos, rng.random(n) < config.demo_noise
        actions = [str(rng.choice(info["legal_actions"])) if noise else env.expert_action(info)
                   for noise, info in zip(noisy, infos)]
        answers = policy.demonstrate(games.images, [prompts.build_prompt(info, config.prompt) for info in infos],
                                     [prompts.demonstration(*pair, config.prompt) for pair in zip(infos, actions)])
        # Summed over all processes, and so all of them checkpoint at the same step, whichever the signal came to.
        tokens, stop = np.sum(gather((sum(len(answer.tokens) for answer in answers), run.signal)), 0).tolist()
        loss = 0.0
        for i in range(0, n, config.microbatch):
            scores = policy.evaluate(answers[i: i + config.microbatch])
            part = -(scores.logp_cot + scores.logp_action).sum() / tokens
            part.backward()
            loss += part.item()
        sum_gradients(parameters)
        if not torch.nn.utils.clip_grad_norm_(parameters, 1.0).isfinite():
            raise FloatingPointError(f"the gradient of SFT step {step + 1} is not finite")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Of the slips only a quarter is played: where a game is lost, nothing is left to learn.
        moves = [action if slip else env.expert_action(info)
                 for slip, action, info in zip(rng.random(n) < 0.25, actions, infos)]
        games.step(moves, restart=rng.random(n) < config.sft_restart * (1 - step / steps))  # first states first
        done = step + 1
        if done % 50 == 0 or done == steps:
            loss = sum(gather(loss))
            bar.set_postfix(loss=f"{loss:.3f}")
            run.log(stage="sft", step=done, loss=loss, lr=lr)
        if done % 100 == 0 or done == steps or stop:
            run.checkpoint("sft", done, policy, optimizer,
                           step=done, rng=rng.bit_generator.state, games=games.snapshot())
    policy.temperature = config.temperature


# ---------------------------------------------------------------------------------------------------
# Stage 2: reinforcement learning


class Collector:
    """Plays the policy in `num_envs` environments, which go on from one rollout to the next."""

    def __init__(self, policy, config):
        self.policy, self.config, self.n = policy, config, config.num_envs // RANKS
        self.rng = np.random.default_rng(config.seed + OWN_SEEDS)
        self.games = env.Games(config.env, self.n, 1000 + config.seed * config.num_envs + RANK * self.n, config.obs)
        self.returns = np.zeros(self.n)  # so far, of the episodes in play

    def collect(self, bar):
        """One `Rollout` of rollout_steps, and its statistics: episodes, success_rate, mean_return, illegal_rate."""
        config, answers, rows, episodes, illegal = self.config, [], [], [], 0
        for _ in range(config.rollout_steps // config.num_envs):
            # o and v_in -> v_out -> a = f(v_out), then the games' answer
            infos = self.games.infos
            batch = self.policy.act(self.games.images, [prompts.build_prompt(info, config.prompt) for info in infos])
            parsed = [prompts.parse_action(answer.text, info["legal_actions"], self.rng)
                      for answer, info in zip(batch, infos)]
            step = self.games.step([action for action, _ in parsed])
            slips = np.array([not was_legal for _, was_legal in parsed])
            rewards = step["rewards"] - slips * [env.GAMES[info["env"]].illegal_penalty for info in infos]
            # An episode that is cut off would have gone on: V of its last state, which the next episode has replaced.
            next_values, cut = np.zeros(self.n), np.flatnonzero(step["truncated"] & ~step["terminated"])
            if len(cut):
                pictures = np.stack([step["last_images"][i] for i in cut])
                next_values[cut] = self.values(pictures, [step["infos"][i] for i in cut])
            answers += batch
            rows.append((next_values, rewards, step["terminated"], step["truncated"]))
            illegal, self.returns = illegal + slips.sum(), self.returns + rewards
            for i in np.flatnonzero(step["terminated"] | step["truncated"]):
                episodes.append((step["infos"][i]["success"], self.returns[i]))
                self.returns[i] = 0
            bar.update(config.num_envs)
            if episodes:
                bar.set_postfix(success=f"{np.mean(episodes, 0)[0]:.1%}")
        if config.dtype == "bfloat16" and config.policy == "vlm":
            self.policy.rescore(answers, config.microbatch)
        scores = torch.tensor([[a.logp_cot, a.logp_action, a.value] for a in answers]).T.reshape(3, -1, self.n)
        next_values, rewards, *ends = (torch.tensor(np.array(column)) for column in zip(*rows))  # each (T, N)
        rollout = Rollout(answers, *scores, next_values.float(), rewards.float(), *ends)
        following = torch.cat([rollout.values[1:], self.values(self.games.images, self.games.infos)[None]])
        rollout.next_values = torch.where(rollout.truncated, rollout.next_values, following)
        if config.ratio == "token":
            rollout.logps = pad_sequence([a.logps.float() for a in answers], True).unflatten(0, rollout.values.shape)
        if config.kl_coef:
            # Under the SFT policy: the same weights with the adapter off, no second model.
            with self.policy.model.disable_adapter():
                parts = [scores.logp_cot.cpu() for _, scores in self.policy.score(answers, config.microbatch)]
            rollout.sft_logp_cot = torch.cat(parts).reshape(rollout.values.shape)
        totals = gather([len(episodes), *np.reshape(episodes, (-1, 2)).sum(0), illegal])
        count, success, total, illegal = torch.tensor(totals, dtype=torch.float64).sum(0)
        return rollout, {"episodes": int(count), "success_rate": (success / count).item(),
                         "mean_return": (total / count).item(), "illegal_rate": illegal.item() / config.rollout_steps}

    def values(self, images, infos):
        return self.policy.value(images, [prompts.build_prompt(info, self.config.prompt) for info in infos]).cpu()


def reinforce(policy, config, run):
    """PPO on the task reward, from the SFT policy on or from `run`'s checkpoint."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    for p in trainable if RANKS > 1 else ():
        dist.broadcast(p.data, src=0)  # every process begins with the adapter and value head of the first
    optimizer = torch.optim.Adam(trainable, config.lr, eps=config.adam_eps, fused=True)
    collector, first = Collector(policy, config), 0
    if state := run.restore("rl", policy, optimizer):
        first, collector.returns = state["update"], np.array(state["returns"])
        collector.rng.bit_generator.state = state["rng"]
        collector.games.restore(state["games"])

    def checkpoint(update):
        run.checkpoint("rl", config.sft_steps + 1 + update, policy, optimizer, update=update,
                       returns=collector.returns.tolist(), rng=collector.rng.bit_generator.state,
                       games=collector.games.snapshot())

    if not first:
        checkpoint(0)
    steps, updates, began = config.rollout_steps, config.env_steps // config.rollout_steps, time.time()
    with tqdm(desc="PPO", total=updates * steps, initial=first * steps, unit="step", disable=RANK > 0 or None) as bar:
        for update in range(first, updates):
            lr = optimizer.param_groups[0]["lr"] = cosine(update, updates, config.lr, config.lr_end)
            rollout, stats = collector.collect(bar)
            if update == 0 and config.policy == "vlm":
                policy.standardise(rollout.answers, config.microbatch)
                for x in policy.value_head.buffers() if RANKS > 1 else ():
                    dist.broadcast(x, src=0)
            collected, cot_scale = time.time(), config.cot_scale
            if cot_scale == "auto":
                cot_scale = auto_cot_scale([a.logps for a in rollout.answers], [a.action_at for a in rollout.answers])
            stats |= ppo_update(
                policy, optimizer, rollout, cot_scale=cot_scale, gamma=config.gamma, gae_lambda=config.gae_lambda,
                clip=config.clip, value_clip=config.value_clip, epochs=config.epochs, minibatch=config.minibatch,
                microbatch=config.microbatch, value_coef=config.value_coef, max_grad_norm=config.max_grad_norm,
                target_kl=config.target_kl, kl_coef=config.kl_coef)
            run.log(stage="rl", env_steps=(update + 1) * steps, **stats, cot_scale=cot_scale, lr=lr,
                    logp_cot=rollout.logp_cot.mean().item(), logp_action=rollout.logp_action.mean().item(),
                    update_seconds=round(time.time() - collected, 2))
            say("{:6} steps  success {success_rate:6.1%}  return {mean_return:+6.2f}  illegal {illegal_rate:5.1%}  "
                "kl {approx_kl:.4f}  clipped {clipfrac:5.1%}  explained {explained_variance:+.2f}  {:4.0f} s".format(
                    (update + 1) * steps, time.time() - began, **stats))
            checkpoint(update + 1)


# ---------------------------------------------------------------------------------------------------
# Runs on disk


class Refused(Exception):
    """What a user can mend, said in one line; any other exception is a bug and keeps its traceback."""


class Run:
    """A run directory: metrics, checkpoints, one process at a time. Use it as a context manager.

    A checkpoint is one safetensors file: trainable weights and Adam's moments, and in the header, as JSON,
    all the rest. It is written aside, synced and renamed, and its name ends in the SHA-256 of its content: what
    bears such a name is whole, or is found not to be. The last two are kept. Nothing is ever pickled.
    """
    pattern = "checkpoint-*.safetensors"  # of its checkpoints' names: a number that grows, then the digest

    def __init__(self, out, config):
        """Lock the directory, find its newest whole checkpoint. Raises OSError, or Timeout where it is taken."""
        self.out, self.signal, self.began, self.rows = out, 0, time.time(), []
        found = [None, {"stage": None, "metrics": 0}]  # the checkpoint's file and state
        if RANK == 0:  # the others write nothing
            out.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(out / ".lock")  # the system lets go of it when the process dies
            self.lock.acquire(timeout=0)
            for file in sorted(out.glob(self.pattern), reverse=True):
                if hashlib.sha256(file.read_bytes()).hexdigest()[:16] == file.stem.split("-")[-1]:
                    with safe_open(file, "pt") as header:
                        found = [file, json.loads(header.metadata()["state"])]
                    break
                print(f"{file} is damaged: kept as {file.name}.broken, trying the one before", file=sys.stderr)
                file.rename(f"{file}.broken")
            (out / "config.tmp").write_text(json.dumps(vars(config), indent=1))
            (out / "config.tmp").replace(out / "config.json")
            self.track = tracker(config, out)
            self.metrics = open(out / "metrics.jsonl", "ab", buffering=0)
            self.metrics.truncate(found[1]["metrics"])  # what came after the checkpoint will come again
            self.metrics.seek(0, os.SEEK_END)  # truncating leaves `tell` where it was
            self.rows = read_metrics(out)
            self.began -= self.rows[-1]["seconds"] if self.rows else 0
        self.file, self.state = gather(found)[0]

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if RANK:
            return
        (self.out / "checkpoint.tmp").unlink(missing_ok=True)  # half a checkpoint, where the disk was full
        self.metrics.close()
        self.lock.release()
        if kind:  # stopped, by a signal or an error
            program = "python" if RANKS == 1 else "torchrun ..."
            print(f"go on with: {program} train.py --resume {self.out}", file=sys.stderr)

    def _on_signal(self, number, frame):
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number
        print("\nstopping at the next checkpoint (once more: at once)", file=sys.stderr)

    def log(self, **row):
        """Add a line to metrics.jsonl."""
        if RANK == 0:
            row["seconds"] = round(time.time() - self.began, 2)
            self.rows.append({key: None if value != value else round(value, 6) if isinstance(value, float) else value
                              for key, value in row.items()})  # JSON has no NaN
            self.metrics.write(json.dumps(self.rows[-1]).encode() + b"\n")
            self.track({f"{row.get('policy', row['stage'])}/{key}": value for key, value in self.rows[-1].items()
                        if isinstance(value, (int, float))}, row.get("env_steps", row.get("step", 0)))

    def checkpoint(self, stage, index, policy, optimizer, **state):
        """Save all that `restore` needs, under a number `index` that grows; stops the run if a signal asked for it."""
        trained = {name for name, p in policy.named_parameters() if p.requires_grad}
        tensors = {f"policy.{name}": x for name, x in policy.state_dict().items()
                   if name in trained or "value_head" in name}
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": x for key, x in moments.items()}
        state["torch_rng"] = [source.get_rng_state().tolist() for source in RANDOM]
        everyone = gather((self.signal, state))
        if RANK == 0:
            header = {"stage": stage, "metrics": self.metrics.tell(), "ranks": [state for _, state in everyone]}
            content, scratch = serialize(tensors, {"state": json.dumps(header)}), self.out / "checkpoint.tmp"
            with scratch.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            name = f"checkpoint-{index:07}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
            scratch.rename(self.out / name)
            for old in sorted(self.out.glob(self.pattern))[:-2]:
                old.unlink()
        if stop := max(signal for signal, _ in everyone):
            raise SystemExit(128 + stop)

    def restore(self, stage, policy, optimizer):
        """Load the checkpoint that was found and return what `checkpoint` was given; None if it is of another stage."""
        if self.state["stage"] != stage:
            return None
        if len(self.state["ranks"]) != RANKS:
            raise Refused(f"the run had {len(self.state['ranks'])} processes, not {RANKS}")
        state, tensors, moments = self.state["ranks"][RANK], load_file(self.file), {}
        if len(state.get("torch_rng", ())) != len(RANDOM):
            raise Refused(f"{self.file} is of another version of this code, or of a machine with other devices")
        for key in [key for key in tensors if key.startswith("optimizer.")]:
            _, i, name = key.split(".")
            moments.setdefault(int(i), {})[name] = tensors.pop(key)
        policy.load_state_dict({key.removeprefix("policy."): x for key, x in tensors.items()}, strict=False)
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        for source, kept in zip(RANDOM, state["torch_rng"]):
            source.set_rng_state(torch.tensor(kept, dtype=torch.uint8))
        return state


def read_metrics(directory):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def tracker(config, out):
    """A function that sends numbers, a dict, of a step to where --track says."""
    kind = getattr(config, "track", None)
    if kind and not find_spec(kind):
        raise Refused(f"--track {kind} needs a package: pip install {kind}")
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(out)
        return lambda numbers, step: [board.add_scalar(name, value, step) for name, value in numbers.items()]
    if kind == "wandb":
        import wandb
        board = wandb.init(project="vlm-agents", name=out.name, dir=out, config=vars(config))
        return lambda numbers, step: board.log(numbers | {"env_steps": step})
    return lambda numbers, step: None


def sft_cache(config, out):
    """Where its SFT weights are kept: the name is a digest of every setting and line of code that they depend on."""
    names = ["env", "model", "prompt", "obs", "seed", "dtype", "device", "image_tiles", "quantize", "alfworld"]
    names += [*SETTINGS["SFT"], *(("lora_rank", "lora_alpha") if config.sft_lora else ())]
    settings = [getattr(config, name) for name in names] + [RANKS, os.environ.get("ALFWORLD_DATA")]
    files = [(Path(__file__).parent / name).read_bytes() for name in ("env.py", "prompts.py", "policy.py")]
    content = b"".join([json.dumps(settings).encode(), inspect.getsource(sft).encode(), *files])
    return out.parent / "sft-cache" / f"{config.env}-{hashlib.sha256(content).hexdigest()[:12]}"


def build_policy(config, weights=None):
    """A fresh policy for `config`, with the SFT weights, or merged SFT adapter, of the folder `weights` if given.

    Chooses ALFWorld's engine, too. Raises OSError or ValueError where a task or the model cannot be made.
    """
    gc.collect()  # of a model before, which its own hooks refer to
    env.GAMES["alfworld"] = env.ALFWorldThorEnv if config.alfworld == "thor" else env.ALFWorldEnv
    names, texts = config.env.split(","), None
    for name in names:
        env.GAMES[name]()  # raises ValueError where its engine or its data is missing
    torch.manual_seed(config.seed)
    if config.policy == "cnn":
        return CNNPolicy(env.GAMES[config.env].actions, config.temperature).to(config.device)
    adapter = weights and (weights / "adapter_config.json").exists()
    source = config.model if adapter or not weights else str(weights)
    if source == "tiny":  # what its tokenizer learns from
        names = prompts.CARD_TASKS if {*names} <= {*prompts.CARD_TASKS} else names
        texts = prompts.corpus(names, config.prompt, config.obs)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if config.device == "cuda" else config.device
    model = load_model(source, config.seed, texts, config.image_tiles, device, getattr(torch, config.dtype),
                       config.quantize, config.trust_remote_code)
    policy = VLMPolicy(*model, config.temperature, config.max_new_tokens)
    if adapter:
        tuned = PeftModel.from_pretrained(policy.model, str(weights), torch_device=device)
        policy.model = tuned.merge_and_unload().eval()
    if config.gradient_checkpointing:
        policy.checkpoint_gradients()
    return policy


def memory_plan(policy, config):
    """Expected peak in GB (10^9 bytes) of the model's device, and its parts as a dict."""
    if config.policy == "cnn":
        return 0.2, {"CNN": 0.2}
    games = env.Games(config.env, config.env.count(",") + 1, 0, config.obs)
    inputs = policy.encode(games.images, [prompts.build_prompt(info, config.prompt) for info in games.infos])
    tokens = max(x["input_ids"].shape[1] for x in inputs) + config.max_new_tokens
    model, text, size = policy.model, policy.model.config.get_text_config(), policy.model.dtype.itemsize
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    trained = config.lora_rank * sum(module.in_features + module.out_features for module in linear)
    if not config.sft_lora:  # SFT trains every weight
        trained = max(trained, model.num_parameters())
    layers, heads = text.num_hidden_layers, text.num_key_value_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Measured in bfloat16: a layer of width D keeps 36 D values a token (CLIP's 30), with checkpoints its input alone;
    # the backward pass of one layer needs 24 D beside them, reading prompts 36 D. The float32 logits are there thrice.
    kept, seen = 60 + layers, 0
    if not config.gradient_checkpointing:
        eyes = getattr(model.config, "vision_config", None)
        pixels, patch = inputs[0]["pixel_values"].numel() / 3, np.ravel(getattr(eyes, "patch_size", 14))[0]
        depth = getattr(eyes, "num_hidden_layers", None) or getattr(eyes, "depth", 24)
        kept, seen = 24 + 36 * layers, pixels / patch ** 2 * getattr(eyes, "hidden_size", 1024) * 30 * depth
    activations = (tokens * text.hidden_size * kept + seen) * size + config.max_new_tokens * text.vocab_size * 12
    reading = tokens * size * (layers * heads * head_size * 2 + 36 * text.hidden_size)
    # In float32 the adapter is added to a copy of the weights.
    merged = 4 * sum(module.weight.numel() for module in linear) if model.dtype == torch.float32 else 0
    parts = {"weights": model.get_memory_footprint() + merged, "adapter and optimiser": 16 * trained,
             "KV cache and prompts": config.num_envs * reading, "activations": config.microbatch * activations}
    weights, adapter, *turns = parts.values()  # sampling and training take turns, so only the larger of the two counts
    return (weights + adapter + max(turns)) / 1e9, {name: count / 1e9 for name, count in parts.items()}


def load_run(directory, which="rl", trust_remote_code=False):
    """(policy, configuration) of a finished run; which: "rl", "sft" for the policy before PPO, or "untrained".

    Raises OSError, ValueError, KeyError or TypeError where the directory holds no finished run.
    """
    config = read_config(directory, trust_remote_code)
    if which == "sft" and config.policy == "cnn":
        raise ValueError("a CNN has no SFT")
    policy = build_policy(config, directory / "sft" if which != "untrained" else None)
    if which == "rl":
        policy.load(directory)
    return policy, config


# ---------------------------------------------------------------------------------------------------
# Results


def summary(rows, task):
    """What figures and tables want of a run's `rows`: its evaluations on `task`, by policy, and its learning curve."""
    return {row["policy"]: row for row in rows if row.get("env") == task} | {
        "task": task, "curve": [[row["env_steps"], row["success_rate"]] for row in rows if row["stage"] == "rl"]}


REFERENCES = {"random": "#9a9a9a", "SFT": "#c8802e", "RL": "#c8102e", "CNN + RL": "#c8102e", "expert": "#1f6f54"}


def plot(runs):
    """A matplotlib figure: for each task every setting's mean curve, a band from the lowest seed to the highest, and
    dashed lines for other policies. runs: name of a setting -> `summary` of each seed; a run is a sweep of one seed.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(seeds[0]["task"] for seeds in runs.values()))
    columns, rows = min(len(tasks), 2), (len(tasks) + 1) // 2
    figure = Figure(figsize=(6 * columns, 4 * rows), layout="constrained")
    for place, task in enumerate(tasks, 1):
        axes = figure.add_subplot(rows, columns, place)
        mine = {name: seeds for name, seeds in runs.items() if seeds[0]["task"] == task}
        for name, seeds in mine.items():
            steps = [step for step, _ in seeds[0]["curve"]]
            rates = np.array([[rate for _, rate in run["curve"]] for run in seeds], float)  # NaN: no episode ended
            line, = axes.plot(steps, rates.mean(0), ".-", label=name.removeprefix(f"{task}, "))
            axes.fill_between(steps, rates.min(0), rates.max(0), color=line.get_color(), alpha=0.15, lw=0)
        for name, color in REFERENCES.items():
            rates = [run[name]["success_rate"] for seeds in mine.values() for run in seeds if name in run]
            if rates and (len(mine) == 1 or name in ("random", "expert")):  # the others differ from setting to setting
                axes.axhline(np.mean(rates), ls="--", lw=1.2, color=color, label=f"{name} {np.mean(rates):.1%}")
        if task in BOUNDS:
            axes.axhline(BOUNDS[task], ls=":", lw=1.2, color="black", label=f"best possible {BOUNDS[task]:.2%}")
        axes.set(title=task, xlabel="environment steps", ylabel="success rate", ylim=(0, None), xlim=(0, None))
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def sweep(argv):
    """An experiment: runs that differ in one flag, each with several seeds, then a table and a plot of all.

    Runs that are there are reused and runs that stopped go on, so the same line resumes the experiment.
    """
    parser = make_parser()
    given = parser.parse_args(argv)
    if "out" not in given:
        parser.error("--sweep needs --out")
    quick = "--sft-steps 20 --env-steps 512 --rollout-steps 512 --eval-episodes 50".split() if "quick" in given else []
    axes = [axis.partition("=") for axis in given.sweep]
    settings = [(flag, value) for flag, _, values in axes for value in values.split(",")]
    seeds, runs = getattr(given, "seeds", "0"), {}  # runs: name of a setting -> `summary` of each seed
    for (flag, value), seed in itertools.product(settings, seeds.split(",")):
        folder = given.out / f"{flag}-{value}-seed{seed}"
        _, config, _ = parse_args([*quick, *argv, f"--{flag}", value, "--seed", seed])
        if (folder / "config.json").exists() and read_config(folder, config.trust_remote_code) != config:
            parser.error(f"{folder} has other settings: choose another --out")
        if not (folder / "curve.png").exists():
            launch(parser, config, folder)
        if RANK:
            continue  # the first process alone has results
        for task in config.env.split(","):
            name = task if flag == "env" else f"{task}, {flag} {value}"
            runs.setdefault(name, []).append(summary(read_metrics(folder), task))
    if RANK:
        return
    players = [name for name in REFERENCES if any(name in run for summaries in runs.values() for run in summaries)]
    text = f"| | {' | '.join(players)} | RL: illegal | paper, 7B, other pictures |\n{'|---' * (len(players) + 3)}|\n"
    for name, summaries in runs.items():
        cells = [name]
        for player in players:
            rates = [100 * run[player]["success_rate"] for run in summaries if player in run]
            cells.append(f"{np.mean(rates):.1f} % ({', '.join(f'{rate:.1f}' for rate in rates)})" if rates else "")
        illegal = np.mean([run.get("RL", run.get("CNN + RL"))["illegal_rate"] for run in summaries])
        cells += [f"{100 * illegal:.1f} %", PUBLISHED.get(summaries[0]["task"], "")]
        text += f"| {' | '.join(cells)} |\n"
    text += (f"\nSuccess on {config.eval_episodes} episodes, mean of seeds {seeds} (in brackets each).\n"
             f"`python train.py {' '.join(argv)}`\n")
    (given.out / "table.md").write_text(text)
    (given.out / "table.json").write_text(json.dumps(runs, indent=1))
    plot(runs).savefig(given.out / "curves.png", dpi=110)
    print(f"{text}{given.out / 'curves.png'}")


def say(text):
    """Print a line above the progress bars, once, however many processes there are."""
    if RANK == 0:
        tqdm.write(text, file=sys.stdout)


def pretrain(policy, config, run, weights):
    """SFT, or nothing where `policy` has its `weights` already; leaves them in the cache and in the run's directory."""
    cached = sft_cache(config, run.out)
    if not weights:
        if config.sft_lora:
            policy.add_lora(config.lora_rank, config.lora_alpha)
        sft(policy, config, run)
        if RANK == 0:
            scratch = Path(f"{cached}.{os.getpid()}")
            policy.model.save_pretrained(scratch)  # the adapter alone, where there is one
            policy.processor.save_pretrained(scratch)
            scratch.rename(cached) if not cached.exists() else shutil.rmtree(scratch)
        if config.sft_lora:
            policy.model = policy.model.merge_and_unload().eval()
    elif weights == cached:
        say(f"SFT: weights reused from {cached}")
    if RANK == 0 and not (run.out / "sft").exists():
        shutil.copytree(cached, run.out / "sft.tmp", dirs_exist_ok=True)
        (run.out / "sft.tmp").rename(run.out / "sft")


def train(policy, config, run, weights):
    """Both stages and the evaluations; `weights` is the folder of the SFT weights that `policy` has, if any.

    Returns the evaluations, task -> policy name -> row of metrics.jsonl (None in all processes but the first).
    """
    names, language = config.env.split(","), config.policy == "vlm"

    def assess(name, agent=None):
        for task in names if RANK == 0 else ():  # the others wait at the next gather
            player = agent or model_agent(policy, np.random.default_rng(config.seed), config.prompt)
            run.log(stage="eval", policy=name, env=task, **evaluate(
                player, task, config.eval_episodes, config.seed, config.num_envs, config.obs, f"evaluating {name}"))
            if run.signal:
                raise SystemExit(128 + run.signal)

    if language:
        pretrain(policy, config, run, weights)
    if run.state["stage"] != "rl":
        torch.manual_seed(config.seed + OWN_SEEDS)  # cached SFT weights or not: the same from here on
        assess("random", random_agent(np.random.default_rng(config.seed)))
        if language:
            assess("SFT")
            rates = [f"{row['success_rate']:.1%}" for row in run.rows if row.get("policy") == "SFT"]
            say(f"SFT: success {', '.join(rates)} after {time.time() - run.began:.0f} s")
    if language:
        policy.add_lora(config.lora_rank, config.lora_alpha)
    reinforce(policy, config, run)
    if RANK == 0:
        policy.save(run.out)
    assess("RL" if language else "CNN + RL")
    assess("expert", expert_agent)
    gather(None)  # torchrun gives up a machine whose processes ended five minutes ago, and the run with it
    if RANK:
        return None
    results = {task: {row["policy"]: row for row in run.rows if row.get("env") == task} for task in names}
    figure = plot({"RL, training episodes": [summary(run.rows, config.env)]})
    figure.savefig(run.out / "curve.tmp", dpi=110, format="png")
    (run.out / "curve.tmp").rename(run.out / "curve.png")  # marks the run as finished
    for file in run.out.glob(run.pattern):
        file.unlink()
    print(f"\n{config.env}, CoT scale {config.cot_scale}, seed {config.seed}, {run.rows[-1]['seconds']:.0f} s")
    for task, rows in results.items():
        print(f"\n{task}\n" * (len(results) > 1) + table(rows))
    print(f"\nrun: {run.out} (learning curve: {run.out / 'curve.png'})")
    return results


def launch(parser, config, out):
    """Train in the directory `out`, or go on there; what a user can mend ends in one line and exit code 2."""
    if (out / "curve.png").exists():
        parser.error(f"{out} holds a finished run: begin a new one with another --out")
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # whose random state checkpoints keep
        # Adapter and head are float32 beside bfloat16: products with 11 bits are five times as fast, and exact enough.
        torch.set_float32_matmul_precision("high" if config.dtype == "bfloat16" else "highest")
    if RANKS > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # rollouts are gathered on the CPU
        dist.init_process_group(backend, timeout=timedelta(hours=12))
        atexit.register(dist.destroy_process_group)  # a process that ends with its threads running may abort
    # The first process looks: another might not see the same.
    weights = gather(next((folder for folder in (out / "sft", sft_cache(config, out)) if folder.exists()), None))[0]
    advice = ("try --quantize 4bit, --gradient-checkpointing, a smaller --microbatch, --num-envs, --lora-rank "
              "or --max-new-tokens")
    try:
        try:
            policy = build_policy(config, weights)
        except (OSError, ValueError) as error:
            raise Refused(f"cannot play --env {config.env} with --model {weights or config.model}: {error}") from None
        needed, parts = memory_plan(policy, config)
        there = torch.cuda.mem_get_info()[1] if config.device == "cuda" else psutil.virtual_memory().total
        if needed > there / 1e9:
            parser.error(f"{needed:.0f} GB do not fit into the {there / 1e9:.0f} of {config.device}: {advice}")
        with Run(out, config) as run:
            if run.state["stage"] == "rl" and not weights and config.policy == "vlm":
                raise Refused(f"{out / 'sft'} is missing")
            name = config.model if config.policy == "vlm" else "CNN"
            count = sum(p.numel() for key, p in policy.named_parameters() if "value" not in key) / 1e6
            place = f"{config.device}, {config.dtype}" + f", {RANKS} processes" * (RANKS > 1)
            say(f"{config.env}: {name} ({count:.1f} M parameters) on {place}; into {out}")
            say(f"memory expected: {needed:.1f} GB ({', '.join(f'{part} {gb:.1f}' for part, gb in parts.items())})")
            return train(policy, config, run, weights)
    except Timeout:
        parser.error(f"another process is training in {out}")
    except OSError as error:
        parser.error(f"{error.filename or out}: {error.strerror or error}")
    except (Refused, SafetensorError) as error:
        parser.error(str(error).splitlines()[0])
    except torch.OutOfMemoryError:
        parser.error(f"out of memory: {advice}")
    except RuntimeError as error:
        if RANKS == 1 or not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        parser.error(f"process {RANK}: another one died, which ends the run ({str(error).splitlines()[0]})")
    except FloatingPointError as error:
        parser.error(f"{error}; the checkpoint before is whole: try a smaller --lr or --max-grad-norm in a new run")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    return sweep(argv) if "sweep" in make_parser().parse_args(argv) else launch(*parse_args(argv))


if __name__ == "__main__":
    main()
