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
import hashlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import env
import prompts
from eval import evaluate, expert_agent, model_agent, random_agent, table
from policy import VLMPolicy, load_model
from ppo import Rollout, ppo_update

# The authors' settings and those of the embedded model, then what a task changes.
PRESETS = {
    "paper": dict(
        cot_scale=0.5, env_steps=15000, num_envs=16, rollout_steps=512, epochs=4, minibatch=128, microbatch=1, lr=1e-5,
        lr_end=1e-9, adam_eps=1e-7, target_kl=None, clip=0.1, value_clip=0.1, value_coef=0.5, max_grad_norm=0.01, gamma=0.9, gae_lambda=0.95,
        temperature=0.2, max_new_tokens=256, lora_rank=128, lora_alpha=256,
        sft_steps=1000, sft_batch=128, sft_lr=2e-5, demo_noise=0.5),
    "tiny": dict(
        cot_scale=0.3, env_steps=15360, num_envs=64, rollout_steps=512, epochs=4, minibatch=64, microbatch=64, lr=1.5e-4,
        lr_end=1.5e-5, adam_eps=1e-7, target_kl=0.02, clip=0.1, value_clip=1.0, value_coef=0.5, max_grad_norm=0.5, gamma=0.9, gae_lambda=0.95,
        temperature=0.5, max_new_tokens=96, lora_rank=16, lora_alpha=32,
        sft_steps=400, sft_batch=32, sft_lr=1e-3, demo_noise=0.75),
}
TASK_PRESETS = {
    ("tiny", "numberline"): dict(env_steps=6144),
    ("tiny", "blackjack"): dict(demo_noise=0.9, sft_steps=800),
    ("tiny", "points24"): dict(demo_noise=0.6, sft_steps=3000, sft_batch=64),
    ("paper", "ezpoints"): dict(rollout_steps=1024),
    ("paper", "points24"): dict(rollout_steps=1024),
}


# ---------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    parser = env.Parser(description=__doc__.split("\n\n")[0])
    rate = lambda text: _within(text, 0, 1)  # noqa: E731
    size = env.positive_int

    group = parser.add_argument_group("what to train")
    group.add_argument("--env", required=True, choices=env.GAMES, help="the task")
    group.add_argument("--model", default="tiny", help="tiny (built in), a model of the hub, or a folder")
    group.add_argument("--cot-scale", type=rate, help="lambda in [0, 1]: weight of the thoughts' log-probability")
    group.add_argument("--preset", choices=PRESETS, help="settings behind the flags left out (default: tiny for tiny, else paper)")
    group.add_argument("--seed", type=env.natural_int, default=0, help="fixes the run")
    group.add_argument("--out", type=Path, help="run directory (default: a new one under runs/)")
    group.add_argument("--eval-episodes", type=size, default=1000, help="episodes of the evaluations at the end")

    group = parser.add_argument_group("rollout")
    group.add_argument("--env-steps", type=size, help="environment steps in all")
    group.add_argument("--num-envs", type=size, help="environments played at a time")
    group.add_argument("--rollout-steps", type=size, help="environment steps an update, over all environments")
    group.add_argument("--temperature", type=_positive, help="of sampling and of all log-probabilities")
    group.add_argument("--max-new-tokens", type=size, help="longest answer")

    group = parser.add_argument_group("PPO")
    group.add_argument("--epochs", type=size, help="passes over a rollout")
    group.add_argument("--minibatch", type=size, help="environment steps an optimiser step")
    group.add_argument("--microbatch", type=size, help="environment steps a forward pass; smaller needs less memory")
    group.add_argument("--lr", type=_positive, help="learning rate at the start, cosine from there")
    group.add_argument("--lr-end", type=_positive, help="learning rate at the end")
    group.add_argument("--adam-eps", type=_positive, help="epsilon of Adam")
    group.add_argument("--clip", type=_positive, help="range of the probability ratio: 1 - clip to 1 + clip")
    group.add_argument("--value-clip", type=_positive, help="how far a value may move in an update, in units of return")
    group.add_argument("--value-coef", type=_positive, help="weight of the value loss")
    group.add_argument("--max-grad-norm", type=_positive, help="gradient clipping")
    group.add_argument("--target-kl", type=_positive, help="end an update early past 1.5 times this approx_kl")
    group.add_argument("--gamma", type=rate, help="discount")
    group.add_argument("--gae-lambda", type=rate, help="lambda of generalised advantage estimation")
    group.add_argument("--lora-rank", type=size, help="rank of the adapter")
    group.add_argument("--lora-alpha", type=size, help="scale of the adapter, over its rank")

    group = parser.add_argument_group("SFT")
    group.add_argument("--sft-steps", type=size, help="optimiser steps")
    group.add_argument("--sft-batch", type=size, help="demonstrations a step")
    group.add_argument("--sft-lr", type=_positive, help="learning rate, cosine with 3 %% warm-up")
    group.add_argument("--demo-noise", type=rate, help="share of the demonstrated actions that are random")
    args = parser.parse_args(argv)

    preset = args.preset or ("tiny" if args.model == "tiny" else "paper")
    defaults = PRESETS[preset] | TASK_PRESETS.get((preset, args.env), {})
    config = defaults | {key: value for key, value in vars(args).items() if value is not None and key != "preset"}
    config = argparse.Namespace(**config, preset=preset)
    if config.rollout_steps % config.num_envs:
        parser.error(f"--rollout-steps {config.rollout_steps} is not a multiple of --num-envs {config.num_envs}")
    if config.env_steps < config.rollout_steps:
        parser.error(f"--env-steps {config.env_steps} is less than one rollout of --rollout-steps {config.rollout_steps}")
    return parser, config


