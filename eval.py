"""Evaluation: any policy on any task, over seeded episodes, with 95 % intervals.

    python eval.py --run runs/blackjack --episodes 1000 --seed 0
    python eval.py --env blackjack --policy expert --episodes 1000 --json
    python eval.py --env blackjack --model llava-hf/llava-v1.6-mistral-7b-hf

To read: the three agents and `evaluate`. An agent is a function (pictures, infos) -> list of
(action, was_legal), one for each environment. All that follows shows results in other ways.
"""
import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import env
import prompts

# -------------------------------------------------------------------------------------------------
# Agents


def random_agent(rng):
    """An agent that plays uniformly random legal actions."""
    def agent(images, infos):
        return [(str(rng.choice(info["legal_actions"])), True) for info in infos]
    return agent


def expert_agent(images, infos):
    """The task's expert, who sees the true state."""
    return [(env.expert_action(info), True) for info in infos]


def model_agent(policy, rng, style="full"):
    """An agent that asks a model: picture and prompt in, answer out, parsed by f.

    style: of the prompt; rng: chooses the action where an answer names no legal one.
    """
    def agent(images, infos):
        texts = [prompts.build_prompt(info, style) for info in infos]
        answers = policy.act(images, texts)
        return [prompts.parse_action(answer.text, info["legal_actions"], rng)
                for answer, info in zip(answers, infos)]
    return agent


# -------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(agent, name, episodes, seed=0, num_envs=64, obs="image", label="evaluation"):
    """Play `episodes` episodes of the task `name`, and return rates and means as a dict.

    Episode i is the same for every agent with the same seed. ALFWorld is played in rooms that
    training has not seen. The dict holds

        episodes, seconds
        success_rate     share of successful episodes
        ci95             its 95 % confidence interval, [low, high]
        mean_return      rewards less the penalties for illegal answers, summed over an episode
        illegal_rate     share of the steps whose answer named no legal action
        episode_length   mean number of steps
        by_task_type     type -> [success rate, episodes], where a task has several types
    """
    began = time.time()

    # Deal the first N episodes. A game that ends begins the episode of the next seed.
    num_games = min(num_envs, episodes)
    seeds = env.episode_seeds("evaluation", seed)
    games = env.Games(name, num_games, seeds, obs, evaluation=True)

    is_counted = np.ones(num_games, bool)       # (N,) does this game play one of the `episodes`?
    reward_so_far = np.zeros(num_games)         # (N,) in its present episode
    steps_so_far = np.zeros(num_games, int)     # (N,) in its present episode
    num_illegal = 0
    finished = []                               # one dict for each episode

    with tqdm(total=episodes, desc=label, unit="episode", disable=None, leave=False) as progress:
        while is_counted.any():
            # Ask the agent for an action in every game that is counted
            playing = np.flatnonzero(is_counted)
            decisions = agent(games.images[playing], [games.infos[i] for i in playing])

            # Play. All games move together, so those that are not counted play any legal action.
            actions = [info["legal_actions"][0] for info in games.infos]
            for i, (action, was_legal) in zip(playing, decisions):
                actions[i] = action
                if not was_legal:
                    num_illegal += 1
                    reward_so_far[i] -= env.GAMES[name].illegal_penalty
            step = games.step(actions, seeds)
            reward_so_far += step["rewards"]
            steps_so_far += 1

            # Note the episodes that ended, and count the next one only if it is still wanted
            ended = step["terminated"] | step["truncated"]
            for i in np.flatnonzero(ended & is_counted):
                info = step["infos"][i]
                finished.append({
                    "success": info["success"],
                    "return": reward_so_far[i],
                    "length": steps_so_far[i],
                    "task_type": info.get("task_type"),
                })
                progress.update()
                reward_so_far[i] = 0
                steps_so_far[i] = 0
                number = num_games + len(finished)  # of the episode that this game has begun
                is_counted[i] = number <= episodes

    # Sum up
    successes = [episode["success"] for episode in finished]
    lengths = [episode["length"] for episode in finished]
    result = {
        "episodes": episodes,
        "success_rate": float(np.mean(successes)),
        "ci95": wilson_interval(sum(successes), episodes),
        "mean_return": float(np.mean([episode["return"] for episode in finished])),
        "illegal_rate": num_illegal / int(np.sum(lengths)),
        "episode_length": float(np.mean(lengths)),
        "seconds": round(time.time() - began, 2),
    }

    # ALFWorld has several types of tasks: add the success of each
    by_type = {}
    for episode in finished:
        if episode["task_type"] is not None:
            by_type.setdefault(episode["task_type"], []).append(episode["success"])
    if by_type:
        result["by_task_type"] = {
            kind: [float(np.mean(by_type[kind])), len(by_type[kind])] for kind in sorted(by_type)}
    return result


def wilson_interval(successes, n, z=1.96):
    """95 % confidence interval of a rate (Wilson's score interval), as [low, high]."""
    rate = successes / n
    center = rate + z * z / (2 * n)
    half_width = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = (center - half_width) / (1 + z * z / n)
    high = (center + half_width) / (1 + z * z / n)
    return [max(low, 0.0), min(high, 1.0)]


