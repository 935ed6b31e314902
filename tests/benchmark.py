"""How fast: ours, the paper's schedule, and what the hardware allows, measured in one run.

    python tests/benchmark.py                                  # the embedded model on this machine
    python tests/benchmark.py --model DIR --env points24 --json benchmark.json

*The paper's schedule* is one environment and one sample at a time in rollout and update, answers padded to twice
the longest, the adapter apart from the weights, and a second full forward pass to score what was sampled. It runs through the same code here, so that the
difference is the schedule alone. *The limit* is the model's arithmetic, counted by hand, over the rate of matrix products
of this model's shapes, measured in the same run. Phases alternate between the schedules, several rounds, and the
median counts, so that a noisy machine hits all of them.

`--growth FILE` measures instead how time and memory grow with environments, answer length, picture tokens and model width;
`--model random-llava-1.6-7b` the paper's model on a GPU, with random weights and no download (on a CPU an eighth of its width and depth,
or with `--shrink 1 --lora-rank 32` all of it, for which 24 GB and a quarter of an hour are enough); with `--plan` only the memory that
training expects with several flags, computed without any weights.
"""
import contextlib
import copy
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import env  # noqa: E402
import prompts  # noqa: E402
import train  # noqa: E402
from policy import VLMPolicy, load_model  # noqa: E402
from ppo import Rollout, ppo_update  # noqa: E402


def seconds(function, *args):
    """(time of one call, its result)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def pad_answers(answers, length):
    """The paper's padding: every answer gets `length` tokens. (The sums of log-probabilities change; this is for timing.)"""
    for answer in answers:
        answer.tokens = torch.cat([answer.tokens, answer.tokens.new_full((length - len(answer.tokens),), answer.tokens[-1].item())])
    return answers


class Bench:
    def __init__(self, config):
        self.config = config
        torch.manual_seed(0)
        self.policy = train.build_policy(config)
        run = argparse_namespace(log=lambda **row: None, restore=lambda *args: None, checkpoint=lambda *args, **state: None, signal=0)
        self.games = {n: env.Games(config.env, n, seed=0) for n in (1, 16, 64)}
        # An untrained model writes to the last token: teach the format first, so that answers have their real length.
        train.sft(self.policy, argparse_namespace(**vars(config) | {"sft_steps": 60, "sft_batch": 32}), run)

    # -- phases: each returns units done; the caller times it --------------------------------------------

    def env_steps(self, n=64, steps=20):
        """Games played by the expert: rules, pictures, no model."""
        games = self.games[n]
        for _ in range(steps):
            games.step([env.expert_action(info) for info in games.infos])
        return n * steps

    def apart(self, paper):
        """The paper's schedule keeps the adapter apart from the weights."""
        self.policy.merged = contextlib.nullcontext if paper else type(self.policy).merged.__get__(self.policy)

    def rollout(self, n, steps, paper=False):
        games, rng = self.games[n], np.random.default_rng(0)
        self.apart(paper)
        for _ in range(steps):
            answers = self.policy.act(games.images, [prompts.build_prompt(info) for info in games.infos])
            if paper:  # scored again, padded, in a pass of its own
                with torch.no_grad():
                    self.policy.evaluate(pad_answers(answers, 2 * self.config.max_new_tokens))
            games.step([prompts.parse_action(answer.text, info["legal_actions"], rng)[0] for answer, info in zip(answers, games.infos)])
        return n * steps

    def sample(self, n):
        games = self.games[64]
        answers = []
        while len(answers) < n:
            answers += self.policy.act(games.images, [prompts.build_prompt(info) for info in games.infos])
        return answers[:n]

    def update(self, answers, microbatch, paper=False):
        self.apart(paper)
        return update(self.policy, self.optimizer, answers, microbatch, self.config)

    def sft(self, batch):
        games = self.games[64]
        for start in range(0, 64, batch):
            rows = slice(start, start + batch)
            infos = games.infos[rows]
            answers = self.policy.demonstrate(games.images[rows], [prompts.build_prompt(info) for info in infos],
                                              [prompts.demonstration(info, env.expert_action(info)) for info in infos])
            scores = self.policy.evaluate(answers)
            (scores.logp_cot + scores.logp_action).mean().neg().backward()
            self.policy.zero_grad(set_to_none=True)
        return 64

    def pictures(self):
        """Drawing, shrinking and normalising 64 pictures: the share of the rollout that is not the language model."""
        games = self.games[64]
        for game in games.vector.envs:
            game.unwrapped.render()
        self.policy.encode(games.images, [""] * 64)
        return 64


