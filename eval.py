"""Evaluation: any policy on any task, over seeded episodes, with 95 % intervals.

    python eval.py --run runs/blackjack --episodes 1000 --seed 0
    python eval.py --env blackjack --policy expert --episodes 1000 --json

An agent is a function (pictures, infos) -> list of (action, was_legal), one for each environment.
"""
import base64
import hashlib
import io
import itertools
import json
import math
import os
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import env
import prompts

EVAL_SEEDS = 1_000_000  # evaluation episodes are seeded from here on, training episodes below


def random_agent(rng):
    """Uniformly random legal actions."""
    return lambda images, infos: [(str(rng.choice(info["legal_actions"])), True) for info in infos]


def expert_agent(images, infos):
    """The task's expert, who sees the true state."""
    return [(env.expert_action(info), True) for info in infos]


def model_agent(policy, rng, style="full"):
    """A vision-language model: picture and prompt in, answer out, parsed by f; style: of the prompt."""
    def agent(images, infos):
        answers = policy.act(images, [prompts.build_prompt(info, style) for info in infos])
        return [prompts.parse_action(answer.text, info["legal_actions"], rng) for answer, info in zip(answers, infos)]
    return agent


class ApiError(Exception):
    """What a server behind --api-base refused, or that the limit of requests is reached, in one line."""


class ApiModel:
    """A model behind an OpenAI-compatible chat completion endpoint, zero-shot; `act` as in `VLMPolicy`, texts alone.

    Every answer is kept in the file `cache` (JSON lines), so that an evaluation that stopped goes on without paying
    twice. Refusals (429), faults of the server (5xx) and time-outs are asked again, `tries` times, after 1, 2, 4, ...
    seconds. What is no chat completion, or longer than `max_bytes`, counts as an empty answer. Raises ApiError where
    the server refuses for good or `max_requests` are spent.
    """
    tries, max_bytes, max_characters = 6, 1_000_000, 10_000

    def __init__(self, base, name, key, cache, max_requests=math.inf, timeout=60, wait=time.sleep):
        self.client = httpx2.Client(timeout=timeout, headers={"Authorization": f"Bearer {key or 'none'}"})
        self.url = f"{base.rstrip('/')}/chat/completions"
        self.base, self.name, self.key, self.max_requests, self.wait = base, name, key, max_requests, wait
        self.requests, self.asked, self.lock, self.known = 0, Counter(), threading.Lock(), {}
        cache.parent.mkdir(parents=True, exist_ok=True)
        self.file = cache.open("a")
        whole, end, _ = cache.read_bytes().rpartition(b"\n")  # what follows was torn by the end of a process
        for line in whole.splitlines():
            self.known |= json.loads(line)
        self.file.truncate(len(whole + end))

    def act(self, images, prompts):
        """Answers, each with a `text`, to N pictures (uint8, N x H x W x 3) and prompts."""
        keys = []
        for image, prompt in zip(images, prompts):  # a state that comes again is asked again, for another sample
            question = hashlib.sha256(f"{self.name}\0{prompt}\0".encode() + image.tobytes()).hexdigest()
            self.asked[question] += 1
            keys.append(f"{question}-{self.asked[question]}")
        with ThreadPoolExecutor(8) as pool:
            return [SimpleNamespace(text=text) for text in pool.map(self._answer, keys, images, prompts)]

    def _answer(self, key, image, prompt):
        if key not in self.known:
            text = self._ask(image, prompt)
            with self.lock:
                self.known[key] = text
                self.file.write(json.dumps({key: text}) + "\n")
                self.file.flush()
        return self.known[key]

    def _ask(self, image, prompt):
        Image.fromarray(image).save(picture := io.BytesIO(), "PNG")
        url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
        question = {"model": self.name, "messages": [{"role": "user", "content": content}], "max_tokens": 512}
        for attempt in range(self.tries):
            with self.lock:
                if self.requests >= self.max_requests:
                    raise ApiError(f"--max-requests {self.max_requests} are spent; the same line goes on from there")
                self.requests += 1
            try:
                with self.client.stream("POST", self.url, json=question) as response:
                    body, began = b"", time.monotonic()
                    for chunk in response.iter_bytes():
                        body += chunk
                        if len(body) > self.max_bytes:
                            return ""
                        if time.monotonic() - began > self.client.timeout.read:  # it drips in
                            raise httpx2.ReadTimeout("too slow")
                if response.is_success:
                    return str(json.loads(body)["choices"][0]["message"]["content"] or "")[:self.max_characters]
                reason = f"{response.status_code} {body.decode(errors='replace')}"
                if response.status_code < 500 and response.status_code not in (408, 429):
                    break
            except httpx2.RequestError as error:
                reason = type(error).__name__
            except (ValueError, TypeError, LookupError, RecursionError):
                return ""
            self.wait(2 ** attempt)
        reason = reason.replace(self.key, "(key)") if self.key else reason
        raise ApiError(f"{self.base}: {ascii(reason)[1:-1][:300]}")


