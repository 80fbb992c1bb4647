"""Recurrent PPO on a T-maze: a sign at the start tells which way to turn at the end of a corridor that shows nothing.

    python examples/recurrent_ppo.py                   train until it is solved, draw the learning curve
    python examples/recurrent_ppo.py --cell GRU --longest 80
    python examples/recurrent_ppo.py --forget          the same without memory: every step is an episode of its own

Solved means: of 1000 fresh mazes it turns the right way in at least 95%, taking the likeliest action. Without memory no
policy is right in more than half of them. Exit code 1 says that --iterations did not do.

Rollouts go through ``fastrnn.Stream``, one step a call. The update runs whole rollouts, episodes of all lengths one
after the other, in one call of the layer: ``resets=`` sets the state to zero where an episode begins.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastrnn

FORWARD, LEFT, RIGHT = range(3)
SOLVED, EVALUATED = 0.95, 1000
# Schulman et al. 2017, with larger steps: discount and λ of the advantages, how far an update may go, and its weights.
DISCOUNT, LAMBDA, CLIP, VALUE_WEIGHT, ENTROPY_WEIGHT = 0.99, 0.95, 0.2, 0.5, 0.01
EPOCHS, MINIBATCHES, MAX_NORM = 4, 4, 0.5


class TMaze:
    """B mazes side by side (Bakker 2002): a corridor of random length with a junction at its end.

    Observations (B, 4) are one-hot: the start with a sign to the left or to the right, the corridor, the junction.
    Turning the right way at the junction gives 1, the wrong way -1, running into a wall -0.1. An episode ends with the
    turn, or after twice as many steps as the longest corridor; the next one begins in the same step.
    """

    OBSERVATIONS, ACTIONS = 4, 3

    def __init__(self, batch: int, longest: int, generator: torch.Generator) -> None:
        self.longest, self.generator = longest, generator
        self.sign, self.length, self.place, self.age = (torch.zeros(batch, dtype=torch.long) for _ in range(4))
        self._begin(torch.ones(batch, dtype=torch.bool))

    def _begin(self, where: Tensor) -> None:
        count = int(where.sum())
        self.sign[where] = torch.randint(LEFT, RIGHT + 1, (count,), generator=self.generator)
        self.length[where] = torch.randint(2, self.longest + 1, (count,), generator=self.generator)
        self.place[where] = self.age[where] = 0

    def observe(self) -> Tensor:
        seen = torch.where(self.place == 0, self.sign - LEFT, torch.where(self.place < self.length, 2, 3))
        return nn.functional.one_hot(seen, self.OBSERVATIONS).float()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Actions (B,) to rewards (B,), whether an episode ended (B,), and whether it ended well (B,)."""
        at_junction, forward = self.place == self.length, action == FORWARD
        turns, walks = at_junction & ~forward, ~at_junction & forward
        right = turns & (action == self.sign)
        reward = right.float() - (turns & ~right).float() - 0.1 * (~turns & ~walks).float()
        self.place += walks
        self.age += 1
        done = turns | (self.age >= 2 * self.longest)
        self._begin(done)
        return reward, done, right


class Agent(nn.Module):
    """A recurrent layer with a policy and a value on top: logits (.., actions) and values (..)."""

    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.recurrent = getattr(fastrnn, cell)(TMaze.OBSERVATIONS, hidden)
        self.policy = nn.Linear(hidden, TMaze.ACTIONS)
        self.value = nn.Linear(hidden, 1)
        nn.init.orthogonal_(self.policy.weight, 0.01)
        fastrnn.init.orthogonal_(self.recurrent)
        if cell != "RNN":
            fastrnn.init.forget_bias_(self.recurrent)

    def heads(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(hidden), self.value(hidden).squeeze(-1)


@dataclass
class Rollout:
    """T steps of B mazes: (T, B) each, but for observations (T, B, 4) and the recurrent state before the first step."""

    observations: Tensor
    begins: Tensor  # whether an episode begins with this step
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor
    state: Tensor | tuple[Tensor, Tensor]
    success: float  # the share of the episodes ended in it that ended well

    def of(self, mazes: Tensor) -> "Rollout":
        """The same of some of the mazes."""
        parts = {name: part[:, mazes] for name, part in vars(self).items() if isinstance(part, Tensor)}
        if isinstance(self.state, tuple):
            parts["state"] = tuple(part[:, mazes] for part in self.state)
        return Rollout(**{**vars(self), **parts})


class Collector:
    """Plays, and remembers between rollouts where it is."""

    def __init__(self, agent: Agent, options: argparse.Namespace, generator: torch.Generator) -> None:
        self.agent, self.forget, self.generator = agent, options.forget, generator
        self.mazes = TMaze(options.mazes, options.longest, generator)
        self.stream = fastrnn.Stream(agent.recurrent, options.mazes)
        self.begins = torch.ones(options.mazes, dtype=torch.bool)

    @torch.no_grad()
    def collect(self, steps: int) -> Rollout:
        state = self.stream.state
        kept = {name: [] for name in ("observations", "begins", "actions", "log_probs", "values", "rewards", "dones")}
        ended = well = 0
        for _ in range(steps):
            if self.forget:
                self.begins = torch.ones_like(self.begins)
            observation = self.mazes.observe()
            self.stream.reset(self.begins)
            logits, value = self.agent.heads(self.stream.step(observation))
            action = torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(-1)
            log_prob = logits.log_softmax(-1).gather(-1, action[:, None]).squeeze(-1)
            reward, done, right = self.mazes.step(action)
            ended, well = ended + int(done.sum()), well + int(right.sum())
            row = (observation, self.begins, action, log_prob, value, reward, done)
            for parts, part in zip(kept.values(), row, strict=True):
                parts.append(part)
            self.begins = done
        kept = {name: torch.stack(parts) for name, parts in kept.items()}
        values, rewards, dones = (kept.pop(name) for name in ("values", "rewards", "dones"))
        advantages = self._advantages(values, rewards, ~dones)
        return Rollout(
            **kept, advantages=advantages, returns=advantages + values, state=state, success=well / max(ended, 1)
        )

    def _advantages(self, values: Tensor, rewards: Tensor, goes_on: Tensor) -> Tensor:
        """Generalised advantages (Schulman et al. 2016); none cross the end of an episode."""
        # the value of where the rollout stops, without a step of the stream: the next rollout takes that
        state = self.stream.state
        if self.forget:
            self.stream.reset()
        following = self.agent.heads(self.stream.step(self.mazes.observe()))[1]
        self.stream.state = state
        advantages, advantage = torch.empty_like(values), torch.zeros_like(following)
        for t in reversed(range(len(values))):
            error = rewards[t] + DISCOUNT * goes_on[t] * following - values[t]
            advantages[t] = advantage = error + DISCOUNT * LAMBDA * goes_on[t] * advantage
            following = values[t]
        return advantages


def update(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, generator: torch.Generator) -> None:
    """Some epochs over the rollout, some mazes at a time, whole sequences each."""
    for _ in range(EPOCHS):
        for mazes in torch.randperm(rollout.begins.shape[1], generator=generator).chunk(MINIBATCHES):
            part = rollout.of(mazes)
            hidden, _ = agent.recurrent(part.observations, part.state, resets=part.begins)
            logits, values = agent.heads(hidden)
            log_probs = logits.log_softmax(-1)
            ratio = (log_probs.gather(-1, part.actions[..., None]).squeeze(-1) - part.log_probs).exp()
            advantages = (part.advantages - part.advantages.mean()) / (part.advantages.std() + 1e-8)
            gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
            entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
            loss = VALUE_WEIGHT * (values - part.returns).square().mean() - gain - ENTROPY_WEIGHT * entropy
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), MAX_NORM)
            optimizer.step()