def argparse_namespace(**values):
    import argparse
    return argparse.Namespace(**values)


# ---------------------------------------------------------------------------------------------------
# The limit


def flops_per_sample(policy, answers):
    """FLOPs a sample, counted from the layers: a dict of what runs forward (`forward`), what the gradient to the inputs repeats
    (`inputs`), what the gradient of all weights does (`weights`) and of an adapter's alone (`adapter`).

    A linear layer of m x n weights takes 2 m n a token, a convolution of patches as much a patch; attention 4 T D a token and
    layer (scores and mixing, T the length), half of it where it is causal; the last MLP and the language head only read the
    answer's tokens.
    A and B of rank r take 4 r (m + n) a token: their gradients are two thin products each.
    """
    prompt, length = answers[0].inputs["input_ids"].shape[1], statistics.mean(len(a.tokens) for a in answers)
    counted = dict.fromkeys(("forward", "inputs", "weights", "adapter"), 0.0)
    text, vision = policy.model.config.get_text_config(), policy.model.config.vision_config
    for name, module in policy.model.named_modules():
        tokens = (patches(policy) if "vision" in name or "projector" in name or "connector" in name
                  else length + 1 if "lm_head" in name or f"layers.{text.num_hidden_layers - 1}.mlp" in name else prompt + length)
        if "lora_A" in name and isinstance(module, torch.nn.Linear):
            layer = policy.model.get_submodule(name.split(".lora_A")[0])
            counted["adapter"] += 4 * module.out_features * (layer.in_features + layer.out_features) * tokens
        elif isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and "lora_" not in name:
            work = 2 * module.weight.numel() * tokens
            counted["forward"] += work
            counted["weights"] += work
            counted["inputs"] += work * isinstance(module, torch.nn.Linear)  # nothing lies below the patches
    attention = text.num_hidden_layers * 2 * (prompt + length) ** 2 * text.hidden_size
    attention += vision.num_hidden_layers * 4 * patches(policy) ** 2 * vision.hidden_size
    return {key: work + attention * (2 if key == "inputs" else key == "forward") for key, work in counted.items()}


def patches(policy):
    vision = policy.model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def matrix_rate(policy, rows):
    """Measured FLOP/s of (rows x D) by (D x F) products, D and F the language model's sizes, in its number format."""
    text = policy.model.config.get_text_config()
    a = torch.randn(rows, text.hidden_size, dtype=policy.model.dtype, device=policy.model.device)
    b = torch.randn(text.hidden_size, text.intermediate_size, dtype=a.dtype, device=a.device)
    out = a @ b  # written to again: new memory of a CPU is slow at first touch, which is not the products' doing
    times = [seconds(lambda: torch.matmul(a, b, out=out))[0] for _ in range(30)]
    return 2 * a.numel() * b.shape[1] / statistics.median(times)


def read_rate(device):
    """Measured bytes a second that a pass over 2 GB of a GPU's memory, or 200 MB of a CPU's, reads."""
    x = torch.ones(500_000_000 if torch.cuda.is_available() else 50_000_000, device=device)
    return 4 * x.numel() / statistics.median(seconds(torch.sum, x)[0] for _ in range(10))


# ---------------------------------------------------------------------------------------------------
# Growth


def sized(patches=5, width=128, tokens=32):
    """The embedded model with patches x patches picture tokens and another width, untrained, writing exactly `tokens` tokens."""
    model, processor = load_model("tiny")
    config = copy.deepcopy(model.config)
    config.vision_config.image_size = 20 * patches
    config.text_config.hidden_size, config.text_config.intermediate_size = width, 3 * width
    processor.image_processor.size = {"height": 20 * patches, "width": 20 * patches}
    policy = VLMPolicy(type(model)(config), processor, max_new_tokens=tokens)
    policy.eos, policy.forbidden = set(), policy.forbidden.clone()
    policy.forbidden[processor.tokenizer.eos_token_id] = -torch.inf
    policy.add_lora(16, 32)
    return policy


