r"""Does RL improve what the model reads? EZPoints, after an SFT that is too short.

    python docs/projects/seeing.py --sweep sft-steps=120,160,200 --seeds 1,2,3 \
        --eval-episodes 500 --out runs/seeing

After a whole SFT the model reads nearly every card, and nothing is left to improve. So here SFT is
short, and RL is unchanged. The numbers of both cards are read in three ways:
1. from the field "cards" of the answer;
2. from its thoughts, which stand between the fields and the action;
3. by a probe: a linear classifier of the hidden state that the value head reads. It learns from 300
   states, and tells what such a classifier can find there, whether the answer says it or not.
The last entry of the formula is read from the field "formula" and by a probe, too. The prompt tells
it; with `--prompt vision` it is only in the picture.

`train.py` does everything but the readings. A sweep ends with a table (seeing.md) and a plot
(seeing.png).
"""
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[2]))
import env  # noqa: E402
import prompts  # noqa: E402
import train  # noqa: E402
from eval import mean_and_each, read_fields, read_metrics  # noqa: E402
from policy import load_run  # noqa: E402

EVERY = 8             # rollouts from one reading to the next
PROBE_STATES = 300    # the probe learns from them
TEST_STATES = 1000    # all readings are tested on these others

# -------------------------------------------------------------------------------------------------
# What is there to read, and what an answer says of it


def numbers_on_cards(info):
    """Both numbers, sorted. J, Q and K count 10."""
    return tuple(sorted(env.card_number(card) for card in info["cards"]))


def numbers_in_field(fields):
    """Numbers that a field such as ["A", "K"] names, sorted; None if it names something else."""
    ranks = fields.get("cards")
    if not isinstance(ranks, list) or not set(ranks) <= set(env.CARD_RANKS):
        return None
    return tuple(sorted(env.card_number(rank + "S") for rank in ranks))  # with any suit


def numbers_in_thoughts(fields):
    """Both numbers of thoughts such as "3 4 make 12: ...", sorted; None if there are not two."""
    match = re.match(r"(\d+) (\d+) ", str(fields.get("thoughts")))
    return tuple(sorted([int(match[1]), int(match[2])])) if match else None


def last_entry(info):
    """The last number or sign of the formula, such as "*"."""
    return info["formula"][-1]


def entry_in_field(fields):
    entries = re.findall(r"\d+|\S", str(fields.get("formula")))
    return entries[-1] if entries else None


# What is read: the truth, and functions that find it in the fields of an answer. Cards are read in
# first states of episodes only: later the formula tells which cards are there.
READINGS = {
    "cards": (numbers_on_cards, {"field": numbers_in_field, "thoughts": numbers_in_thoughts}),
    "entry": (last_entry, {"field": entry_in_field}),
}
COLUMNS = ["cards, field", "cards, thoughts", "cards, probe", "entry, field", "entry, probe"]
EACH_PAIR_ALIKE = "cards, field, mean over pairs"  # in the table only

# -------------------------------------------------------------------------------------------------
# Measuring


def measure(policy, config):
    """The share of test states that are read correctly: dict of a column's name -> share."""
    shares = {}
    # Almost always the likeliest token: RL shall not seem to read better by being surer
    temperature, policy.temperature = policy.temperature, 0.01
    with torch.random.fork_rng():  # the training goes on as if nothing happened
        torch.manual_seed(0)
        for subject, (truth_of, readers) in READINGS.items():
            in_episode = subject == "entry"
            probe_states = visit(policy, config, "sft", PROBE_STATES, in_episode, truth_of)
            tests = visit(policy, config, "evaluation", TEST_STATES, in_episode, truth_of,
                          sample_answers=True)
            truths = tests["truths"]
            for name, reader in readers.items():
                found = [reader(read_fields(answer.text)) for answer in tests["answers"]]
                shares[f"{subject}, {name}"] = share_equal(found, truths)
                if name == "field" and subject == "cards":
                    shares[EACH_PAIR_ALIKE] = mean_over_truths(found, truths)
            guesses = probe(probe_states["hidden"], probe_states["truths"], tests["hidden"])
            shares[f"{subject}, probe"] = share_equal(guesses, truths)
    policy.temperature = temperature
    return shares


