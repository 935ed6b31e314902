"""How fast: ours, the paper's schedule, and what the hardware allows, measured in one run.

    python tests/benchmark.py                      # the built-in model on this machine
    python tests/benchmark.py --growth FILE        # only how time and memory grow, as a plot
    python tests/benchmark.py --model DIR --env points24 --json benchmark.json

*The paper's schedule* is one environment and one sample at a time in rollout and update, answers
padded to twice the longest, and a second full forward pass to score what was
sampled. It runs through the same code here, so the difference is the schedule alone.

*The limit* is the model's arithmetic, counted by hand, over the rate of matrix products of this
model's shapes, measured in the same run.

What is compared takes turns, several rounds, and the median counts: a noisy machine hits all alike.

`--model random-llava-1.6-7b` measures the paper's model on a GPU, with random weights and no
download. On a CPU it has an eighth of the width and depth; `--shrink 1 --lora-rank 32` takes all of
it, for which 24 GB and a quarter of an hour are enough. With `--plan` it prints only the memory
that training expects with several flags, computed without any weights.
"""
import argparse
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
from eval import positive_int  # noqa: E402
from policy import VLMPolicy, build_policy, load_model  # noqa: E402
from ppo import Rollout, ppo_update  # noqa: E402

PAPER_MODEL = "random-llava-1.6-7b"
SFT_SAMPLES = 32     # of one optimiser step here, whatever the preset says
PPO_SAMPLES = 64
PADDED_SAMPLES = 16  # of one optimiser step in the paper's schedule, which is slow


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.growth:
        return growth(args.growth, args.rounds)

    preset = ["--preset", "paper"] if args.model == PAPER_MODEL else []  # it is built below
    config, _ = train.configure(["--env", args.env, "--model", args.model, *preset])
    if args.model == PAPER_MODEL:
        if args.plan:
            return plans(config)
        config.lora_rank = args.lora_rank
        return paper_model(config, args.rounds, args.shrink, args.json)

    results = schedules(config, args.rounds)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage=argparse.SUPPRESS,  # without a usage text an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shrink = 1 if torch.cuda.is_available() else 8
    threads = torch.get_num_threads()
    add = parser.add_argument
    add("--env", choices=env.GAMES, default="blackjack", help="the task")
    add("--model", default="tiny", help=f"tiny, {PAPER_MODEL}, or a folder with a model")
    add("--rounds", type=positive_int, default=5, help="rounds of all phases; the median counts")
    add("--threads", type=positive_int, default=threads, help="threads of torch")
    add("--json", type=Path, help="file for the results")
    add("--growth", type=Path, metavar="FILE",
        help="measure only how the built-in model's cost grows: a plot (PNG), and exponents")
    add("--shrink", type=positive_int, default=shrink, help=f"divide the sizes of {PAPER_MODEL}")
    add("--lora-rank", type=positive_int, default=128, help=f"of {PAPER_MODEL}")
    add("--plan", action="store_true", help=f"print only the memory that {PAPER_MODEL} needs")
    args = parser.parse_args()
    if args.plan and args.model != PAPER_MODEL:
        parser.error(f"--plan is for --model {PAPER_MODEL}")
    return args


# -------------------------------------------------------------------------------------------------
# The work: pieces of the main job that can be timed


