"""Every backend that runs on a GPU against torch.nn on the same GPU; ``make gpu`` runs this file."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import CELLS, assert_same_as_torch, assert_within_rule, make_pair, random_packed, random_state, run

import fastrnn
from fastrnn.dispatch import Call, _objection
from fastrnn.kernels import cuda_scan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

GPU_BACKENDS = [
    info.name
    for info in fastrnn.backends()
    if info.available
    and info.name not in ("torch", "reference")
    and _objection(info.name, Call("lstm", "cuda", torch.bfloat16, 8, 8, 0, 1)) is None
]
# hidden size, batch, steps: one program with all units, several that share them, weights that are partly streamed
SIZES = {
    torch.bfloat16: [(16, 5, 7), (128, 40, 20), (129, 3, 9), (256, 70, 20), (768, 16, 12), (1024, 96, 6), (2048, 4, 4)],
    torch.float32: [(33, 5, 7), (256, 20, 9)],
    torch.float16: [(200, 9, 9)],
    torch.float64: [(20, 5, 7), (70, 20, 5)],
}
CASES = [(dtype, *size) for dtype, sizes in SIZES.items() for size in sizes]


def draw(cell, dtype, hidden, batch, steps, packed=False, **options):
    class_name, variant = CELLS[cell]

    def make(seed):
        ours, theirs = make_pair(class_name, 24, hidden, seed=seed, dtype=dtype, **variant, **options)
        if packed:
            input = random_packed(batch, steps, 24, dtype, seed).to("cuda")
        else:
            input = torch.randn(steps, batch, 24, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
        state = random_state(theirs, batch, dtype, seed)
        state = tuple(part.cuda() for part in state) if isinstance(state, tuple) else state.cuda()
        return ours.cuda(), theirs.cuda(), input, state

    return make


def test_there_is_something_to_test():
    """Without this a machine that lacks Triton, or nvcc, would skip every test and call it a success."""
    assert {"cuda", "triton"} <= set(GPU_BACKENDS), fastrnn.backends()


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "{}-H{}-B{}-T{}".format(str(case[0])[6:], *case[1:]))
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients(cell, case, backend):
    if cell == "rnn_relu" and case[1] > 256:
        pytest.skip("the kernels of rnn_tanh but for the activation")
    dtype, hidden, *_ = case
    if _objection(backend, Call(cell, "cuda", dtype, 24, hidden, 0, 1)) is None:
        assert_same_as_torch(draw(cell, *case), backend=backend)
    else:
        ours, _, input, state = draw(cell, *case)(0)
        with fastrnn.use_backend(backend), pytest.raises(RuntimeError, match="cannot run this layer"):
            ours(input, state)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("hidden", [64, 300])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_input_and_both_directions(cell, hidden, backend):
    case = draw(cell, torch.bfloat16, hidden, 20, 15, packed=True, bidirectional=True, num_layers=2)
    assert_same_as_torch(case, backend=backend)


# Regime, tiles of 8 sequences, teams of blocks.
@pytest.mark.parametrize("way", [(False, 1, 0), (False, 2, 0), (True, 1, 2), (True, 2, 1)], ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
class TestTiny:
    """The CUDA backend in bfloat16, cut up as it is for larger layers: `make sanitize` runs these."""

    @pytest.fixture(autouse=True)
    def cut(self, monkeypatch, way):
        monkeypatch.setattr(cuda_scan, "_choose", lambda *_: way)

    def test_packed(self, cell):
        case = draw(cell, torch.bfloat16, 40, 9, 5, packed=True, bidirectional=True)
        assert_same_as_torch(case, backend="cuda")

    def test_resets(self, cell):
        ours, _, input, state = draw(cell, torch.bfloat16, 33, 9, 5, bidirectional=True)(0)
        resets = torch.rand(input.shape[:2], generator=torch.Generator().manual_seed(3)).to(input.device) < 0.4

        def results(backend, dtype):
            layer, x = copy.deepcopy(ours).to(dtype), input.detach().to(dtype).requires_grad_()
            hx = tuple(part.to(dtype) for part in state) if isinstance(state, tuple) else state.to(dtype)
            with fastrnn.use_backend(backend):
                output, _ = layer(x, hx, resets=resets)
            output.float().square().sum().backward()
            return [output.detach(), x.grad, *(weight.grad for weight in layer.parameters())]

        mine, expected = results("cuda", torch.bfloat16), results("reference", torch.bfloat16)
        for index, three in enumerate(zip(mine, expected, results("reference", torch.float64), strict=True)):
            assert_within_rule(*three, f"tensor {index}")


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("hidden", [64, 512])
def test_the_same_bits_every_time(hidden, backend):
    ours, _, input, state = draw("lstm", torch.bfloat16, hidden, 40, 50)(0)
    with fastrnn.use_backend(backend):
        first = run(ours, input, state)
        for _ in range(5):
            again = run(ours, input, state)
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("hidden", [64, 512])
def test_cuda_graphs_and_streams(hidden, backend):
    ours, _, input, _ = draw("gru", torch.bfloat16, hidden, 20, 30)(0)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with fastrnn.use_backend(backend), torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            expected = ours(input)[0]
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            output = ours(input)[0]
    for _ in range(3):
        output.zero_()
        graph.replay()
        assert torch.equal(output, expected)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_several_threads(backend):
    ours, _, input, _ = draw("lstm", torch.bfloat16, 300, 20, 30)(0)

    def call(_):
        with fastrnn.use_backend(backend), torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            return ours(input)[0].cpu()

    expected = call(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(output, expected) for output in pool.map(call, range(40)))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_compile_and_autocast(backend):
    ours, theirs, input, _ = draw("lstm", torch.float32, 128, 20, 15)(0)
    compiled = torch.compile(ours, fullgraph=True)
    with fastrnn.use_backend(backend), torch.autocast("cuda", torch.bfloat16):
        outputs = [module(input)[0] for module in (ours, compiled)]
    with torch.autocast("cuda", torch.bfloat16):
        expected = theirs(input)[0]
    exact = theirs.double()(input.double())[0]
    for output in outputs:
        assert_within_rule(output.to(expected.dtype), expected, exact)