def wilson_interval(successes, n, z=1.96):
    """95 % confidence interval of a rate (Wilson's score interval), as [low, high]."""
    p = successes / n
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max((center - half) / (1 + z * z / n), 0.0), min((center + half) / (1 + z * z / n), 1.0)]


def evaluate(agent, name, episodes, seed=0, num_envs=64, obs="image", label="evaluation"):
    """Play `episodes` episodes of the task `name`; episode i is the same for every agent with the same seed.

    ALFWorld is played in rooms that training has not seen.

    Returns a dict: episodes, success_rate, ci95 ([low, high]), mean_return, illegal_rate (share of steps whose answer
    named no legal action), episode_length (mean, in steps), seconds; and where the task has several types,
    by_task_type: type -> [success rate, episodes].
    """
    began, n, first = time.time(), min(num_envs, episodes), EVAL_SEEDS * (seed + 1)
    games, seeds = env.Games(name, n, first, obs, evaluation=True), itertools.count(first + n)
    active, returns, lengths, illegal = np.ones(n, bool), np.zeros(n), np.zeros(n, int), 0
    finished = []  # (success, return, length, type of task) of each episode
    with tqdm(total=episodes, desc=label, unit="episode", disable=None, leave=False) as bar:
        while active.any():
            playing = np.flatnonzero(active)
            actions = [info["legal_actions"][0] for info in games.infos]
            answers = agent(games.images[playing], [games.infos[i] for i in playing])
            for i, (action, was_legal) in zip(playing, answers):
                actions[i] = action
                illegal += not was_legal
                returns[i] -= 0 if was_legal else env.GAMES[name].illegal_penalty
            step = games.step(actions, seeds)
            returns, lengths = returns + step["rewards"], lengths + 1
            for i in np.flatnonzero((step["terminated"] | step["truncated"]) & active):
                info = step["infos"][i]
                finished.append((info["success"], returns[i], lengths[i], info.get("task_type")))
                bar.update()
                returns[i] = lengths[i] = 0
                active[i] = n + len(finished) <= episodes  # else its place is played on, but not counted
    success, returns, lengths, kinds = map(np.array, zip(*finished))
    types = {kind: [float(success[kinds == kind].mean()), int((kinds == kind).sum())]
             for kind in sorted({*kinds.tolist()} - {None})}
    result = {"episodes": episodes, "success_rate": float(success.mean()),
              "ci95": wilson_interval(success.sum(), episodes), "mean_return": float(returns.mean()),
              "illegal_rate": illegal / int(lengths.sum()), "episode_length": float(lengths.mean()),
              "seconds": round(time.time() - began, 2)}
    return result | ({"by_task_type": types} if types else {})


