"""Train a character language model with fastrnn or torch.nn: embedding → RNN, GRU or LSTM → linear.

    python examples/char_lm.py                         train with fastrnn, print a sample
    python examples/char_lm.py --impl torch            the same with torch.nn
    python examples/char_lm.py --compare               both from one seed, step by step
    python examples/char_lm.py --text book.txt --cell GRU --layers 3

The default text is pydoc_data/topics.py, the help pages that CPython ships: half a million characters of English.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastrnn

LIBRARIES = {"fastrnn": fastrnn, "torch": nn}
# What --compare allows two float32 trainings to differ by in the loss of any step.
AGREEMENT = 1e-4
PROMPT = "The "


class CharacterModel(nn.Module):
    """Predicts the next character: (T, B) indices and a state in, (T, B, characters) logits and the state out."""

    def __init__(self, library, cell: str, characters: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, hidden)
        self.recurrent = getattr(library, cell)(hidden, hidden, num_layers=layers)
        self.head = nn.Linear(hidden, characters)

    def forward(self, indices: Tensor, state=None):
        output, state = self.recurrent(self.embedding(indices), state)
        return self.head(output), state


@dataclass
class Trainer:
    """A model with its optimizer, the losses and the seconds of its steps."""

    model: CharacterModel
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One update on (T, B) characters and those that follow them."""
        start = time.perf_counter()
        logits, _ = self.model(inputs)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    def tokens_per_second(self, tokens_per_step: int) -> float:
        """Of the median step; the first, which compiles or loads kernels, counts only where it is the only one."""
        return tokens_per_step / median(self.seconds[1:] or self.seconds)


def make_trainer(impl: str, options: argparse.Namespace, characters: int) -> Trainer:
    """A model drawn from the seed: the same initial values for both implementations."""
    torch.manual_seed(options.seed)
    model = CharacterModel(LIBRARIES[impl], options.cell, characters, options.hidden, options.layers)
    # Not Adam: its division by the gradient's size makes a rounding error in a small gradient a large step, and
    # after some 100 steps two trainings that differ in nothing else drift apart.
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, nesterov=True))


def read_text(path: Path | None) -> str:
    """The text to learn. Raises SystemExit with what to do if there is none."""
    if path is not None:
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise SystemExit(f"cannot read {path}: {error.strerror}") from error
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise SystemExit(
            "this Python comes without pydoc_data (some distributions pack it apart): give a text file with --text"
        ) from None
    return "\n".join(topics.values())


def batches(data: Tensor, options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Random stretches of the text, (T, B), and the same moved on by one character; the seed fixes them."""
    generator = torch.Generator().manual_seed(options.seed)
    offsets = torch.arange(options.seq_len + 1)[:, None]
    for _ in range(options.steps):
        starts = torch.randint(len(data) - options.seq_len, (options.batch,), generator=generator)
        stretch = data[starts + offsets]
        yield stretch[:-1], stretch[1:]


@torch.no_grad()
def sample(model: CharacterModel, alphabet: list[str], length: int, seed: int) -> str:
    """Draws `length` characters one by one from the model, carrying its state, after a prompt."""
    generator = torch.Generator().manual_seed(seed)
    prompt = [alphabet.index(character) for character in PROMPT if character in alphabet] or [0]
    text, state = [], None
    indices = torch.tensor(prompt)[:, None]
    for _ in range(length):
        logits, state = model(indices, state)
        probabilities = torch.softmax(logits[-1, 0] / 0.8, dim=0)  # a little below 1: fewer slips
        index = torch.multinomial(probabilities, 1, generator=generator)
        text.append(alphabet[index])
        indices = index[:, None]
    return "".join(alphabet[index] for index in prompt) + "".join(text)


def train(trainers: dict[str, Trainer], data: Tensor, options: argparse.Namespace) -> None:
    """Trains all of them on the same batches, one step of each in turn; prints the losses now and then."""
    print("step  " + "  ".join(f"{impl + ' loss':>14}" for impl in trainers))
    every = max(1, options.steps // 10)
    with tqdm(total=options.steps, unit="step", leave=False) as progress:
        for step, (inputs, targets) in enumerate(batches(data, options), start=1):
            for trainer in trainers.values():
                trainer.step(inputs, targets)
            progress.update()
            losses = [trainer.losses[-1] for trainer in trainers.values()]
            progress.set_postfix(loss=f"{losses[0]:.4f}")
            if step == 1 or step % every == 0:
                progress.write(f"{step:4}  " + "  ".join(f"{loss:14.6f}" for loss in losses))
    for impl, trainer in trainers.items():
        speed = trainer.tokens_per_second(options.batch * options.seq_len)
        print(f"{impl}: loss {trainer.losses[-1]:.4f}, {speed:,.0f} tokens/s, first step {trainer.seconds[0]:.2f} s")


def compare(ours: Trainer, theirs: Trainer) -> bool:
    """Prints how far the losses of the two are apart and how much faster one is; False if they disagree."""
    differences = [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    largest = max(differences)
    ratio = ours.tokens_per_second(1) / theirs.tokens_per_second(1)
    agree = largest <= AGREEMENT
    print(
        f"\nlargest difference in loss over {len(differences)} steps: {largest:.2e}"
        f" (step {differences.index(largest) + 1}; {'within' if agree else 'MORE THAN'} {AGREEMENT:g})"
    )
    print(f"fastrnn trains {ratio:.2f} times as fast as torch.nn, everything around the layer included")
    return agree


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, help="a text file (default: pydoc_data/topics.py of CPython)")
    add("--impl", choices=LIBRARIES, default="fastrnn")
    add("--compare", action="store_true", help="train both implementations and compare their losses")
    add("--cell", choices=("RNN", "GRU", "LSTM"), default="LSTM")
    add("--hidden", type=int, default=256)
    add("--layers", type=int, default=1)
    add("--batch", type=int, default=32)
    add("--seq-len", type=int, default=100)
    add("--steps", type=int, default=200)
    add("--lr", type=float, default=0.3)
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="torch's number of threads (default: torch's own choice)")
    add("--sample-length", type=int, default=300)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if --compare finds the losses apart, 0 otherwise."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    text = read_text(options.text)
    if len(text) <= options.seq_len + 1:
        raise SystemExit(f"the text has {len(text)} characters: too few for --seq-len {options.seq_len}")
    alphabet = sorted(set(text))
    places = {character: place for place, character in enumerate(alphabet)}
    data = torch.tensor([places[character] for character in text])
    print(f"{len(text):,} characters, {len(alphabet)} different; {torch.get_num_threads()} threads")

    impls = ("fastrnn", "torch") if options.compare else (options.impl,)
    trainers = {impl: make_trainer(impl, options, len(alphabet)) for impl in impls}
    train(trainers, data, options)
    agree = compare(*trainers.values()) if options.compare else True
    print(f"\n{'-' * 20}\n{sample(trainers[impls[0]].model, alphabet, options.sample_length, options.seed)}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