# -------------------------------------------------------------------------------------------------
# Recognition: does the model read the picture?


def recognition(policy, name, trials, seed=0, num_envs=64, style="full", obs="image"):
    """The share of `trials` answers in which each key-state field says the truth: field -> share.

    "all" is the share of answers that are right in every field. The states come from half-random
    expert play, and are the same for every model with the same seed. Raises ValueError where the
    prompt's style asks for no field.
    """
    rng = np.random.default_rng(seed)
    num_games = min(num_envs, trials)
    seeds = env.episode_seeds("evaluation", seed)
    games = env.Games(name, num_games, seeds, obs, evaluation=True)

    # What to look for: all that the answer says before the action, but not the thoughts.
    fields = dict(prompts.answer_fields(games.infos[0], style))
    fields.pop("thoughts", None)
    if not fields:
        raise ValueError(f"--prompt {style} asks for no fields: there is nothing to recognise")

    right = []  # for each answer a list of bools, one for each field
    rounds = range(0, trials, num_games)
    for _ in tqdm(rounds, "recognition", unit="step", disable=None, leave=False):
        # Compare what the answers say with the truth
        texts = [prompts.build_prompt(info, style) for info in games.infos]
        answers = policy.act(games.images, texts)
        for answer, info in zip(answers, games.infos):
            said = read_fields(answer.text)
            right.append([same_value(said.get(key), field.truth(info))
                          for key, field in fields.items()])

        # Go on to other states: half of the actions are the expert's, half are random.
        actions = []
        for info in games.infos:
            if rng.random() < 0.5:
                actions.append(env.expert_action(info))
            else:
                actions.append(str(rng.choice(info["legal_actions"])))
        games.step(actions)

    right = np.array(right[:trials])  # (trials, fields)
    shares = {key: float(share) for key, share in zip(fields, right.mean(0))}
    shares["all"] = float(right.all(1).mean())
    return shares


MAX_ANSWER = 100_000  # characters of an answer that are looked at
OTHER_QUOTES = "'`\u201c\u201d\u2018\u2019"  # all but ", which JSON uses
# A name and its value; the closing quote or bracket may be missing. (The time is linear in the
# text: only the last repetition of each line has no limit, and behind it the pattern ends. So
# nothing is tried again.)
PAIR = re.compile(rf"""
    \b (?P<name> \w{{1,40}}) ["{OTHER_QUOTES}]? \s{{0,9}} : \s{{0,9}}    # a name, a colon, then
    (?: \[ (?P<list> [^\]]*)                                 # a list, up to its bracket
      | " (?P<quoted> [^"]*)                                 # or a text in quotes
      | [{OTHER_QUOTES}] (?P<other> [^{OTHER_QUOTES}]*)      # or in other quotes
      | (?P<bare> [^,}}\n]*)                                 # or without quotes
    )""", re.VERBOSE)


def read_fields(text):
    """What an answer says, field by field: name -> text, or list of texts.

    Like the parser of actions, it accepts other text or a Markdown fence (```) around the object,
    other quotes, and an object that was cut off. Never raises; the time is linear in the text.
    """
    text = text[:MAX_ANSWER]

    # Most answers hold one JSON object. (Without a closing brace `end` is 0. Then the piece is
    # empty, which is no JSON, and the reading below follows.)
    start = max(text.find("{"), 0)
    end = text.rfind("}") + 1
    try:
        fields = json.loads(text[start:end])
        return {name.lower(): as_text(value) for name, value in fields.items()}
    except (ValueError, RecursionError):
        pass

    # Read all others pair by pair. If a name comes twice, its first value counts: the thoughts
    # stand behind the fields, and may name them again.
    fields = {}
    for match in PAIR.finditer(text, start):
        name = match["name"].lower()
        if name in fields:
            continue
        kind = match.lastgroup  # list, quoted, other or bare
        value = match[kind].strip()
        if kind == "list":
            elements = [element.strip(f'"{OTHER_QUOTES} \n\t') for element in value.split(",")]
            value = [element for element in elements if element]
        fields[name] = value
    return fields


def as_text(value):
    """A JSON value as text, and a list as a list of texts."""
    if isinstance(value, list):
        return [str(element) for element in value]
    return str(value)


def same_value(said, truth):
    """Whether a field says the truth: 3 is "3", and neither case nor outer spaces count."""
    if isinstance(said, list) and isinstance(truth, list):
        return len(said) == len(truth) and all(map(same_value, said, truth))
    if isinstance(said, list) or isinstance(truth, list):
        return False
    return str(said).strip().lower() == str(truth).strip().lower()