def read_fields(text):
    """The fields of an answer; none where it is no JSON object."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return {}


def recognition(policy, name, trials, seed=0, num_envs=64, style="full", obs="image"):
    """Does the model read the picture? Share of `trials` answers in which each key-state field says the truth.

    The states come from half-random expert play with the seed, the same for every model. Returns a dict field -> share,
    and "all" for the share of answers right in every field.
    """
    rng, fields, right, n = np.random.default_rng(seed), prompts.TASKS[name].fields, [], min(num_envs, trials)
    games = env.Games(name, n, EVAL_SEEDS * (seed + 1), obs, evaluation=True)
    for _ in tqdm(range(0, trials, n), "recognition", unit="step", disable=None, leave=False):
        answers = policy.act(games.images, [prompts.build_prompt(info, style) for info in games.infos])
        for answer, info in zip(answers, games.infos):
            said = read_fields(answer.text)
            right.append([said.get(field) == truth(info) for field, (_, truth) in fields.items()])
        games.step([env.expert_action(info) if rng.random() < 0.5 else str(rng.choice(info["legal_actions"]))
                    for info in games.infos])
    right = np.array(right[:trials])
    return {field: float(share) for field, share in zip(fields, right.mean(0))} | {"all": float(right.all(1).mean())}


def recognition_table(name, trials, shares):
    """A Markdown table of means in percent; shares: policy -> what `recognition` returned for each of its runs."""
    fields = list(next(iter(shares.values()))[0])
    lines = [f"| {name}, {trials} answers of each run | {' | '.join(fields)} |", "|---" * (len(fields) + 1) + "|"]
    for which, runs in shares.items():
        cells = [f"{100 * np.mean([run[field] for run in runs]):.1f} %" for field in fields]
        lines.append(f"| {which} | {' | '.join(cells)} |")
    return "\n".join(lines)


def animate(policy, name, episodes, seed, file, style="full", obs="image"):
    """Write episodes as an animated GIF, or as a contact sheet if `file` ends in .png: the picture, what the model says
    it sees, thinks and does, and what came of it.

    A key-state field or thought that is not what an expert would have said of this state is marked red.
    """
    games, rng = env.Games(name, 1, EVAL_SEEDS * (seed + 1), obs, evaluation=True), np.random.default_rng(seed)
    frames, total = [], 0.0  # frames: (picture, milliseconds)
    while episodes:
        info, image = games.infos[0], games.images[0].copy()  # the next step draws over it
        answer, = policy.act(games.images, [prompts.build_prompt(info, style)])
        action, was_legal = prompts.parse_action(answer.text, info["legal_actions"], rng)
        truth = json.loads(prompts.demonstration(info, action, style))
        said = {key: (str(value).encode("ascii", "replace").decode(), value == truth.get(key))
                for key, value in (read_fields(answer.text) or {"answer": answer.text}).items()}
        notes = [f"value {answer.value:+.2f}"] + [f"no legal action: plays {action}"] * (not was_legal)
        frames.append((_frame(image, said, notes), 1600))
        step = games.step([action])
        total += step["rewards"][0]
        if step["terminated"][0] or step["truncated"][0]:
            end = f"{'success' if step['infos'][0]['success'] else 'no success'}, return {total:+.0f}"
            frames.append((_frame(step["last_images"][0], {}, [f"reward {step['rewards'][0]:+.0f}", end]), 2400))
            episodes, total = episodes - 1, 0.0
    pictures, durations = zip(*frames)
    if file.suffix == ".png":
        width, height = pictures[0].size
        sheet = Image.new("RGB", (2 * width, math.ceil(len(pictures) / 2) * height), "white")
        for i, picture in enumerate(pictures):
            sheet.paste(picture, (i % 2 * width, i // 2 * height))
        return sheet.quantize(64).save(file)
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)


def _frame(image, said, notes):
    """One picture of the animation: the game at the left, at the right the answer, field by field, and the notes."""
    frame = Image.new("RGB", (2 * env.SIZE + 60, env.SIZE), "#f4f1ea")
    frame.paste(Image.fromarray(image))
    draw, x, y = ImageDraw.Draw(frame), env.SIZE + 16, 14
    for key, (value, is_true) in said.items():
        draw.text((x, y), key, "#8a8578", env.font(13))
        y += 16
        for line in textwrap.wrap(value, 36) or [""]:
            draw.text((x, y), line, "#101820" if is_true else "#c8102e", env.font(17))
            y += 20
        y += 6
    for i, note in enumerate(notes):
        draw.text((x, env.SIZE - 28 - 22 * i), note, "#28518f", env.font(16))
    return frame.quantize(64)


def table(rows):
    """Results as lines of text; rows: dict of policy name -> what `evaluate` returns."""
    wide = max(10, *map(len, rows))
    lines = [f"{'policy':<{wide}}  success      95 % interval   return  illegal  episodes"]
    for name, r in rows.items():
        low, high = r["ci95"]
        lines.append(f"{name:<{wide}} {r['success_rate']:>8.1%}  {low:>7.1%} - {high:>7.1%}  "
                     f"{r['mean_return']:>+7.2f}  {r['illegal_rate']:>7.1%}  {r['episodes']:>8}")
    if kinds := next(iter(rows.values())).get("by_task_type"):
        lines += ["", f"{'success in':<{wide}} " + " ".join(f"{kind:>8}" for kind in [*kinds, "average"])]
        for name, r in rows.items():
            rates = [r["by_task_type"].get(kind, [math.nan])[0] for kind in kinds]
            lines.append(f"{name:<{wide}} " + " ".join(f"{rate:>8.1%}" for rate in [*rates, sum(rates) / len(rates)]))
    return "\n".join(lines)


def main():
    parser = env.Parser(description=__doc__.split("\n")[0])
    add, count = parser.add_argument, env.positive_int
    add("--run", type=Path, nargs="+", help="directory of a training run, whose model is evaluated")
    add("--model", help="a model zero-shot instead: of the hub, or a folder")
    add("--env", choices=env.GAMES, help="the task (default: the run's)")
    add("--policy", choices=["random", "expert", "untrained", "sft", "rl"],
        help="whom to evaluate; the last three are a run's (default: rl)")
    add("--episodes", type=count, help="episodes to play [1000; for --gif 4]")
    add("--seed", type=env.natural_int, default=0, help="fixes the episodes and the sampling")
    add("--num-envs", type=count, default=64, help="episodes played at a time")
    add("--recognition", action="store_true", help="count instead how often the model reads the picture right; "
        "without --policy a table of untrained, sft and rl, the means of all --run")
    add("--trials", type=count, default=1000, help="answers of --recognition")
    add("--gif", type=Path, metavar="FILE",
        help="instead, write episodes as an animation, or as a contact sheet (.png): picture, thoughts, action")
    add("--api-base", metavar="URL", help="a model behind an OpenAI-compatible endpoint, up to /v1; its key in API_KEY")
    add("--api-model", metavar="NAME", help="its name there")
    add("--max-requests", type=count, default=math.inf, help="of --api-base: stop before there are more")
    add("--cache", type=Path, default=Path("runs/api-cache.jsonl"),
        help="of --api-base: file for all answers, each paid for once")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--trust-remote-code", action="store_true", help="run Python code that the model brings along")
    args = parser.parse_args()
    unseeing = args.policy in ("random", "expert")
    if sum(map(bool, (args.api_base, args.model, args.run, unseeing))) != 1:
        parser.error("name one of --run, --model, --api-base, or --policy random or expert: whom to evaluate")
    if not args.run and not args.env:
        parser.error("--env is needed, where no run tells it")
    if args.run and len(args.run) > 1 and (args.policy or not args.recognition):
        parser.error("several runs are for --recognition without --policy")
    if args.recognition and (unseeing or args.gif) or args.gif and not (args.run or args.model):
        parser.error("--recognition is for what a model reads, --gif for games of a --run or --model")
    episodes, policy, style, obs = args.episodes or (4 if args.gif else 1000), None, "full", "image"
    if args.api_base:
        if not args.api_model or not args.api_base.startswith(("http://", "https://")):
            parser.error("--api-base needs a URL, and --api-model NAME")
        args.policy = f"api:{args.api_model}"
        try:
            policy = ApiModel(args.api_base, args.api_model, os.environ.get("API_KEY"), args.cache, args.max_requests)
        except (OSError, ValueError) as error:
            parser.error(f"cannot use --api-base with --cache {args.cache}: {error}")
    elif not unseeing:
        import torch

        import train  # loading a model takes seconds: only where one is needed

        def load(function, *given):
            try:
                return function(*given)
            except (OSError, ValueError, KeyError, TypeError, torch.OutOfMemoryError) as error:
                parser.error(f"cannot load {args.model or given[0]}: {str(error).splitlines()[0]}")

        if args.model:
            trust = ["--trust-remote-code"] * args.trust_remote_code
            _, config, _ = train.parse_args(["--env", args.env, "--model", args.model, *trust])
        else:
            config = load(train.read_config, args.run[0])
        args.env, style, obs = args.env or config.env, config.prompt, config.obs
        if args.env not in env.GAMES:
            parser.error(f"{args.run[0]} plays several tasks: name one of {args.env} with --env")
        if args.recognition and args.run and not args.policy:  # does RL improve seeing?
            shares = {which: [] for which in ("untrained", "sft", "rl")}
            for which, run in itertools.product(shares, args.run):
                policy, config = load(train.load_run, run, which, args.trust_remote_code)
                torch.manual_seed(args.seed)
                shares[which].append(recognition(
                    policy, args.env, args.trials, args.seed, args.num_envs, config.prompt, config.obs))
            return print(json.dumps(shares) if args.json else recognition_table(args.env, args.trials, shares))
        args.policy = args.model or args.policy or "rl"
        policy = (load(train.build_policy, config) if args.model
                  else load(train.load_run, args.run[0], args.policy, args.trust_remote_code)[0])
        torch.manual_seed(args.seed)
    rng, result = np.random.default_rng(args.seed), {"env": args.env, "policy": args.policy}
    given = {"random": random_agent(rng), "expert": expert_agent}
    agent = model_agent(policy, rng, style) if policy else given[args.policy]
    try:
        if args.gif:
            return animate(policy, args.env, episodes, args.seed, args.gif, style, obs)
        if args.recognition:
            shares = recognition(policy, args.env, args.trials, args.seed, args.num_envs, style, obs)
            result |= {"trials": args.trials, "recognition": shares}
            text = recognition_table(args.env, args.trials, {args.policy: [shares]})
        else:
            result |= evaluate(agent, args.env, episodes, args.seed, args.num_envs, obs)
            text = f"{args.env}, seed {args.seed}\n{table({args.policy: result})}"
    except (ApiError, httpx2.InvalidURL, OSError, ValueError) as error:  # refused, no address, no data, a full disk
        parser.error(str(error))
    if args.api_base:
        result["requests"] = policy.requests
    print(json.dumps(result) if args.json else text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