def share_equal(found, truths):
    return float(np.mean([one == other for one, other in zip(found, truths, strict=True)]))


def mean_over_truths(found, truths):
    """The share for each truth, then their mean: a frequent truth counts as much as a rare one."""
    shares = []
    for truth in set(truths):
        of_this = [one for one, other in zip(found, truths, strict=True) if other == truth]
        shares.append(share_equal(of_this, [truth] * len(of_this)))
    return float(np.mean(shares))


@torch.no_grad()
def visit(policy, config, stream, count, in_episode, truth_of, sample_answers=False):
    """Visit `count` states, the same in every call with the same `stream`. Returns a dict:

    hidden (count, D): of the prompts' last tokens; truths: a list; answers: a list of `Answer`.
    in_episode: False: first states of episodes; True: later states of half-random play.
    """
    num_games = min(config.num_envs, count)
    rng = np.random.default_rng(0)
    seeds = env.episode_seeds(stream, 1_000_000)  # deals of a seed that no training has
    games = env.Games("ezpoints", num_games, seeds, config.obs)
    hidden = []
    truths = []
    answers = []
    while len(truths) < count:
        wanted = [i for i, info in enumerate(games.infos) if bool(info["formula"]) == in_episode]
        infos = [games.infos[i] for i in wanted]
        questions = [prompts.build_prompt(info, config.prompt) for info in infos]
        if wanted:
            batch = policy.collate(policy.encode(games.images[wanted], questions))
            hidden.append(policy.hidden_states(batch, keep=1)[:, 0].cpu())     # (wanted, D)
            truths += [truth_of(info) for info in infos]
        if wanted and sample_answers:
            answers += policy.act(games.images[wanted], questions)

        # For first states only, deal all games anew
        actions = train.half_random_actions(games.infos, rng)
        games.step(actions, restart=np.full(num_games, not in_episode))
    return {"hidden": torch.cat(hidden)[:count], "truths": truths[:count],
            "answers": answers[:count]}


def probe(hidden, truths, test_hidden):
    """What a linear classifier says to `test_hidden` (M, D), after it learned from `hidden` (N, D).

    truths: N values that can be sorted. Returns M of them.
    """
    mean, deviation = hidden.mean(0), hidden.std(0) + 1e-6                     # (D,)
    classes = sorted(set(truths))
    labels = torch.tensor([classes.index(truth) for truth in truths])          # (N,)
    linear = torch.nn.Linear(hidden.shape[1], len(classes))
    torch.nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100)

    def loss():
        optimizer.zero_grad()
        value = cross_entropy(linear((hidden - mean) / deviation), labels)
        value = value + 0.01 * linear.weight.square().sum()  # against overfitting
        value.backward()
        return value

    optimizer.step(loss)  # LBFGS calls it many times
    with torch.no_grad():
        guesses = linear((test_hidden - mean) / deviation).argmax(1)           # (M,)
    return [classes[guess] for guess in guesses]


class ReadingCollector(train.Collector):
    """A `Collector` that reads before every 8th rollout; metrics.jsonl shows it in its row."""

    def __init__(self, policy, config):
        super().__init__(policy, config)
        self.num_rollouts = 0

    def collect(self, progress):
        shares = measure(self.policy, self.config) if self.num_rollouts % EVERY == 0 else {}
        self.num_rollouts += 1
        rollout, statistics = super().collect(progress)
        return rollout, statistics | shares

    def state(self):
        return super().state() | {"num_rollouts": self.num_rollouts}

    def restore(self, state):
        super().restore(state)
        self.num_rollouts = state["num_rollouts"]


# -------------------------------------------------------------------------------------------------
# The table and the plot of a sweep