def recognition_table(name, trials, shares):
    """A Markdown table of means in percent; shares: policy -> `recognition` of each of its runs."""
    first_runs = list(shares.values())[0]
    fields = list(first_runs[0])  # the same in all runs
    lines = [
        f"| {name}, {trials} answers of each run | {' | '.join(fields)} |",
        "|---" * (len(fields) + 1) + "|",
    ]
    for policy_name, runs in shares.items():
        means = [np.mean([run[field] for run in runs]) for field in fields]
        cells = [f"{100 * mean:.1f} %" for mean in means]
        lines.append(f"| {policy_name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# Tables and plots

PUBLISHED = {  # LLaVA-1.6-7B after RL, from the paper's tables
    "ezpoints": "50.0 %",
    "points24": "2.3 %",
    "alfworld": "21.7 %",
}
BOUNDS = {  # best possible success rates: computed, for an infinite deck
    "numberline": 1.0,
    "ezpoints": 1.0,
    "blackjack": 0.4316,
    "points24": 0.7309,
}
REFERENCES = {  # the policies of a run, and the colours of their lines
    "random": "#9a9a9a",
    "SFT": "#c8802e",
    "RL": "#c8102e",
    "CNN + RL": "#c8102e",
    "expert": "#1f6f54",
}


def table(rows):
    """Results as lines of text; rows: name of a policy -> what `evaluate` returned for it."""
    width = max(10, *map(len, rows))
    lines = [f"{'policy':<{width}}  success      95 % interval   return  illegal  episodes"]
    for name, row in rows.items():
        low, high = row["ci95"]
        lines.append(f"{name:<{width}} {row['success_rate']:>8.1%}  {low:>7.1%} - {high:>7.1%}  "
                     f"{row['mean_return']:>+7.2f}  {row['illegal_rate']:>7.1%}  "
                     f"{row['episodes']:>8}")

    # Add a second table, with a column for each type of tasks, where the task has several. (If few
    # episodes were played, a policy may have played none of a type.)
    kinds = sorted({kind for row in rows.values() for kind in row.get("by_task_type", {})})
    if kinds:
        titles = [f"{title:>8}" for title in [*kinds, "average"]]
        lines += ["", f"{'success in':<{width}} {' '.join(titles)}"]
        for name, row in rows.items():
            rates = {kind: rate for kind, (rate, *_) in row["by_task_type"].items()}
            cells = [f"{rates[kind]:>8.1%}" if kind in rates else f"{'-':>8}" for kind in kinds]
            cells.append(f"{sum(rates.values()) / len(rates):>8.1%}")
            lines.append(f"{name:<{width}} {' '.join(cells)}")
    return "\n".join(lines)


def read_metrics(directory):
    """The rows of a run's metrics.jsonl, a list of dicts."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def summary(rows, task):
    """What tables and figures show of a run: the evaluations on `task` and the learning curve.

    rows: of metrics.jsonl; task: one, or the several of a run with commas between them. Returns a
    dict: task, curve (list of [environment steps, success rate]), and for each policy its name ->
    its row. A run of several tasks counts their episodes together: it has one curve, of all tasks,
    and each task has its evaluations.
    """
    # Only rows of evaluations have the key "env"
    evaluations = {row["policy"]: row for row in rows if row.get("env") == task}
    tasks_of_run = {row["env"] for row in rows if "env" in row}
    curve = []
    if tasks_of_run <= set(task.split(",")):
        curve = [[row["env_steps"], row["success_rate"]] for row in rows if row["stage"] == "rl"]
    return evaluations | {"task": task, "curve": curve}


def sweep_table(runs, seeds, command):
    """The results of a sweep as Markdown: a row for each setting, a column for each policy.

    runs: name of a setting -> `summary` of each seed; seeds, command: texts that say how to make
    the table again.
    """
    summaries = [run for seed_runs in runs.values() for run in seed_runs]
    policies = [name for name in REFERENCES if any(name in run for run in summaries)]
    text = f"| | {' | '.join(policies)} | RL: illegal | paper, 7B, other pictures |\n"
    text += "|---" * (len(policies) + 3) + "|\n"

    for setting, seed_runs in runs.items():
        cells = [setting]
        for policy_name in policies:
            rates = [100 * run[policy_name]["success_rate"]
                     for run in seed_runs if policy_name in run]
            cells.append(mean_and_each(rates))
        trained = [run.get("RL", run.get("CNN + RL")) for run in seed_runs]
        illegal = np.mean([row["illegal_rate"] for row in trained])
        cells.append(f"{100 * illegal:.1f} %")
        cells.append(PUBLISHED.get(seed_runs[0]["task"], ""))
        text += f"| {' | '.join(cells)} |\n"

    # ALFWorld may have fewer episodes than other tasks
    counts = {run[name]["episodes"] for run in summaries for name in policies if name in run}
    episodes = " or ".join(str(count) for count in sorted(counts))
    text += f"\nSuccess on {episodes} episodes, mean of seeds {seeds} (in brackets each).\n"
    text += f"`{command}`\n"
    return text


def mean_and_each(rates):
    """Text like "50.0 % (48.0, 52.0)": the mean of rates in percent, and each of them."""
    if not rates:
        return ""
    each = ", ".join(f"{rate:.1f}" for rate in rates)
    return f"{np.mean(rates):.1f} % ({each})"


def plot(runs):
    """A matplotlib figure with a panel for each task: learning curves, and other policies' rates.

    runs: name of a setting -> `summary` of each seed. A single run is one setting with one seed.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(seed_runs[0]["task"] for seed_runs in runs.values()))
    num_columns = min(len(tasks), 2)
    num_rows = (len(tasks) + 1) // 2
    figure = Figure(figsize=(6 * num_columns, 4 * num_rows), layout="constrained")

    for panel, task in enumerate(tasks, 1):
        axes = figure.add_subplot(num_rows, num_columns, panel)
        settings = {name: seed_runs for name, seed_runs in runs.items()
                    if seed_runs[0]["task"] == task}
        draw_curves(axes, task, settings)
        draw_references(axes, task, settings)

        axes.set(title=task, xlabel="environment steps", ylabel="success rate")
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_curves(axes, task, settings):
    """Draw each setting's mean curve, and a band from its lowest seed to its highest.

    One rollout has few episodes, so curves are means over several. If there is but one run, each
    rollout is shown too, as a dot.
    """
    for name, seed_runs in settings.items():
        steps = [step for step, _ in seed_runs[0]["curve"]]
        # (seeds, updates); None, where no episode ended, becomes NaN and leaves a gap.
        rates = np.array([[rate for _, rate in run["curve"]] for run in seed_runs], float)
        smooth = moving_mean(rates)
        label = name.removeprefix(f"{task}, ")
        line, = axes.plot(steps, smooth.mean(0), label=f"{label} (mean of {SMOOTHING} rollouts)")
        color = line.get_color()
        axes.fill_between(steps, smooth.min(0), smooth.max(0), color=color, alpha=0.15, lw=0)
        if len(settings) == len(seed_runs) == 1:
            axes.plot(steps, rates[0], ".", color=color, alpha=0.35, label="each rollout")