@torch.no_grad()
def evaluate(agent: Agent, options: argparse.Namespace) -> float:
    """The share of fresh mazes, one episode each, in which the likeliest actions turn the right way."""
    mazes = TMaze(EVALUATED, options.longest, torch.Generator().manual_seed(options.seed + 1))
    stream = fastrnn.Stream(agent.recurrent, EVALUATED)
    playing, well = torch.ones(EVALUATED, dtype=torch.bool), torch.zeros(EVALUATED, dtype=torch.bool)
    while playing.any():
        if options.forget:
            stream.reset()
        logits, _ = agent.heads(stream.step(mazes.observe()))
        _, done, right = mazes.step(logits.argmax(-1))
        well |= playing & right
        playing &= ~done
    return well.float().mean().item()


def draw(successes: list[float], solved: bool, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no learning curve: pip install matplotlib")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="share of episodes that end well", ylim=(0, 1.02))
    axes.plot(range(1, len(successes) + 1), successes, label="sampled actions, in training")
    axes.axhline(0.5, color="gray", linestyle=":", label="the best without memory")
    axes.axhline(SOLVED, color="green", linestyle="--", label="solved" if solved else "not solved")
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"learning curve: {path}")


def train(options: argparse.Namespace) -> tuple[list[float], float]:
    """Trains until an evaluation calls it solved; returns every rollout's success and that of the last evaluation."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    agent = Agent(options.cell, options.hidden)
    optimizer = torch.optim.Adam(agent.parameters(), lr=options.lr, eps=1e-5)
    collector = Collector(agent, options, generator)
    successes, evaluated = [], 0.0
    with tqdm(total=options.iterations, unit="iteration", leave=False) as progress:
        while len(successes) < options.iterations and evaluated < SOLVED:
            rollout = collector.collect(options.steps)
            update(agent, optimizer, rollout, generator)
            successes.append(rollout.success)
            progress.update()
            progress.set_postfix(success=f"{rollout.success:.2f}")
            # actions that are drawn at random still slip where the likeliest do not
            if rollout.success >= SOLVED - 0.1 or len(successes) == options.iterations:
                evaluated = evaluate(agent, options)
    return successes, evaluated


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cell", choices=("RNN", "GRU", "LSTM"), default="LSTM")
    add("--hidden", type=int, default=32)
    add("--longest", type=int, default=40, help="steps of the longest corridor")
    add("--mazes", type=int, default=64, help="played side by side")
    add("--steps", type=int, default=64, help="of a rollout")
    add("--iterations", type=int, default=300, help="rollouts at most")
    add("--lr", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    add("--forget", action="store_true", help="reset the state before every step")
    add("--threads", type=int, default=1, help="torch's number; calls as small as these gain nothing from more")
    add("--plot", type=Path, default=Path("recurrent_ppo.png"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 0 if the maze is solved, 1 if not."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    successes, evaluated = train(options)
    seconds = time.perf_counter() - start
    solved = evaluated >= SOLVED
    print(
        f"{'solved' if solved else 'not solved'} after {len(successes)} iterations, {seconds:.0f} s: right in"
        f" {evaluated:.1%} of {EVALUATED} fresh mazes (solved: {SOLVED:.0%}; {torch.get_num_threads()} threads)"
    )
    draw(successes, solved, options.plot)
    return 0 if solved else 1


if __name__ == "__main__":
    sys.exit(main())