def seconds(function, *args):
    """Seconds that a call takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def median_seconds(rounds, function, *args):
    return statistics.median(seconds(function, *args) for _ in range(rounds))


class NoRun:
    """Stands in for a run directory: there is nothing to go on with, and nothing is written."""

    signal = 0

    def restore(self, stage, policy, optimizer):
        return None

    def log(self, **row):
        pass

    def checkpoint(self, *args, **state):
        pass


class Work:
    """A policy and games. Each method does a piece of the job and returns the number of its units.

    It begins in SFT, where all weights are trained; `begin_rl` puts an adapter on them.
    """

    def __init__(self, config):
        self.config = config
        torch.manual_seed(0)
        self.policy = build_policy(config)
        self.games = {num_envs: env.Games(config.env, num_envs, 0) for num_envs in (1, 16, 64)}

        # An untrained model writes to the last token: teach the format, so that answers have
        # their real length
        lesson = argparse.Namespace(**vars(config) | {"sft_steps": 60, "sft_batch": SFT_SAMPLES})
        train.sft(self.policy, lesson, NoRun())
        self.optimizer = self.make_optimizer()

    def begin_rl(self):
        self.policy.add_lora(self.config.lora_rank, self.config.lora_alpha)
        self.optimizer = self.make_optimizer()

    def make_optimizer(self):
        """Adam, with a learning rate of 0: it works, and the weights stay."""
        trainable = [p for p in self.policy.parameters() if p.requires_grad]
        return torch.optim.Adam(trainable, lr=0.0, fused=True)

    # -- SFT

    def sft(self, microbatch):
        """One step of SFT: demonstrations, gradients, optimiser, and a step of the games."""
        games = self.games[64]
        infos = games.infos[:SFT_SAMPLES]
        actions = [env.expert_action(info) for info in games.infos]
        texts = [prompts.demonstration(info, action) for info, action in zip(infos, actions)]
        answers = self.policy.demonstrate(games.images[:SFT_SAMPLES], questions_of(infos), texts)
        for i in range(0, SFT_SAMPLES, microbatch):
            scores = self.policy.evaluate(answers[i: i + microbatch])
            (scores.logp_cot + scores.logp_action).mean().neg().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        games.step(actions)
        return SFT_SAMPLES

    # -- Rollout

    def play(self, num_envs, num_steps):
        """Sample answers, parse their actions and play them."""
        games = self.games[num_envs]
        rng = np.random.default_rng(0)
        for _ in range(num_steps):
            answers = self.policy.act(games.images, questions_of(games.infos))
            games.step(parsed_actions(answers, games.infos, rng))
        return num_envs * num_steps

    def play_as_paper(self, num_steps):
        """The paper's schedule: one environment, and each answer is padded and scored again."""
        games = self.games[1]
        rng = np.random.default_rng(0)
        for _ in range(num_steps):
            answers = self.policy.act(games.images, questions_of(games.infos))
            with torch.no_grad():
                self.policy.evaluate(padded(answers, 2 * self.config.max_new_tokens))
            games.step(parsed_actions(answers, games.infos, rng))
        return num_steps

    def sample(self, count):
        """`count` answers to the first states of the games."""
        games = self.games[64]
        answers = []
        while len(answers) < count:
            answers += self.policy.act(games.images, questions_of(games.infos))
        return answers[:count]

    def play_expert(self, num_steps):
        """Games played by the expert: rules and pictures, no model."""
        games = self.games[64]
        for _ in range(num_steps):
            games.step([env.expert_action(info) for info in games.infos])
        return 64 * num_steps

    def draw(self):
        """Draw and process pictures: what of a rollout is not the language model."""
        games = self.games[64]
        for game in games.vector.envs:
            game.unwrapped.render()
        self.policy.encode(games.images, [""] * 64)
        return 64

    # -- Update

    def update(self, answers, microbatch):
        return update(self.policy, self.optimizer, answers, microbatch, self.config)


def update(policy, optimizer, answers, microbatch, config):
    """One optimiser step of PPO, with made-up rewards; returns the number of its samples."""

    def row(name):
        return torch.tensor([[getattr(answer, name) for answer in answers]])   # (1, N)

    shape = (1, len(answers))
    rollout = Rollout(
        answers=answers,
        logp_cot=row("logp_cot"),
        logp_action=row("logp_action"),
        values=row("value"),
        next_values=torch.zeros(shape),
        rewards=torch.randn(shape),
        terminated=torch.ones(shape, dtype=torch.bool),
        truncated=torch.zeros(shape, dtype=torch.bool),
        legal=torch.ones(shape, dtype=torch.bool),
        sft_logp_cot=row("logp_cot"),
        sft_logp_action=row("logp_action"),
    )
    one_step = {"epochs": 1, "minibatch": len(answers), "microbatch": microbatch}
    config = argparse.Namespace(**vars(config) | one_step)
    ppo_update(policy, optimizer, rollout, config.cot_scale, config)
    return len(answers)