SMOOTHING = 4  # rollouts


def moving_mean(rates):
    """Each rate (seeds, updates) becomes the mean of itself and up to SMOOTHING - 1 before it.

    NaN is left out of the means.
    """
    smooth = np.empty_like(rates)
    for i in range(rates.shape[1]):
        first = max(i + 1 - SMOOTHING, 0)
        window = np.ma.masked_invalid(rates[:, first: i + 1])
        smooth[:, i] = window.mean(1).filled(np.nan)
    return smooth


def draw_references(axes, task, settings):
    """Draw dashed lines for evaluated policies, dotted ones for what is possible."""
    # SFT and RL differ from setting to setting: their lines are drawn if there is one setting.
    names = list(REFERENCES) if len(settings) == 1 else ["random", "expert"]
    all_runs = [run for seed_runs in settings.values() for run in seed_runs]
    for name in names:
        rates = [run[name]["success_rate"] for run in all_runs if name in run]
        if rates:
            mean = np.mean(rates)
            axes.axhline(mean, ls="--", lw=1.2, color=REFERENCES[name], label=f"{name} {mean:.1%}")

    if task in BOUNDS:
        label = f"best possible {BOUNDS[task]:.2%}"
        axes.axhline(BOUNDS[task], ls=":", lw=1.2, color="black", label=label)
        at_least = "at least " if task == "points24" else ""  # see `BLIND`
        label = f"best without looking {at_least}{env.BLIND[task]:.2%}"
        axes.axhline(env.BLIND[task], ls=":", lw=1.2, color="#9a9a9a", label=label)


def bounds_line(task):
    """What is possible in a task, as a line for below its table; "" where it was not computed."""
    if task not in BOUNDS:
        return ""
    bound = "at least" if task == "points24" else "at best"  # see `BLIND` in env.py
    return (f"success without looking at the picture: {bound} {env.BLIND[task]:.2%}; "
            f"best possible: {BOUNDS[task]:.2%}")


# -------------------------------------------------------------------------------------------------
# Animation