def growth(file, rounds):
    """Plot seconds of a sampling and of a gradient step, and the gradient step's memory, against each size; print the fitted exponents."""
    from matplotlib.figure import Figure
    from torch.profiler import ProfilerActivity, profile

    axes = {"environments": [(dict(), n, n) for n in (4, 16, 64, 256)],
            "tokens of the answer": [(dict(tokens=t), 16, t) for t in (16, 32, 64, 128)],
            "tokens of the picture": [(dict(patches=p), 16, p * p) for p in (3, 5, 10, 15)],
            "width of the language model": [(dict(width=w), 16, w) for w in (64, 128, 256, 512)]}
    figure = Figure(figsize=(4 * len(axes), 3.6), layout="constrained")
    for panel, (name, settings) in zip(figure.subplots(1, len(axes)), axes.items()):
        measured = {"sampling (s)": [], "gradient (s)": [], "gradient's memory (GB)": []}
        for sizes, n, _ in settings:
            policy, games = sized(**sizes), env.Games("blackjack", n, 0)
            asked = [prompts.build_prompt(info) for info in games.infos]
            answers = policy.act(games.images, asked)

            def step():
                scores = policy.evaluate(answers)
                (scores.logp_cot + scores.logp_action + scores.value).sum().backward()

            step()
            measured["sampling (s)"].append(statistics.median(seconds(policy.act, games.images, asked)[0] for _ in range(rounds)))
            measured["gradient (s)"].append(statistics.median(seconds(step)[0] for _ in range(rounds)))
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                scores = policy.evaluate(answers)
            measured["gradient's memory (GB)"].append(sum(max(event.self_cpu_memory_usage, 0) for event in profiled.events()) / 1e9)
            del scores
        sizes = [size for *_, size in settings]
        print(f"{name} {sizes}")
        for what, values in measured.items():
            exponent = np.polyfit(np.log(sizes), np.log(values), 1)[0]
            print(f"  {what:<24} exponent {exponent:5.2f}   " + "  ".join(f"{value:.3f}" for value in values))
            panel.loglog(sizes, values, "o-", label=f"{what}, exponent {exponent:.2f}")
        panel.minorticks_off()
        panel.set_xticks(sizes, sizes)
        panel.set(xlabel=name)
        panel.legend(frameon=False, fontsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=90)


# ---------------------------------------------------------------------------------------------------
# The paper's model