def questions_of(infos):
    return [prompts.build_prompt(info) for info in infos]


def parsed_actions(answers, infos, rng):
    actions = []
    for answer, info in zip(answers, infos):
        action, _ = prompts.parse_action(answer.text, info["legal_actions"], rng)
        actions.append(action)
    return actions


def padded(answers, length):
    """The paper's padding: every answer gets `length` tokens.

    The sums of log-probabilities change; this is for timing.
    """
    for answer in answers:
        missing = length - len(answer.tokens)
        padding = answer.tokens.new_full((missing,), answer.tokens[-1].item())
        answer.tokens = torch.cat([answer.tokens, padding])
    return answers


# -------------------------------------------------------------------------------------------------
# Ours beside the paper's schedule and the limit


def schedules(config, rounds):
    """Measure and print a table of rates, and the seconds of the whole job; returns a dict."""
    work = Work(config)
    times = {}  # (phase, "ours" or "paper") -> seconds a unit, one for each round

    def measure(phase, schedule, function, *args):
        began = time.perf_counter()
        num_units = function(*args)
        taken = time.perf_counter() - began
        times.setdefault((phase, schedule), []).append(taken / num_units)

    # SFT, then the adapter and all that comes after it
    for _ in range(rounds):
        measure("SFT samples", "ours", work.sft, SFT_SAMPLES)
        measure("SFT samples", "paper", work.sft, 1)
    answers = work.sample(2 * PPO_SAMPLES)
    sft_flops = sum(flops_per_sample(work.policy, answers).values())
    work.begin_rl()
    flops = flops_per_sample(work.policy, answers)
    padded_answers = padded(work.sample(PADDED_SAMPLES), 2 * config.max_new_tokens)
    for _ in range(rounds):
        measure("env steps, no model", "ours", work.play_expert, 20)
        measure("pictures", "ours", work.draw)
        measure("rollout steps,  1 env", "ours", work.play, 1, 8)
        measure("rollout steps", "paper", work.play_as_paper, 8)
        measure("rollout steps, 16 envs", "ours", work.play, 16, 4)
        measure("rollout steps, 64 envs", "ours", work.play, 64, 2)
        measure("PPO samples", "ours", work.update, answers[:PPO_SAMPLES], config.microbatch)
        measure("PPO samples", "paper", work.update, padded_answers, 1)
    times = {key: statistics.median(values) for key, values in times.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    # Limits: arithmetic over the rate of matrix products; while decoding, also bytes over the
    # rate at which memory is read
    policy = work.policy
    length = statistics.mean(len(answer.tokens) for answer in answers)
    prompt = prompt_length(answers)
    matrix_rate = measure_matrix_rate(policy, rows=int(64 * (prompt + 30)))
    decode_rate = measure_matrix_rate(policy, rows=64)
    read_rate = measure_read_rate(policy.model.device)
    step_bytes = policy.model.get_memory_footprint() + cache_bytes(policy, 64, prompt + length / 2)
    limits = {
        "SFT samples": sft_flops / matrix_rate,
        "PPO samples": (flops["forward"] + flops["inputs"] + flops["adapter"]) / matrix_rate,
        "rollout steps, 64 envs": flops["forward"] / decode_rate,
        "the same, bandwidth": length * step_bytes / read_rate / 64,
    }
    times["the same, bandwidth", "ours"] = times["rollout steps, 64 envs", "ours"]

    # Print the table
    print(f"{config.model}, {config.env}, {torch.get_num_threads()} threads, "
          f"prompts of {prompt:.0f} and answers of {length:.0f} tokens, "
          f"{matrix_rate / 1e9:.0f} GFLOP/s for these shapes "
          f"({decode_rate / 1e9:.0f} while decoding), "
          f"memory read at {read_rate / 1e9:.0f} GB/s, {rounds} rounds\n")
    print(f"{'phase':<24} {'ours':>9} {'paper':>9} {'ratio':>6} {'limit':>9} {'of it':>6}"
          "     (units a second)")
    phases = {}
    for phase in [phase for phase, schedule in times if schedule == "ours"]:
        paper_phase = "rollout steps" if phase.startswith("rollout") else phase
        row = rates(times[phase, "ours"], times.get((paper_phase, "paper")), limits.get(phase))
        phases[phase] = row
        print(f"{phase:<24} {row['ours']:9.1f}", end="")
        if row["paper"]:
            print(f" {row['paper']:9.1f} {row['ratio']:5.1f}x", end="")
        else:
            print(" " * 17, end="")
        if row["limit"]:
            print(f" {row['limit']:9.0f} {row['of_limit']:6.0%}", end="")
        print()

    # Print the whole job
    pictures_share = times["pictures", "ours"] / times["rollout steps, 64 envs", "ours"]
    print("\npictures (drawing, shrinking, normalising) are "
          f"{pictures_share:.0%} of a rollout at 64 environments")
    jobs = {}
    totals = {}
    for schedule, rollout in (("ours", "rollout steps, 64 envs"), ("paper", "rollout steps")):
        jobs[schedule] = {
            "SFT": times["SFT samples", schedule] * config.sft_steps * config.sft_batch,
            "rollout": times[rollout, schedule] * config.env_steps,
            "update": times["PPO samples", schedule] * config.env_steps * config.epochs,
        }
        totals[schedule] = sum(jobs[schedule].values())
        parts = " + ".join(f"{phase} {taken:.0f} s" for phase, taken in jobs[schedule].items())
        print(f"whole job from these rates, {schedule:<5}: {totals[schedule]:7.0f} s = {parts}")
    print(f"ratio {totals['paper'] / totals['ours']:.1f}x; peak memory {peak:.2f} GiB\n")
    return {"phases": phases, "job_seconds": jobs, "pictures_share": pictures_share,
            "matrix_flops": matrix_rate}


def rates(ours, paper, limit):
    """A row of the table from seconds a unit; None where there is no such schedule or limit."""
    row = {"ours": 1 / ours, "paper": None, "ratio": None, "limit": None, "of_limit": None}
    if paper:
        row["paper"] = 1 / paper
        row["ratio"] = paper / ours
    if limit:
        row["limit"] = 1 / limit
        row["of_limit"] = limit / ours
    return row


# -------------------------------------------------------------------------------------------------
# The limit


def flops_per_sample(policy, answers):
    """FLOPs a sample, counted from the layers, as a dict.

        forward   what runs forward
        inputs    what the gradient to the inputs repeats
        weights   what the gradient of all weights does
        adapter   what the gradient of an adapter alone does

    A linear layer of m x n weights takes 2 m n a token, a convolution of patches as much a patch.
    An adapter of rank r takes 2 r (m + n) a token. Attention takes 4 T D a token and layer (scores
    and mixing, T the length), half of it where it is causal. The language head reads only the
    answer's tokens.
    """
    text = policy.model.config.get_text_config()
    vision = policy.model.config.vision_config
    patches = num_patches(policy)
    prompt = answers[0].inputs["input_ids"].shape[1]
    length = statistics.mean(len(answer.tokens) for answer in answers)

    flops = {"forward": 0.0, "inputs": 0.0, "weights": 0.0, "adapter": 0.0}
    for name, module in policy.model.named_modules():
        # How many tokens or patches the layer reads
        tokens = prompt + length
        if contains(name, "vision", "projector", "connector"):
            tokens = patches
        elif "lm_head" in name:
            tokens = length + 1

        is_linear = isinstance(module, torch.nn.Linear)
        if is_linear or isinstance(module, torch.nn.Conv2d):
            layer_flops = 2 * module.weight.numel() * tokens
            flops["forward"] += layer_flops
            if is_linear:  # nothing lies below the convolution of patches
                flops["inputs"] += layer_flops
            if "lora_" in name:
                flops["adapter"] += layer_flops
            else:
                flops["weights"] += layer_flops

    attention = text.num_hidden_layers * 2 * (prompt + length) ** 2 * text.hidden_size
    attention += vision.num_hidden_layers * 4 * patches**2 * vision.hidden_size
    flops["forward"] += attention
    flops["inputs"] += 2 * attention  # both factors of a product have a gradient
    return flops


def contains(text, *words):
    return any(word in text for word in words)


def num_patches(policy):
    vision = policy.model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def prompt_length(answers):
    """Mean number of tokens of the prompts, pictures included."""
    return statistics.mean(answer.inputs["input_ids"].shape[1] for answer in answers)


def cache_bytes(policy, num_answers, tokens):
    """Bytes of the keys and values of `tokens` tokens in each of the answers."""
    text = policy.model.config.get_text_config()
    values_per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return num_answers * tokens * values_per_token * policy.model.dtype.itemsize


def measure_matrix_rate(policy, rows):
    """FLOP/s of (rows x D) by (D x F) products in the model's number format.

    D and F are the language model's sizes.
    """
    text = policy.model.config.get_text_config()
    dtype = policy.model.dtype
    device = policy.model.device
    a = torch.randn(rows, text.hidden_size, dtype=dtype, device=device)
    b = torch.randn(text.hidden_size, text.intermediate_size, dtype=dtype, device=device)
    # Write into the same memory: new memory of a CPU is slow at first touch
    out = a @ b
    taken = median_seconds(30, lambda: torch.matmul(a, b, out=out))
    return 2 * a.numel() * b.shape[1] / taken


def measure_read_rate(device):
    """Bytes a second of a pass over 2 GB of a GPU's memory, or 200 MB of a CPU's."""
    count = 500_000_000 if torch.cuda.is_available() else 50_000_000
    x = torch.ones(count, device=device)                                       # float32
    return 4 * x.numel() / median_seconds(10, torch.sum, x)


# -------------------------------------------------------------------------------------------------
# Growth

# Axis -> its settings: (arguments of `sized`, environments, size on the axis)
GROWTH = {
    "environments": [({}, n, n) for n in (4, 16, 64, 256)],
    "tokens of the answer": [({"tokens": n}, 16, n) for n in (16, 32, 64, 128)],
    "tokens of the picture": [({"patches": n}, 16, n * n) for n in (3, 5, 10, 15)],
    "width of the language model": [({"width": n}, 16, n) for n in (64, 128, 256, 512)],
}


def sized(patches=5, width=128, tokens=32):
    """The built-in model with patches x patches picture tokens and another width, untrained.

    It writes exactly `tokens` tokens.
    """
    model, processor = load_model("tiny")
    config = copy.deepcopy(model.config)
    config.vision_config.image_size = 20 * patches
    config.text_config.hidden_size = width
    config.text_config.intermediate_size = 3 * width
    processor.image_processor.size = {"height": 20 * patches, "width": 20 * patches}
    policy = VLMPolicy(type(model)(config), processor, max_new_tokens=tokens)
    write_to_the_last_token(policy)
    policy.add_lora(16, 32)
    return policy


def write_to_the_last_token(policy):
    """Forbid the end of an answer."""
    policy.forbidden[policy.eos_ids] = -torch.inf


def growth(file, rounds):
    """Plot how sampling and a gradient step grow with each size; print the fitted exponents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(GROWTH), 3.6), layout="constrained")
    for panel, (axis, settings) in zip(figure.subplots(1, len(GROWTH)), GROWTH.items()):
        sizes = [size for _, _, size in settings]
        measured = {}  # what -> its values, one for each size
        for arguments, num_envs, _ in settings:
            for what, value in costs(sized(**arguments), num_envs, rounds).items():
                measured.setdefault(what, []).append(value)

        print(f"{axis} {sizes}")
        for what, values in measured.items():
            exponent = np.polyfit(np.log(sizes), np.log(values), 1)[0]
            numbers = "  ".join(f"{value:.3f}" for value in values)
            print(f"  {what:<24} exponent {exponent:5.2f}   {numbers}")
            panel.loglog(sizes, values, "o-", label=f"{what}, exponent {exponent:.2f}")
        panel.minorticks_off()
        panel.set_xticks(sizes, sizes)
        panel.set(xlabel=axis)
        panel.legend(frameon=False, fontsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=90)


def costs(policy, num_envs, rounds):
    """Seconds of sampling and of a gradient step, and the memory of the latter, as a dict."""
    from torch.profiler import ProfilerActivity, profile

    games = env.Games("blackjack", num_envs, 0)
    questions = questions_of(games.infos)
    answers = policy.act(games.images, questions)

    def gradient_step():
        scores = policy.evaluate(answers)
        (scores.logp_cot + scores.logp_action + scores.value).sum().backward()

    gradient_step()
    sampling = median_seconds(rounds, policy.act, games.images, questions)
    gradient = median_seconds(rounds, gradient_step)

    # All memory that the forward pass asks for, as the backward pass finds it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        scores = policy.evaluate(answers)
    memory = sum(max(event.self_cpu_memory_usage, 0) for event in profiled.events())
    del scores
    return {"sampling (s)": sampling, "gradient (s)": gradient,
            "gradient's memory (GB)": memory / 1e9}


# -------------------------------------------------------------------------------------------------
# The paper's model


def random_llava(config, shrink, device):
    """A policy of LLaVA-1.6-7B's architecture with random weights; its answers have 100 tokens.

    That is Mistral-7B and CLIP ViT-L/14 at 336 pixels. shrink: what widths and depths are divided
    by; 1 takes the whole in bfloat16, all others are float32.
    """
    from transformers import (
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        MistralConfig,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    threads = torch.get_num_threads()
    from test_models import template, tokenizer
    torch.set_num_threads(threads)  # the tests take one

    words = tokenizer("byte-level", "<image>")
    text_config = MistralConfig(
        vocab_size=32064, hidden_size=4096 // shrink, intermediate_size=14336 // shrink,
        num_hidden_layers=32 // shrink, num_attention_heads=32 // shrink,
        num_key_value_heads=8 // shrink, sliding_window=None,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vision_config = CLIPVisionConfig(
        hidden_size=1024 // shrink, intermediate_size=4096 // shrink,
        num_hidden_layers=24 // shrink, num_attention_heads=16 // shrink,
        image_size=336, patch_size=14)
    architecture = LlavaConfig(
        text_config=text_config, vision_config=vision_config,
        image_token_id=words.convert_tokens_to_ids("<image>"))
    image_processor = CLIPImageProcessorPil(
        size={"height": 336, "width": 336}, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor, words, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template("<image>"))

    torch.set_default_dtype(torch.bfloat16 if shrink == 1 else torch.float32)
    with torch.device(device):
        model = LlavaForConditionalGeneration(architecture)
    torch.set_default_dtype(torch.float32)
    policy = VLMPolicy(model, processor, config.temperature, max_new_tokens=100)
    write_to_the_last_token(policy)
    return policy


def plans(config):
    """Print the memory that training of the whole model expects: flags, parts and peak in GB."""
    policy = random_llava(config, 1, "meta")
    language_head = policy.model.get_output_embeddings()
    num_weights = 0  # those that four bits can hold
    for module in policy.model.modules():
        if isinstance(module, torch.nn.Linear) and module is not language_head:
            num_weights += module.weight.numel()

    settings = [
        {},
        {"microbatch": 4},
        {"microbatch": 4, "gradient_checkpointing": False},
        {"lora_rank": 32, "num_envs": 8},
        {"quantize": "4bit"},
        {"quantize": "4bit", "lora_rank": 32, "num_envs": 8},
    ]
    for flags in settings:
        peak, parts = train.memory_plan(policy, argparse.Namespace(**vars(config) | flags))
        if "quantize" in flags:
            # Four bits a weight and a float32 scale for every 64, instead of 16 bits
            saved = (2 - 4 / 8 - 4 / 64) * num_weights / 1e9
            parts["weights"] -= saved
            peak -= saved
        name = " ".join(f"{flag}={value}" for flag, value in flags.items()) or "the preset"
        columns = "  ".join(f"{part} {gigabytes:.1f}" for part, gigabytes in parts.items())
        print(f"{name:<40} {columns}  peak {peak:.1f} GB")


def paper_model(config, rounds, shrink, file):
    """Print what decoding and updates take, beside their limits, and the hours of 15,000 steps.

    The results also go to `file`, as JSON.
    """
    has_gpu = torch.cuda.is_available()
    memory_before = psutil.Process().memory_info().rss / 1e9  # Python and libraries
    config.max_new_tokens = 100
    policy = random_llava(config, shrink, "cuda" if has_gpu else "cpu")
    weights = policy.model.get_memory_footprint()
    read_rate = measure_read_rate(policy.model.device)
    device = torch.cuda.get_device_name() if has_gpu else "CPU"
    if shrink > 1:
        device += f", 1/{shrink} of width and depth"
    print(f"{PAPER_MODEL} on {device}: {weights / 1e9:.1f} GB of weights, "
          f"memory read at {read_rate / 1e9:.0f} GB/s")
    result = {"device": device}

    # Sizes that the machine bears
    if has_gpu:
        sizes = (1, 8, 32, 64)
        microbatches = (1, 4, 16)
    elif shrink > 1:
        sizes = (1, 4)
        microbatches = (1,)
    else:
        sizes = (1,)
        microbatches = (1,)
    config.num_envs = sizes[-1]
    config.microbatch = microbatches[-1]
    planned, _ = train.memory_plan(policy, config)
    policy.checkpoint_gradients()
    policy.add_lora(config.lora_rank, config.lora_alpha)

    # Sampling: reading the prompts, then a token at a time, which reads all weights and the cache
    step_seconds = {}
    for num_envs in sizes:
        games = env.Games(config.env, num_envs, 0)
        questions = questions_of(games.infos)
        answers = policy.act(games.images, questions)
        prompt = prompt_length(answers)
        act = median_seconds(rounds, policy.act, games.images, questions)
        prefill = median_seconds(rounds, policy.value, games.images, questions)
        token_rate = 99 * num_envs / (act - prefill)
        token_bytes = weights + cache_bytes(policy, num_envs, prompt + 50)
        limit = num_envs * read_rate / token_bytes
        step_seconds[num_envs] = act / num_envs
        result[f"{num_envs} environments"] = {
            "steps a second": num_envs / act, "prefill seconds": prefill,
            "tokens a second": token_rate, "limit": limit, "of the limit": token_rate / limit,
        }
        print(f"{num_envs:3} environments, prompts of {prompt:.0f} tokens: "
              f"{num_envs / act:.3g} steps/s, prompts read in {prefill:.3g} s, "
              f"then {token_rate:.3g} tokens/s, "
              f"{token_rate / limit:.0%} of the bandwidth's {limit:.3g}", flush=True)

    # Updates: forward, and forward once more for the checkpoints, and backward
    trainable = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.0, fused=True)
    flops = flops_per_sample(policy, answers)
    update_flops = 2 * flops["forward"] + flops["inputs"] + flops["adapter"]
    limit = measure_matrix_rate(policy, rows=int(4 * (prompt + 100))) / update_flops
    best_rate = 0.0
    for microbatch in microbatches:
        sample = (answers * 2)[:16]
        taken = median_seconds(rounds, update, policy, optimizer, sample, microbatch, config)
        rate = len(sample) / taken
        best_rate = max(best_rate, rate)
        result[f"update, microbatch {microbatch}"] = {
            "samples a second": rate, "of the limit": rate / limit}
        print(f"update, microbatch {microbatch:2}: {rate:.3g} samples/s, "
              f"{rate / limit:.0%} of the matrix rate's {limit:.3g}", flush=True)

    # The whole run
    num_envs = min(32, sizes[-1])
    passes = config.epochs
    if policy.model.dtype == torch.bfloat16:  # each step is scored once more before its update
        passes += flops["forward"] / update_flops
    hours = 15_000 * (step_seconds[num_envs] + passes / best_rate) / 3600
    if has_gpu:
        memory = torch.cuda.max_memory_allocated() / 1e9
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9 - memory_before
    print(f"15,000 steps with {num_envs} environments and the best update: {hours:.1f} hours; "
          f"peak memory {memory:.1f} GB, expected {planned:.1f}")
    if file:
        result |= {"hours": hours, "peak_gb": memory, "expected_gb": planned}
        file.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