def animate(policy, name, episodes, seed, file, style="full", obs="image"):
    """Write episodes to `file` as an animated GIF, or as a contact sheet if it ends in .png.

    Each frame shows a picture, and what the model says it sees, thinks and does. What is false is
    red: fields and thoughts that an expert would not write here. A legal action is never red. After
    each episode a frame shows its end.
    """
    rng = np.random.default_rng(seed)
    seeds = env.episode_seeds("evaluation", seed)
    games = env.Games(name, 1, seeds, obs, evaluation=True)
    frames = []  # (picture, milliseconds)

    for _ in range(episodes):
        total_reward = 0.0
        over = False
        while not over:
            # Ask the model
            info = games.infos[0]
            image = games.images[0].copy()  # the next step draws over it
            answer, = policy.act(games.images, [prompts.build_prompt(info, style)])
            action, was_legal = prompts.parse_action(answer.text, info["legal_actions"], rng)

            # Show the picture and the answer, and mark what is wrong with it
            notes = [f"value {answer.value:+.2f}"]
            if not was_legal:
                notes.append(f"no legal action: plays {action}")
            truth = json.loads(prompts.demonstration(info, action, style))
            frames.append((draw_frame(image, mark_answer(answer.text, truth), notes), 1600))

            step = games.step([action], seeds)
            reward = step["rewards"][0]
            if not was_legal:
                reward -= env.GAMES[info["env"]].illegal_penalty
            total_reward += reward
            over = step["terminated"][0] or step["truncated"][0]

        # Show the last picture, and what came of the episode
        outcome = "success" if step["infos"][0]["success"] else "no success"
        notes = [f"reward {reward:+.0f}", f"{outcome}, return {total_reward:+.0f}"]
        frames.append((draw_frame(step["last_images"][0], [], notes), 2400))

    pictures, durations = zip(*frames)
    if file.suffix.lower() == ".png":
        contact_sheet(pictures).save(file)
    else:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:],
                         duration=durations, loop=0, optimize=True)


def mark_answer(text, truth):
    """The fields of an answer as a list of (name, value in ASCII, is it the truth?)."""
    fields = read_fields(text) or {"answer": text}
    marked = []
    for name, value in fields.items():
        printable = str(value).encode("ascii", "replace").decode()
        is_true = name in truth and same_value(value, truth[name])
        marked.append((name, printable, is_true))
    return marked


def draw_frame(image, fields, notes):
    """A frame: at the left the game, at the right an answer, field by field, and notes below it."""
    frame = Image.new("RGB", (2 * env.SIZE + 60, env.SIZE), "#f4f1ea")
    frame.paste(Image.fromarray(image))
    draw = ImageDraw.Draw(frame)
    x = env.SIZE + 16

    # Write the answer from the top down, each field under its name
    y = 14
    for name, value, is_true in fields:
        draw.text((x, y), name, "#8a8578", env.font(13))
        y += 16
        color = "#101820" if is_true else "#c8102e"
        for line in textwrap.wrap(value, 36) or [""]:
            draw.text((x, y), line, color, env.font(17))
            y += 20
        y += 6

    # Write the notes from the bottom up
    for i, note in enumerate(notes):
        draw.text((x, env.SIZE - 28 - 22 * i), note, "#28518f", env.font(16))
    return frame.quantize(64)


def contact_sheet(pictures):
    """All pictures in one, two in a row."""
    width, height = pictures[0].size
    num_rows = math.ceil(len(pictures) / 2)
    sheet = Image.new("RGB", (2 * width, num_rows * height), "white")
    for i, picture in enumerate(pictures):
        column = i % 2
        row = i // 2
        sheet.paste(picture, (column * width, row * height))
    return sheet.quantize(64)


# -------------------------------------------------------------------------------------------------
# Models behind an API


class ApiError(Exception):
    """Why a model behind an API cannot go on, in one line: a refusal, or no more requests."""