def random_llava(config, part, device):
    """A `VLMPolicy` of LLaVA-1.6-7B's architecture, Mistral-7B and CLIP ViT-L/14 at 336 pixels, with random weights; every answer has 100 tokens.

    part: what widths and depths are divided by, 1 for bfloat16 and the whole, else float32."""
    threads = torch.get_num_threads()
    from test_models import template, tokenizer
    torch.set_num_threads(threads)  # the tests take one
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, MistralConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    dtype = torch.bfloat16 if part == 1 else torch.float32
    words = tokenizer("byte-level", "<image>")
    architecture = LlavaConfig(
        text_config=MistralConfig(vocab_size=32064, hidden_size=4096 // part, intermediate_size=14336 // part, num_hidden_layers=32 // part,
                                  num_attention_heads=32 // part, num_key_value_heads=8 // part, sliding_window=None,
                                  pad_token_id=0, bos_token_id=1, eos_token_id=2),
        vision_config=CLIPVisionConfig(hidden_size=1024 // part, intermediate_size=4096 // part, num_hidden_layers=24 // part,
                                       num_attention_heads=16 // part, image_size=336, patch_size=14),
        image_token_id=words.convert_tokens_to_ids("<image>"))
    processor = LlavaProcessor(CLIPImageProcessorPil(size={"height": 336, "width": 336}, do_center_crop=False), words, patch_size=14,
                               vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template("<image>"))
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlavaForConditionalGeneration(architecture)
    torch.set_default_dtype(torch.float32)
    policy = VLMPolicy(model, processor, config.temperature, max_new_tokens=100)
    policy.eos = set()
    policy.forbidden[words.eos_token_id] = -torch.inf
    return policy


def plans(config):
    """Print the memory that training of the whole model expects, as a table: flags, parts and peak in GB."""
    policy = random_llava(config, 1, "meta")
    linear = sum(m.weight.numel() for m in policy.model.modules() if isinstance(m, torch.nn.Linear) and m.weight.dtype == torch.bfloat16)
    for flags in ({}, {"microbatch": 4}, {"microbatch": 4, "gradient_checkpointing": False}, {"lora_rank": 32, "num_envs": 8},
                  {"quantize": "4bit"}, {"quantize": "4bit", "lora_rank": 32, "num_envs": 8}):
        # Four bits a weight and a float32 scale for every 64, instead of 16 bits.
        saved = (2 - 4 / 8 - 4 / 64) * linear / 1e9 if "quantize" in flags else 0
        peak, parts = train.memory_plan(policy, argparse_namespace(**vars(config) | flags))
        parts["weights"] -= saved
        print(f"{' '.join(f'{flag}={value}' for flag, value in flags.items()) or 'the preset':<40} "
              + "  ".join(f"{name} {gb:.1f}" for name, gb in parts.items()) + f"  peak {peak - saved:.1f} GB")


def paper_model(config, rounds, file, part):
    """Print what decoding and updates take, beside their limits, and the hours of the paper's 15,000 steps; write it to `file`."""
    gpu, config.max_new_tokens, memory = torch.cuda.is_available(), 100, -psutil.Process().memory_info().rss / 1e9
    policy = random_llava(config, part, "cuda" if gpu else "cpu")
    device, name = policy.model.device, torch.cuda.get_device_name() if gpu else "CPU"
    name += f", 1/{part} of width and depth" * (part > 1)
    weights, reading = policy.model.get_memory_footprint(), read_rate(device)
    text = policy.model.config.get_text_config()
    print(f"random-llava-1.6-7b on {name}: {weights / 1e9:.1f} GB of weights, memory read at {reading / 1e9:.0f} GB/s")
    result, step_seconds = {"device": name}, {}
    sizes, microbatches = ((1, 8, 32, 64), (1, 4, 16)) if gpu else ((1, 4) if part > 1 else (1,), (1,))
    config.num_envs, config.microbatch = sizes[-1], microbatches[-1]
    planned, _ = train.memory_plan(policy, config)
    policy.checkpoint_gradients()
    policy.add_lora(config.lora_rank, config.lora_alpha)
    for n in sizes:
        games = env.Games(config.env, n, 0)
        asked = [prompts.build_prompt(info) for info in games.infos]
        answers = policy.act(games.images, asked)
        prompt = statistics.mean(a.inputs["input_ids"].shape[1] for a in answers)
        act = statistics.median(seconds(policy.act, games.images, asked)[0] for _ in range(rounds))
        prefill = statistics.median(seconds(policy.value, games.images, asked)[0] for _ in range(rounds))
        cache = n * (prompt + 50) * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2 * policy.model.dtype.itemsize
        step_seconds[n] = act / n
        row = {"steps a second": n / act, "prefill seconds": prefill, "tokens a second": 99 * n / (act - prefill), "limit": n * reading / (weights + cache)}
        result[f"{n} environments"] = row | {"of the limit": row["tokens a second"] / row["limit"]}
        print(f"{n:3} environments, prompts of {prompt:.0f} tokens: {n / act:.3g} steps/s, prompts read in {prefill:.3g} s, then {row['tokens a second']:.3g} "
              f"tokens/s, {row['tokens a second'] / row['limit']:.0%} of the bandwidth's {row['limit']:.3g}", flush=True)
    optimizer, best = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], 0.0, fused=True), 0.0
    flops = flops_per_sample(policy, answers)
    work = 2 * flops["forward"] + flops["inputs"] + flops["adapter"]  # forward, and once more for the checkpoints
    limit = matrix_rate(policy, int(4 * (prompt + 100))) / work
    for microbatch in microbatches:
        sample = (answers * 2)[:16]
        rate = len(sample) / statistics.median(seconds(update, policy, optimizer, sample, microbatch, config)[0] for _ in range(rounds))
        result[f"update, microbatch {microbatch}"], best = {"samples a second": rate, "of the limit": rate / limit}, max(best, rate)
        print(f"update, microbatch {microbatch:2}: {rate:.3g} samples/s, {rate / limit:.0%} of the matrix rate's {limit:.3g}", flush=True)
    n = min(32, sizes[-1])
    # In bfloat16 each step is scored once more before its update.
    hours = 15_000 * (step_seconds[n] + (config.epochs + (policy.model.dtype == torch.bfloat16) * flops["forward"] / work) / best) / 3600
    # On a CPU without what Python and libraries take.
    memory = torch.cuda.max_memory_allocated() / 1e9 if gpu else memory + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"15,000 steps with {n} environments and the best update: {hours:.1f} hours; peak memory {memory:.1f} GB, expected {planned:.1f}")
    if file:
        file.write_text(json.dumps(result | {"hours": hours, "peak_gb": memory, "expected_gb": planned}, indent=1))