def report(args):
    """Write seeing.md and seeing.png about the runs of a sweep."""
    columns = [EACH_PAIR_ALIKE, *COLUMNS]
    text = f"| | success | {' | '.join(columns)} |\n" + "|---" * (len(columns) + 2) + "|\n"
    curves = {}  # name of a setting -> curve of each seed
    for axis in args.sweep:
        flag, _, values = axis.partition("=")
        for value in values.split(","):
            setting = f"{flag} {value}"
            folders = [args.out / f"{flag}-{value}-seed{seed}"
                       for seed in (args.seeds or "0").split(",")]
            runs = [readings_of(folder) for folder in folders]
            curves[setting] = [reading_curve(folder, run) for folder, run in zip(folders, runs)]
            for which in ("untrained", "sft", "rl"):
                cells = [f"{setting}, {which}", mean_and_each([
                    100 * run[which]["success"] for run in runs if "success" in run[which]])]
                cells += [mean_and_each([100 * run[which][column] for run in runs])
                          for column in columns]
                text += f"| {' | '.join(cells)} |\n"
    (args.out / "seeing.md").write_text(text)
    print(f"\n{text}")
    draw(curves).savefig(args.out / "seeing.png", dpi=110)


def readings_of(folder):
    """Readings of a finished run's policies: {"untrained": ..., "sft": ..., "rl": ...}."""
    file = folder / "readings.json"
    if not file.exists():
        found = {}
        for which in ("untrained", "sft", "rl"):
            policy, config = load_run(folder, which)
            found[which] = measure(policy, config)
        for row in read_metrics(folder):
            if row["stage"] == "eval" and row["policy"] in ("SFT", "RL"):
                found[row["policy"].lower()]["success"] = row["success_rate"]
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def reading_curve(folder, readings):
    """[(environment steps, readings)] along RL, from the SFT policy to the trained one."""
    rows = [row for row in read_metrics(folder) if row["stage"] == "rl"]
    steps_per_rollout = rows[0]["env_steps"]
    # A row is written after its update, but its readings are from before its rollout
    curve = [(row["env_steps"] - steps_per_rollout, row) for row in rows if COLUMNS[0] in row]
    return curve + [(rows[-1]["env_steps"], readings["rl"])]


def draw(curves):
    """A matplotlib figure with a panel for each setting: means of the seeds, and bands."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 4), layout="constrained")
    for panel, (setting, runs) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(1, len(curves), panel)
        steps = [step for step, _ in runs[0]]
        for column in COLUMNS:
            shares = np.array([[row[column] for _, row in run] for run in runs])  # (seeds, steps)
            subject, method = column.split(", ")
            color = {"cards": "C0", "entry": "C1"}[subject]
            style = {"field": "-", "thoughts": ":", "probe": "--"}[method]
            width = 4 if method == "thoughts" else 1.5  # it lies on the field's line
            axes.plot(steps, shares.mean(0), style, color=color, lw=width, label=column)
            axes.fill_between(steps, shares.min(0), shares.max(0), color=color, alpha=0.1, lw=0)
        axes.set(title=setting, xlabel="environment steps of RL", ylim=(0, 1.02))
        axes.set_ylabel("read correctly")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)  # in the last panel
    return figure


def check_settings(parser, config):
    if config.env != "ezpoints" or config.policy == "cnn" or config.obs == "text":
        parser.error("seeing.py is about pictures of EZPoints and a language model")
    if config.prompt not in ("full", "vision"):
        parser.error("seeing.py needs fields and thoughts: --prompt full or vision")
    if train.world_size() > 1:
        parser.error("seeing.py runs in one process")


if __name__ == "__main__":
    # train.py looks these names up when it runs
    train.Collector = ReadingCollector
    train.check_settings = check_settings
    # The figures of docs/seeing.md are of these settings
    train.PROJECT_SETTINGS.update(
        project="seeing", env="ezpoints", sft_optimizer="adamw", sft_lr=1e-3, env_steps=6144)
    train.main()
    arguments = train.make_parser().parse_args()
    if arguments.sweep:
        report(arguments)
