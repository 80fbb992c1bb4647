"""DDP and FSDP2 in two processes over gloo: the training of one process on the whole batch, in float64."""

import datetime
import os
import socket
import time
import traceback

import pytest
import torch
from cases import FEATURES, HIDDEN, LAYERS, STEP_CELLS, STEPS, assert_all_agree, draw, make
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastrnn

PROCESSES = 2
BATCH = 3 * PROCESSES
TRAINING_STEPS = 3
# Far more than the seconds it takes: a test that hangs fails instead.
DEADLINE = 120

NAMES = [*LAYERS, *STEP_CELLS]
STRATEGIES = {
    "ddp": lambda model: DistributedDataParallel(model),
    "ddp_bucket_view": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True),
    "ddp_unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "fsdp": lambda model: (fully_shard(model.inner), fully_shard(model))[1],
    "fsdp_kept": lambda model: fully_shard(model, reshard_after_forward=False),
}
CASES = [
    *((strategy, name) for strategy in ("ddp", "fsdp") for name in NAMES),
    ("ddp_bucket_view", "lstm"),
    ("ddp_unused", "gru"),
    ("fsdp_kept", "lstm"),
]


class Model(nn.Module):
    """A layer, or a cell in a loop, with a linear map behind it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        directions = 2 if getattr(inner, "bidirectional", False) else 1
        self.head = nn.Linear((getattr(inner, "proj_size", 0) or HIDDEN) * directions, 2, dtype=torch.float64)

    def forward(self, input):
        """(B, T, I) to (B, 2)."""
        if isinstance(self.inner, nn.RNNBase):
            return self.head(self.inner(input)[0].mean(1))
        state = None
        for step in input.unbind(1):
            state = self.inner(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def make_model(name):
    """The same weights in every process: ours, and torch.nn's twin."""
    arguments = {"num_layers": 2, "bidirectional": True, "batch_first": True} if name in LAYERS else {}
    models = []
    for inner in make(name, **arguments):
        torch.manual_seed(1)
        models.append(Model(inner))
    return models


def train(model, input):
    """Losses of a few steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(TRAINING_STEPS):
        optimizer.zero_grad()
        loss = model(input).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def whole(tensor):
    """The tensor of which FSDP leaves a shard in every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def run_case(strategy, name, rank):
    shard = draw(BATCH, STEPS, FEATURES).chunk(PROCESSES)[rank]
    model = STRATEGIES[strategy](make_model(name)[0])
    losses = torch.stack(train(model, shard))
    distributed.all_reduce(losses)
    parameters = dict(getattr(model, "module", model).named_parameters())
    return {
        "losses": losses / PROCESSES,
        "weights": {key: whole(parameter).detach() for key, parameter in parameters.items()},
        "gradients": {key: whole(parameter.grad).detach() for key, parameter in parameters.items()},
    }


def run_mixed_precision(rank):
    """FSDP's own low precision: weights in bfloat16 for the computation, gradients back in float32."""
    model = Model(fastrnn.LSTM(FEATURES, HIDDEN, batch_first=True)).float()
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model.inner, mp_policy=low)
    fully_shard(model, mp_policy=low)
    seen = []
    model.inner.register_forward_hook(lambda module, args, results: seen.append(results[0].dtype))
    model(draw(BATCH, STEPS, FEATURES, seed=rank, dtype=torch.float32)).float().square().mean().backward()
    return {"dtypes": seen, "gradients": [whole(parameter.grad) for parameter in model.parameters()]}


def worker(rank, folder):
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
    if loopback:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback.pop()
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=DEADLINE / 2),
    )
    results = {}
    with fastrnn.use_backend("numba"):
        for case in (*CASES, "mixed_precision"):
            try:
                results[case] = run_mixed_precision(rank) if case == "mixed_precision" else run_case(*case, rank)
            except Exception:
                results[case] = traceback.format_exc()
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found, by case: all cases in one start of the processes."""
    folder = tmp_path_factory.mktemp("distributed")
    context = torch.multiprocessing.start_processes(
        worker, (folder,), nprocs=PROCESSES, join=False, start_method="spawn"
    )
    end = time.monotonic() + DEADLINE
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"the processes did not end within {DEADLINE} seconds"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize(("strategy", "name"), CASES)
def test_trains_as_one_process_does(results, strategy, name):
    _, theirs = make_model(name)
    losses = train(theirs, draw(BATCH, STEPS, FEATURES))
    for found in results:
        found = found[strategy, name]
        assert not isinstance(found, str), found
        assert_all_agree(found["losses"], torch.stack(losses))
        for key, parameter in theirs.named_parameters():
            assert_all_agree(found["weights"][key], parameter.detach())
            assert_all_agree(found["gradients"][key], parameter.grad)


def test_mixed_precision_of_fsdp(results):
    for found in results:
        found = found["mixed_precision"]
        assert not isinstance(found, str), found
        assert found["dtypes"] == [torch.bfloat16]
        for gradient in found["gradients"]:
            assert gradient.dtype == torch.float32
            assert gradient.isfinite().all()
            assert gradient.any()