def _within(text, low, high):
    if not low <= float(text) <= high:  # NaN fails this, too
        raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
    return float(text)


def _positive(text):
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return float(text)


_within.__name__ = _positive.__name__ = "number"  # argparse shows it: "invalid number value: 'x'"


# ---------------------------------------------------------------------------------------------------
# Stage 1: supervised fine-tuning


def cosine(step, steps, start, end):
    """Learning rate at `step` of `steps` on a half cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def sft(policy, config, log):
    """Train all weights on demonstrations: maximise log p(v_out | o, v_in), averaged over tokens."""
    name, n = config.env, config.sft_batch
    rng = np.random.default_rng(config.seed)
    games = env.make_vector_env(name, n)
    images, infos = games.reset(seed=config.seed)
    infos = env.split_info(infos, range(n))
    optimizer = torch.optim.AdamW(policy.model.parameters(), config.sft_lr, weight_decay=0.0)
    policy.temperature = 1.0  # likelihood as it is; only sampling is sharpened
    bar = tqdm(range(config.sft_steps), desc="SFT", unit="step", disable=None)
    for step in bar:
        warmup = min(1.0, (step + 1) / (0.03 * config.sft_steps))
        optimizer.param_groups[0]["lr"] = warmup * cosine(step, config.sft_steps, config.sft_lr, 0)
        noisy = rng.random(n) < config.demo_noise
        actions = [str(rng.choice(info["legal_actions"])) if noise else env.expert_action(name, info)
                   for noise, info in zip(noisy, infos)]
        answers = policy.demonstrate(images, [prompts.build_prompt(name, info) for info in infos],
                                     [prompts.demonstration(name, *pair) for pair in zip(infos, actions)])
        scores = policy.evaluate(answers)
        loss = -(scores.logp_cot + scores.logp_action).sum() / sum(len(answer.tokens) for answer in answers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Half of the slips are not played, so that good states are seen as often as spoilt ones.
        played = [action if slip else env.expert_action(name, info)
                  for slip, action, info in zip(rng.random(n) < 0.5, actions, infos)]
        images, infos, _ = play(games, infos, played)
        if (step + 1) % 50 == 0 or step + 1 == config.sft_steps:
            bar.set_postfix(loss=f"{loss.item():.3f}")
            log(stage="sft", step=step + 1, loss=loss.item(), lr=optimizer.param_groups[0]["lr"])
    policy.temperature = config.temperature


def play(games, infos, actions):
    """Step every environment by a text action and begin a new episode where one ended.

    Returns (images, infos) to act on next and a dict of what the step gave: rewards, terminated, truncated (N,),
    images and infos before the reset.
    """
    n = len(actions)
    indices = np.array([info["legal_actions"].index(action) for info, action in zip(infos, actions)])
    images, rewards, terminated, truncated, step_infos = games.step(indices)
    infos = env.split_info(step_infos, range(n))
    step = {"rewards": rewards, "terminated": terminated, "truncated": truncated, "images": images, "infos": list(infos)}
    over = terminated | truncated
    if over.any():
        images, reset_infos = games.reset(options={"reset_mask": over})
        for i, info in zip(np.flatnonzero(over), env.split_info(reset_infos, np.flatnonzero(over))):
            infos[i] = info
    return images, infos, step


# ---------------------------------------------------------------------------------------------------
# Stage 2: reinforcement learning


class Collector:
    """Plays the policy in `num_envs` environments, which go on from one rollout to the next."""

    def __init__(self, policy, config):
        self.policy, self.config = policy, config
        self.rng = np.random.default_rng(config.seed)
        self.games = env.make_vector_env(config.env, config.num_envs)
        images, infos = self.games.reset(seed=1000 + config.seed * config.num_envs)
        self.images, self.infos = images, env.split_info(infos, range(config.num_envs))
        self.returns = np.zeros(config.num_envs)

    def collect(self, bar):
        """One `Rollout` of rollout_steps, and its statistics: success_rate, mean_return, illegal_rate."""
        name, n = self.config.env, self.config.num_envs
        steps = self.config.rollout_steps // n
        answers, rows, illegal, episodes = [], [], 0, []
        next_values = torch.zeros(steps, n)
        for t in range(steps):
            batch = self.policy.act(self.images, [prompts.build_prompt(name, info) for info in self.infos])
            parsed = [prompts.parse_action(answer.text, info["legal_actions"], self.rng)
                      for answer, info in zip(batch, self.infos)]
            illegal += sum(not was_legal for _, was_legal in parsed)
            self.images, self.infos, step = play(self.games, self.infos, [action for action, _ in parsed])
            answers += batch
            rows.append(([a.logp_cot for a in batch], [a.logp_action for a in batch], [a.value for a in batch],
                         step["rewards"], step["terminated"], step["truncated"]))
            cut = np.flatnonzero(step["truncated"] & ~step["terminated"])
            if len(cut):
                next_values[t, cut] = self.values(step["images"][cut], [step["infos"][i] for i in cut])
            self.returns += step["rewards"]
            for i in np.flatnonzero(step["terminated"] | step["truncated"]):
                episodes.append((step["infos"][i]["success"], self.returns[i]))
                self.returns[i] = 0
            bar.update(n)
            if episodes:
                bar.set_postfix(success=f"{np.mean([success for success, _ in episodes]):.1%}")
        tensors = [torch.tensor(np.array(column)) for column in zip(*rows)]
        logp_cot, logp_action, values, rewards = (x.float() for x in tensors[:4])
        terminated, truncated = tensors[4:]
        following = torch.cat([values[1:], self.values(self.images, self.infos)[None]])
        next_values = torch.where(truncated, next_values, following)
        success, returns = zip(*episodes) if episodes else ([math.nan], [math.nan])
        return (Rollout(answers, logp_cot, logp_action, values, next_values, rewards, terminated, truncated),
                {"episodes": len(episodes), "success_rate": float(np.mean(success)),
                 "mean_return": float(np.mean(returns)), "illegal_rate": illegal / (steps * n)})

    def values(self, images, infos):
        return self.policy.value(images, [prompts.build_prompt(self.config.env, info) for info in infos]).cpu()


def reinforce(policy, config, log):
    """PPO on the task reward, from the SFT policy on."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, config.lr, eps=config.adam_eps)
    shuffling = torch.Generator().manual_seed(config.seed)
    collector = Collector(policy, config)
    updates, began = config.env_steps // config.rollout_steps, time.time()
    with tqdm(total=updates * config.rollout_steps, desc="PPO", unit="step", disable=None) as bar:
        for update in range(updates):
            optimizer.param_groups[0]["lr"] = cosine(update, updates, config.lr, config.lr_end)
            rollout, stats = collector.collect(bar)
            collected = time.time()
            stats |= ppo_update(
                policy, optimizer, rollout, cot_scale=config.cot_scale, gamma=config.gamma, gae_lambda=config.gae_lambda,
                clip=config.clip, value_clip=config.value_clip, epochs=config.epochs, minibatch=config.minibatch,
                microbatch=config.microbatch, value_coef=config.value_coef, max_grad_norm=config.max_grad_norm,
                target_kl=config.target_kl, generator=shuffling)
            steps = (update + 1) * config.rollout_steps
            log(stage="rl", env_steps=steps, **stats, lr=optimizer.param_groups[0]["lr"],
                logp_cot=rollout.logp_cot.mean().item(), logp_action=rollout.logp_action.mean().item(),
                update_seconds=round(time.time() - collected, 2))
            bar.write(f"{steps:6} steps  success {stats['success_rate']:6.1%}  return {stats['mean_return']:+6.2f}  "
                      f"illegal {stats['illegal_rate']:5.1%}  kl {stats['approx_kl']:.4f}  clipped {stats['clipfrac']:5.1%}  "
                      f"explained {stats['explained_variance']:+.2f}  {time.time() - began:4.0f} s", file=sys.stdout)