class ApiModel:
    """A model behind an OpenAI-compatible chat completion endpoint; `act` as in `VLMPolicy`.

    Every answer is kept in the file `cache` (JSON lines), so an evaluation that stopped goes on
    without paying twice. Refusals (429), faults of the server (5xx) and time-outs are asked again,
    `tries` times, after 1, 2, 4, ... seconds. A reply that is no chat completion, or is longer
    than `max_bytes`, counts as an empty answer. Raises ApiError where the server refuses for good,
    or `max_requests` are spent.
    """
    tries = 6
    max_bytes = 1_000_000
    max_characters = 10_000
    num_threads = 8

    def __init__(self, base, name, key, cache, max_requests=math.inf, max_tokens=512,
                 timeout=60, wait=time.sleep):
        import httpx2  # an HTTP client; imported here and below because training needs none

        self.base = base
        self.name = name
        self.key = key
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.timeout = timeout
        self.wait = wait
        self.url = f"{base.rstrip('/')}/chat/completions"
        try:
            host = httpx2.URL(self.url).host
        except httpx2.InvalidURL:
            host = ""
        if not host:
            raise ApiError(f"--api-base {base!a} is no address of a server")
        headers = {"Authorization": f"Bearer {key or 'none'}"}
        self.client = httpx2.Client(timeout=timeout, headers=headers)

        self.lock = threading.Lock()    # of `requests`, new `answers` and the file: threads share
        self.requests = 0               # sent by this process
        self.num_answers = 0            # given, of the cache or of the server
        self.num_cut_off = 0            # of these
        self.times_asked = Counter()    # question -> how often `act` met it
        self.answers = {}               # question and number -> (text, was it cut off?)
        self._open_cache(cache)

    def act(self, images, prompts):
        """Answers, each with a `text`, to N pictures (uint8, N x H x W x 3) and N prompts."""
        # A state that comes again is asked again, because each answer is another sample.
        keys = []
        for image, prompt in zip(images, prompts):
            content = f"{self.name}\0{prompt}\0".encode() + image.tobytes()
            question = hashlib.sha256(content).hexdigest()
            self.times_asked[question] += 1
            keys.append(f"{question}-{self.times_asked[question]}")

        with ThreadPoolExecutor(self.num_threads) as pool:
            answers = list(pool.map(self._answer, keys, images, prompts))

        self.num_answers += len(answers)
        self.num_cut_off += sum(cut_off for _, cut_off in answers)
        return [SimpleNamespace(text=text) for text, _ in answers]

    def _answer(self, key, image, prompt):
        """(text, was it cut off?) from the cache, or from the server."""
        if key not in self.answers:
            text, cut_off = self._ask(image, prompt)
            with self.lock:
                self._keep(key, text, cut_off)
        return self.answers[key]

    # -- the cache: a line is {key: text}, with "cut_off": true if the answer has no end -----------

    def _open_cache(self, cache):
        """Read the answers in the file `cache`, and open it for more."""
        cache.parent.mkdir(parents=True, exist_ok=True)
        self.file = cache.open("a")

        # Text after the last line's end was left by a process that was killed: drop it. It begins
        # with a brace; what does not is another file, which must not be cut.
        *lines, torn = cache.read_bytes().split(b"\n")
        for line in lines:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("it is no file of answers")
            cut_off = entry.pop("cut_off", False)
            for key, text in entry.items():
                self.answers[key] = (text, cut_off)
        if torn and not torn.startswith(b"{"):
            raise ValueError("it is no file of answers")
        self.file.truncate(cache.stat().st_size - len(torn))

    def _keep(self, key, text, cut_off):
        """Keep an answer. One that was cut off before its first word is not written to the file:
        the next process asks again, perhaps with a larger `max_tokens`."""
        self.answers[key] = (text, cut_off)
        if cut_off and not text.strip():
            return
        entry = {key: text}
        if cut_off:
            entry["cut_off"] = True
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    # -- the server --------------------------------------------------------------------------------

    def _ask(self, image, prompt):
        """(text, was it cut off?) from the server; asks again where the trouble may pass."""
        question = self._question(image, prompt)
        for attempt in range(self.tries):
            self._count_request()
            body, reason, may_pass = self._try_once(question)
            if body is not None:
                return self._read(body)
            if not may_pass:
                break
            self.wait(2 ** attempt)

        # The reason is the server's text: show neither the key nor control characters.
        if self.key:
            reason = reason.replace(self.key, "(key)")
        raise ApiError(f"{self.base}: {ascii(reason)[1:-1][:300]}")

    def _try_once(self, question):
        """(the reply's body, None, None), or (None, why there is none, whether that may pass)."""
        import httpx2

        try:
            status, body = self._post(question)
        except httpx2.RequestError as error:
            return None, type(error).__name__, True
        if 200 <= status < 300:
            return body, None, None
        may_pass = status >= 500 or status in (408, 429)  # the server's trouble, or too many asked
        return None, f"{status} {body.decode(errors='replace')}", may_pass

    def _question(self, image, prompt):
        """The request as a dict: the picture, as PNG within an address, and the prompt."""
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": address}},
            {"type": "text", "text": prompt},
        ]
        messages = [{"role": "user", "content": content}]
        return {"model": self.name, "messages": messages, "max_tokens": self.max_tokens}

    def _count_request(self):
        """Count a request, before it is sent. Raises ApiError where no more are allowed."""
        with self.lock:
            if self.requests >= self.max_requests:
                raise ApiError(f"--max-requests {self.max_requests} are spent; "
                               "the same line goes on from there")
            self.requests += 1

    def _post(self, question):
        """Send a request; (status, body). Give up a reply that is too long, or comes too slowly."""
        import httpx2

        body = b""
        with self.client.stream("POST", self.url, json=question) as response:
            deadline = time.monotonic() + self.timeout
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > self.max_bytes:
                    break
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout("the reply comes too slowly")
        return response.status_code, body

    def _read(self, body):
        """(text, was it cut off?) of a chat completion; ("", False) where `body` is none."""
        if len(body) > self.max_bytes:
            return "", False
        try:
            choice = json.loads(body)["choices"][0]
            text = str(choice["message"]["content"] or "")
            cut_off = choice.get("finish_reason") == "length"
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return "", False
        return text[:self.max_characters], cut_off


# -------------------------------------------------------------------------------------------------
# Command line


def number(kind, low, high=math.inf):
    """A type for argparse: finite numbers of a `kind`, int or float, from `low` to `high`."""
    noun = "whole number" if kind is int else "number"
    limits = f"a {noun} of at least {low}"
    if high < math.inf:
        limits += f" and at most {high}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high and value < math.inf:  # false for NaN
            return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {limits}")

    return parse