def update(policy, optimizer, answers, microbatch, config):
    """One optimiser step of PPO, with made-up rewards; returns the number of its samples."""
    shape = (1, len(answers))
    logps = torch.tensor([[[a.logp_cot, a.logp_action, a.value] for a in answers]])
    false = torch.zeros(shape, dtype=torch.bool)
    rollout = Rollout(answers, *logps.float().unbind(-1), torch.zeros(shape), torch.randn(shape), ~false, false)
    ppo_update(policy, optimizer, rollout, cot_scale=config.cot_scale, epochs=1, minibatch=len(answers), microbatch=microbatch)
    return len(answers)


# ---------------------------------------------------------------------------------------------------


def main():
    parser = env.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--env", choices=env.GAMES, default="blackjack", help="the task")
    parser.add_argument("--model", default="tiny", help="tiny, random-llava-1.6-7b, or a folder with a model")
    parser.add_argument("--shrink", type=env.positive_int, default=1 if torch.cuda.is_available() else 8, help="divide the sizes of random-llava-1.6-7b by it")
    parser.add_argument("--lora-rank", type=env.positive_int, default=128, help="of random-llava-1.6-7b")
    parser.add_argument("--plan", action="store_true", help="print only the memory that random-llava-1.6-7b should need")
    parser.add_argument("--rounds", type=env.positive_int, default=5, help="rounds of all phases; the median counts")
    parser.add_argument("--threads", type=env.positive_int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--growth", type=Path, metavar="FILE", help="instead, a plot (PNG) of how the embedded model's cost grows, and the exponents")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.growth:
        return growth(args.growth, args.rounds)
    preset = "tiny" if args.model == "tiny" else "paper"
    config = argparse_namespace(**train.complete({"preset": preset, "env": args.env, "model": args.model}))
    if args.model == "random-llava-1.6-7b":
        if args.plan:
            return plans(config)
        config.lora_rank = args.lora_rank
        return paper_model(config, args.rounds, args.json, args.shrink)
    bench = Bench(config)
    policy, longest = bench.policy, 2 * config.max_new_tokens
    sft = {"ours": lambda: bench.sft(32), "paper": lambda: bench.sft(1)}
    times = {}

    def measure(name, which, function):
        taken, units = seconds(function)
        times.setdefault((name, which), []).append(taken / units)

    for _ in range(args.rounds):  # SFT trains all weights of the tiny model; the adapter comes after
        for which, function in sft.items():
            measure("SFT samples", which, function)
    answers = bench.sample(128)
    sft_work = sum(flops_per_sample(policy, answers).values())
    policy.add_lora(config.lora_rank, config.lora_alpha)
    work = flops_per_sample(policy, answers)
    bench.optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], 0.0, fused=True)
    padded = pad_answers(bench.sample(16), longest)
    for _ in range(args.rounds):
        measure("env steps, no model", "ours", bench.env_steps)
        measure("pictures", "ours", bench.pictures)
        measure("rollout steps,  1 env", "ours", lambda: bench.rollout(1, 8))
        measure("rollout steps", "paper", lambda: bench.rollout(1, 8, paper=True))
        measure("rollout steps, 16 envs", "ours", lambda: bench.rollout(16, 4))
        measure("rollout steps, 64 envs", "ours", lambda: bench.rollout(64, 2))
        measure("PPO samples", "ours", lambda: bench.update(answers[:64], config.microbatch))
        measure("PPO samples", "paper", lambda: bench.update(padded, 1, paper=True))
    median = {key: statistics.median(values) for key, values in times.items()}
    rows = 64 * (answers[0].inputs["input_ids"].shape[1] + 30)
    rate, decode_rate = matrix_rate(policy, rows), matrix_rate(policy, 64)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    length = statistics.mean(len(a.tokens) for a in answers)
    prompt = statistics.mean(a.inputs["input_ids"].shape[1] for a in answers)
    text, size = policy.model.config.get_text_config(), policy.model.dtype.itemsize
    cache = 64 * (prompt + length / 2) * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2 * size
    reading = read_rate(policy.model.device)
    limits = {"PPO samples": (work["forward"] + work["inputs"] + work["adapter"]) / rate, "SFT samples": sft_work / rate,
              "rollout steps, 64 envs": work["forward"] / decode_rate,
              "the same, bandwidth": length * (policy.model.get_memory_footprint() + cache) / reading / 64}
    median["the same, bandwidth", "ours"] = median["rollout steps, 64 envs", "ours"]
    print(f"{args.model}, {args.env}, {args.threads} threads, prompts of {prompt:.0f} and answers of {length:.0f} tokens, "
          f"{rate / 1e9:.0f} GFLOP/s for these shapes ({decode_rate / 1e9:.0f} while decoding), "
          f"memory read at {reading / 1e9:.0f} GB/s, {args.rounds} rounds\n")
    print(f"{'phase':<24} {'ours':>9} {'paper':>9} {'ratio':>6} {'limit':>9} {'of it':>6}     (units a second)")
    results = {}
    for name in [name for name, which in median if which == "ours"]:
        ours, paper = median[name, "ours"], median.get((name, "paper"))
        if name.startswith("rollout"):
            paper = median["rollout steps", "paper"]
        row = results[name] = {"ours": 1 / ours, "paper": paper and 1 / paper, "ratio": paper and paper / ours,
                               "limit": name in limits and 1 / limits[name], "of_limit": name in limits and limits[name] / ours}
        print(f"{name:<24} {row['ours']:9.1f} " + (f"{row['paper']:9.1f} {row['ratio']:5.1f}x" if paper else " " * 16)
              + (f" {row['limit']:9.0f} {row['of_limit']:6.0%}" if row["limit"] else ""))
    share = median[("pictures", "ours")] / median[("rollout steps, 64 envs", "ours")]
    jobs = {}
    for which, sft_time, step_time, update_time in (
            ("ours", median[("SFT samples", "ours")], median[("rollout steps, 64 envs", "ours")], median[("PPO samples", "ours")]),
            ("paper", median[("SFT samples", "paper")], median[("rollout steps", "paper")], median[("PPO samples", "paper")])):
        jobs[which] = {"SFT": sft_time * config.sft_steps * config.sft_batch, "rollout": step_time * config.env_steps,
                       "update": update_time * config.env_steps * config.epochs}
    totals = {which: sum(job.values()) for which, job in jobs.items()}
    print(f"\npictures (drawing, shrinking, normalising) are {share:.0%} of a rollout at 64 environments")
    for which, job in jobs.items():
        print(f"whole job from these rates, {which:<5}: {totals[which]:7.0f} s = " + " + ".join(f"{phase} {t:.0f} s" for phase, t in job.items()))
    print(f"ratio {totals['paper'] / totals['ours']:.1f}x; peak memory {peak:.2f} GiB")
    if args.json:
        args.json.write_text(json.dumps({"phases": results, "job_seconds": jobs, "pictures_share": share, "matrix_flops": rate}, indent=1))


if __name__ == "__main__":
    main()