# ---------------------------------------------------------------------------------------------------
# Runs on disk


def sft_key(config):
    """Name of the SFT weights in the cache: a digest of every setting and every line of code they depend on."""
    settings = {key: value for key, value in vars(config).items()
                if key in ("env", "model", "seed", "sft_steps", "sft_batch", "sft_lr", "demo_noise", "temperature")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in ("env.py", "prompts.py", "policy.py"):
        digest.update((Path(__file__).parent / file).read_bytes())
    return f"{config.env}-{digest.hexdigest()[:12]}"


def build_policy(config, model=None):
    """A fresh policy for `config`, its weights from the folder `model` where one is given."""
    torch.manual_seed(config.seed)
    return VLMPolicy(*load_model(str(model or config.model), config.seed), temperature=config.temperature,
                     max_new_tokens=config.max_new_tokens)


def load_run(directory, which="rl"):
    """(policy, config dict) of a finished run; which: "rl", or "sft" for the policy before PPO.

    Raises OSError or ValueError where the directory holds no finished run.
    """
    config = json.loads((directory / "config.json").read_text())
    policy = build_policy(argparse.Namespace(**config), directory / "sft")
    if which == "rl":
        policy.load(directory)
    return policy, config


def plot(rows, references, path):
    """The learning curve of metrics.jsonl's `rows`, with horizontal lines for the other policies' success rates."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rl = [row for row in rows if row["stage"] == "rl"]
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.plot([row["env_steps"] for row in rl], [100 * row["success_rate"] for row in rl], color="#28518f", label="RL, training episodes")
    for (name, result), color in zip(references.items(), ("#9a9a9a", "#c8802e", "#c8102e", "#1f6f54")):
        axes.axhline(100 * result["success_rate"], ls="--", lw=1.2, color=color, label=f"{name} {result['success_rate']:.1%}")
    axes.set(xlabel="environment steps", ylabel="success rate (%)", ylim=(0, None), xlim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    parser, config = parse_args(argv)
    out = config.out or Path("runs") / f"{config.env}-{time.strftime('%Y%m%d-%H%M%S')}"
    config.out = str(out)
    if (out / "config.json").exists():
        parser.error(f"{out} already holds a run: choose another --out")
    cached = out.parent / "sft-cache" / sft_key(config)
    try:
        policy = build_policy(config, cached if cached.exists() else None)
    except (OSError, ValueError) as error:
        parser.error(f"cannot load --model {config.model}: {str(error).splitlines()[0]}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(vars(config), indent=1))
    except OSError as error:
        parser.error(f"cannot write to {out}: {error.strerror}")
    began, metrics, rows = time.time(), (out / "metrics.jsonl").open("w"), []

    def log(**row):
        row = {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
        rows.append(row | {"seconds": round(time.time() - began, 2)})
        metrics.write(json.dumps(rows[-1]) + "\n")
        metrics.flush()

    if cached.exists():
        print(f"SFT: weights reused from {cached}")
    else:
        sft(policy, config, log)
        scratch = Path(f"{cached}.{os.getpid()}")
        policy.model.save_pretrained(scratch)
        policy.processor.save_pretrained(scratch)
        scratch.rename(cached) if not cached.exists() else shutil.rmtree(scratch)
    shutil.copytree(cached, out / "sft")

    def assess(name, agent):
        results[name] = evaluate(agent, config.env, config.eval_episodes, config.seed, config.num_envs, f"evaluating {name}")
        log(stage="eval", policy=name, **results[name])

    results = {}
    torch.manual_seed(config.seed)  # from here on a run with cached SFT weights is the same as one without
    assess("random", random_agent(np.random.default_rng(config.seed)))
    assess("SFT", model_agent(policy, config.env, np.random.default_rng(config.seed)))
    print(f"SFT: success {results['SFT']['success_rate']:.1%} after {time.time() - began:.0f} s")
    policy.add_lora(config.lora_rank, config.lora_alpha)
    reinforce(policy, config, log)
    policy.save(out)
    assess("RL", model_agent(policy, config.env, np.random.default_rng(config.seed)))
    assess("expert", expert_agent(config.env))
    plot(rows, results, out / "curve.png")
    print(f"\n{config.env}, CoT scale {config.cot_scale}, seed {config.seed}, {time.time() - began:.0f} s\n{table(results)}\n"
          f"\nrun: {out} (learning curve: {out / 'curve.png'})")
    return results


if __name__ == "__main__":
    main()