positive_int = number(int, 1)
natural_int = number(int, 0, 2**32 - 1)


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage=argparse.SUPPRESS)  # without a usage text an error is one line

    add = parser.add_argument_group("whom to evaluate").add_argument
    add("--run", type=Path, nargs="+",
        help="directory of a training run, whose model is evaluated")
    add("--model", help="a model zero-shot instead: of the hub, or a folder")
    add("--policy", choices=["random", "expert", "untrained", "sft", "rl"],
        help="random and expert need no run; untrained, sft and rl are policies of --run [rl]")

    add = parser.add_argument_group("on what").add_argument
    add("--env", choices=env.GAMES, help="the task [the run's]")
    add("--episodes", type=positive_int, help="episodes to play [1000, for --gif 4]")
    add("--seed", type=natural_int, default=0,
        help="fixes the episodes and the sampling [%(default)s]")
    add("--num-envs", type=positive_int,
        help="episodes played at a time [the run's; with --model 16, else 64]")
    add("--json", action="store_true", help="print one JSON object and nothing else")

    add = parser.add_argument_group("other results").add_argument
    add("--recognition", action="store_true",
        help="count how often the model reads the picture right; without --policy a table of "
             "untrained, sft and rl, the means of all --run")
    add("--trials", type=positive_int, default=1000,
        help="answers of --recognition [%(default)s]")
    add("--gif", type=Path, metavar="FILE",
        help="write episodes as an animation (.gif) or a contact sheet (.png): picture, thoughts, "
             "action")

    add = parser.add_argument_group("--run and --model").add_argument
    add("--device", choices=["cuda", "mps", "cpu"],
        help="of the model [the run's, for --model the first of these that is there]")
    add("--dtype", choices=["bfloat16", "float32"],
        help="of the weights [the run's, for --model bfloat16 on cuda, else float32]")
    add("--temperature", type=number(float, 1e-12),
        help="of sampling [the run's, for --model 0.2]")
    add("--max-new-tokens", type=positive_int,
        help="longest answer [the run's, for --model 256]")
    add("--trust-remote-code", action="store_true",
        help="run Python code that the model brings along")

    add = parser.add_argument_group("models behind an API").add_argument
    add("--api-base", metavar="URL",
        help="an OpenAI-compatible endpoint, up to /v1; its key in API_KEY")
    add("--api-model", metavar="NAME", help="the model's name there")
    add("--max-tokens", type=positive_int, default=512,
        help="longest answer, in tokens [%(default)s]")
    add("--max-requests", type=positive_int, default=math.inf, help="stop before there are more")
    add("--cache", type=Path, default=Path("runs/api-cache.jsonl"),
        help="file for all answers, each paid for once [%(default)s]")
    return parser


def check_flags(parser, args):
    """End in one line where flags are missing or do not belong together."""
    is_scripted = args.policy in ("random", "expert")
    sources = [args.run, args.model, args.api_base, is_scripted]
    num_sources = sum(1 for source in sources if source)
    if num_sources != 1:
        parser.error("name one of --run, --model, --api-base, or --policy random or expert: "
                     "whom to evaluate")
    if not args.run and not args.env:
        parser.error("--env is needed, where no run tells it")

    if args.run and len(args.run) > 1:
        if args.policy or not args.recognition:
            parser.error("several runs are for --recognition without --policy")
    if args.recognition and (is_scripted or args.gif):
        parser.error("--recognition is for a model that reads pictures, and without --gif")

    if not args.run and not args.model:
        if args.gif:
            parser.error("--gif is for games of a --run or --model")
        if args.temperature or args.max_new_tokens:
            parser.error("--temperature and --max-new-tokens are for a --run or --model")
    if args.gif:
        if args.gif.suffix.lower() not in (".gif", ".png"):
            parser.error(f"--gif {args.gif}: its name must end in .gif or .png")

    if args.api_base:
        is_address = args.api_base.startswith(("http://", "https://"))
        if not is_address or not args.api_model:
            parser.error("--api-base needs a URL, and --api-model NAME")


@dataclass
class Player:
    """Whom to evaluate, and on what."""
    name: str           # of the policy, as in the results
    task: str
    policy: object      # VLMPolicy, CNNPolicy or ApiModel; None for random and expert
    style: str = "full"
    obs: str = "image"
    num_envs: int = 64  # episodes played at a time


def load_player(args):
    """The player that --policy, --model or --run names. Raises ValueError where it cannot be."""
    if args.policy in ("random", "expert"):
        return Player(args.policy, args.env, policy=None)
    if args.model:
        name = args.model
        policy, config = load(args)
    else:
        name = args.policy or "rl"
        policy, config = load(args, args.run[0], name)
    return Player(name, args.env or config.env, policy, config.prompt, config.obs, config.num_envs)


def load(args, directory=None, which="untrained"):
    """(policy, configuration) of the run in `directory`, or of --model if there is none.

    which: "rl", "sft" or "untrained". Raises ValueError where there is no such policy.
    """
    # These modules take seconds to import: only here, where a model is needed.
    import torch

    from policy import load_policy, read_config

    try:
        # The run says how to build its policy; flags that were given have the last word.
        if directory:
            config = read_config(directory, args.trust_remote_code)
            check_task(args, config)
        else:
            config = zero_shot_config(args)
        override(config, args)
        if config.device != "cpu" and not getattr(torch, config.device).is_available():
            raise ValueError(f"there is no {config.device} here: try --device cpu")

        policy = load_policy(config, directory, which)
    except (OSError, ValueError, KeyError, TypeError, AttributeError,
            torch.OutOfMemoryError) as error:
        raise ValueError(f"cannot load {directory or args.model}: {first_line(error)}") from error

    torch.manual_seed(args.seed)
    return policy, config


def check_task(args, config):
    """Raise ValueError where the run of `config` cannot play --env."""
    task = args.env or config.env
    if task not in env.GAMES:
        raise ValueError(f"it plays several tasks: name one of {task} with --env")
    if config.policy == "cnn" and task != config.env:
        raise ValueError(f"a CNN has the actions of its own task, {config.env}")


def zero_shot_config(args):
    """The configuration of --model, as a training run would have it."""
    import torch

    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
    elif torch.backends.mps.is_available():
        device = "mps"

    return argparse.Namespace(
        env=args.env, policy="vlm", model=args.model, prompt="full", obs="image",
        image_tiles="one", alfworld="text", device=device, num_envs=16,
        dtype="bfloat16" if device == "cuda" else "float32", quantize=None,
        temperature=0.2, max_new_tokens=256, seed=args.seed, gradient_checkpointing=False,
        trust_remote_code=args.trust_remote_code)


def override(config, args):
    """Put the flags that were given in the place of the run's settings."""
    if args.device and args.device != config.device:
        config.device = args.device
        if args.device != "cuda":
            config.dtype = "float32"  # elsewhere bfloat16 is slow, or missing
    for name in ("dtype", "num_envs", "temperature", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None:
            setattr(config, name, value)


def first_line(error):
    """An exception's text, its first line alone."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


# -- the four modes: each of the first three returns the results as a dict, and as text ------------


def play(args, player):
    """Play episodes, or with --recognition ask only what the pictures show."""
    result = {"env": player.task, "policy": player.name}
    num_envs = args.num_envs or player.num_envs
    if args.recognition:
        shares = recognition(player.policy, player.task, args.trials, args.seed, num_envs,
                             player.style, player.obs)
        result |= {"trials": args.trials, "recognition": shares}
        return result, recognition_table(player.task, args.trials, {player.name: [shares]})

    rng = np.random.default_rng(args.seed)
    if player.policy is not None:
        agent = model_agent(player.policy, rng, player.style)
    elif player.name == "random":
        agent = random_agent(rng)
    else:
        agent = expert_agent
    episodes = args.episodes or 1000
    result |= evaluate(agent, player.task, episodes, args.seed, num_envs, player.obs)
    lines = [f"{player.task}, seed {args.seed}", table({player.name: result})]
    return result, "\n".join([*lines, bounds_line(player.task)]).rstrip()


def play_api(args):
    """Do what `play` does, with the model behind --api-base."""
    try:
        model = ApiModel(args.api_base, args.api_model, os.environ.get("API_KEY"), args.cache,
                         args.max_requests, args.max_tokens)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ApiError(f"cannot use --api-base with --cache {args.cache}: {reason}") from None

    result, text = play(args, Player(f"api:{args.api_model}", args.env, model))
    result |= {"requests": model.requests, "cut_off": model.num_cut_off}
    if model.num_cut_off and not args.json:
        print(f"{model.num_cut_off} of {model.num_answers} answers were cut off at --max-tokens "
              f"{args.max_tokens}", file=sys.stderr)
    return result, text


def compare_recognition(args):
    """Does RL improve seeing? Recognition before SFT, after SFT and after RL, in every --run."""
    shares = {"untrained": [], "sft": [], "rl": []}
    for which in shares:
        for directory in args.run:
            policy, config = load(args, directory, which)
            if args.env is None:
                args.env = config.env  # the first run tells the task of all
            shares[which].append(recognition(
                policy, args.env, args.trials, args.seed, config.num_envs, config.prompt,
                config.obs))
    return shares, recognition_table(args.env, args.trials, shares)


def write_gif(args):
    """Write the animation or contact sheet of --gif."""
    player = load_player(args)
    animate(player.policy, player.task, args.episodes or 4, args.seed, args.gif,
            player.style, player.obs)


def main():
    parser = make_parser()
    args = parser.parse_args()
    check_flags(parser, args)

    try:
        if args.gif:
            write_gif(args)
            return
        if args.api_base:
            result, text = play_api(args)
        elif args.recognition and not args.policy and args.run:
            result, text = compare_recognition(args)
        else:
            result, text = play(args, load_player(args))
    except (ApiError, OSError, ValueError) as error:  # refused, no data, a full disk, ...
        parser.error(first_line(error))
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        parser.error("out of memory: try a smaller --num-envs")

    print(json.dumps(result) if args.json else text)


if __name__ == "__main__":
    # A name that the terminal cannot show is printed as \x.., and is no error
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # what shells report for Ctrl-C: 128 + signal 2
