"""The Triton backend in Triton's interpreter: every kernel and every way to cut it up keeps the tolerance rule."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import DTYPES, FLOAT64_AGREEMENT, assert_same_as_torch, make_pair, random_packed, random_state, run

import fastrnn
from fastrnn.kernels import gpu_layer, triton_layer
from fastrnn.kernels.triton_tiles import AMD, AMPERE, HOPPER, REGISTERS, Tiles, choose_tiles, registers_without_spills
from fastrnn.reference import CELLS

# Ways to cut up a scan, by what choose_tiles would say: one program for all units, which the interpreter runs for all
# steps at once; programs that share them, with all weights resident, some or none; and one program that exchanges the
# state with itself, so that arriving and waiting run too. The large ones have 64 rows, and multiply without a batch.
WAYS = ("alone", "shared", "streamed_in_part", "streamed", "with_itself", "large_alone", "large_shared")


def tiles_for(way):
    def choose(cell, backward, hidden_size, groups, batch_tiles, itemsize, limits):
        gates = CELLS[cell].gates
        rows, splits = (64, 1) if way.startswith("large") else (16, 2)
        if way.endswith("alone"):
            units = max(16, 1 << (hidden_size - 1).bit_length())
            depth = units * (4 if gates > 1 and backward else 1)
            return Tiles(rows, units, splits, depth, 1, 1, 1, True)
        depth = hidden_size * gates if backward else hidden_size
        chunk = 32
        chunks = -(-depth // chunk)
        resident = {"streamed_in_part": 1, "streamed": 0}.get(way, chunks)
        units = max(16, 1 << (hidden_size - 1).bit_length()) if way == "with_itself" else 16
        return Tiles(rows, units, splits, chunk, chunks, resident, 2, False)

    return choose


LAYERS = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
}
# hidden size, batch, steps, options, packed, with an initial state
SHAPES = {
    "H33-B3-T4-both-packed": (33, 3, 4, {"bidirectional": True}, True, True),
    "H7-B18-T3-nobias": (7, 18, 3, {"bias": False}, False, False),
    "H20-B2-T2-two-layers": (20, 2, 2, {"num_layers": 2}, False, True),
    "H1-B1-T1": (1, 1, 1, {}, False, True),
    "H20-B70-T2": (20, 70, 2, {}, False, True),
}

cells = pytest.mark.parametrize("cell", LAYERS)
dtypes = pytest.mark.parametrize(
    "dtype", [d for d in DTYPES if d != torch.float64], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(triton_layer, "choose_tiles", tiles_for(request.param))
    return request.param


def make_case(cell, shape, dtype, seed):
    hidden, batch, steps, options, packed, hx = SHAPES[shape]
    class_name, variant = LAYERS[cell]
    ours, theirs = make_pair(class_name, 5, hidden, seed=seed, dtype=dtype, **variant, **options)
    if packed:
        input = random_packed(batch, steps, 5, dtype, seed)
    else:
        input = torch.randn(steps, batch, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return ours, theirs, input, random_state(theirs, batch, dtype, seed) if hx else None


PACKED, WIDE, LARGE_BATCH = "H33-B3-T4-both-packed", "H7-B18-T3-nobias", "H20-B70-T2"
WAYS_AND_SHAPES = [*itertools.product(("alone", "streamed_in_part"), SHAPES)]
WAYS_AND_SHAPES += itertools.product(("large_alone", "large_shared"), (PACKED, LARGE_BATCH))
WAYS_AND_SHAPES += [("shared", PACKED), ("streamed", PACKED), ("with_itself", PACKED), ("with_itself", WIDE)]


@cells
@pytest.mark.parametrize(("way", "shape"), WAYS_AND_SHAPES, indirect=["way"])
def test_outputs_and_gradients(way, shape, cell):
    assert_same_as_torch(lambda seed: make_case(cell, shape, torch.float64, seed), backend="triton")


@dtypes
@cells
@pytest.mark.parametrize("way", ["alone", "streamed_in_part", "large_shared"], indirect=True)
def test_outputs_and_gradients_of_lower_precision(way, cell, dtype):
    assert_same_as_torch(lambda seed: make_case(cell, "H33-B3-T4-both-packed", dtype, seed), backend="triton")


@cells
@pytest.mark.parametrize("way", ["alone", "streamed_in_part"], indirect=True)
def test_outputs_without_grad(way, cell):
    def case(seed):
        return make_case(cell, "H33-B3-T4-both-packed", torch.float32, seed)

    assert_same_as_torch(case, backend="triton", backward=False)


@cells
@pytest.mark.parametrize("way", ["alone", "streamed_in_part"], indirect=True)
def test_the_same_call_gives_the_same_bits(way, cell):
    ours, _, input, hx = make_case(cell, "H7-B18-T3-nobias", torch.float32, 0)
    with fastrnn.use_backend("triton"):
        first, second = run(ours, input, hx), run(ours, input, hx)
    assert all(torch.equal(first[name], second[name]) for name in first)


@cells
def test_every_way_gives_the_numbers_of_the_tiles_that_are_chosen(cell, monkeypatch):
    case = make_case(cell, "H20-B2-T2-two-layers", torch.float64, 0)
    with fastrnn.use_backend("triton"):
        chosen = run(case[0], *case[2:])
        for way in WAYS:
            monkeypatch.setattr(triton_layer, "choose_tiles", tiles_for(way))
            for name, result in run(case[0], *case[2:]).items():
                torch.testing.assert_close(result, chosen[name], rtol=0, atol=FLOAT64_AGREEMENT)


@cells
def test_nan_and_infinity_stay_in_their_sequence(cell):
    ours, theirs, input, _ = make_case(cell, "H7-B18-T3-nobias", torch.float32, 0)
    input[1, 2], input[1, 3] = float("nan"), float("inf")
    with fastrnn.use_backend("triton"), torch.no_grad():
        output = ours(input)[0]
    expected = theirs(input)[0]
    assert torch.equal(output.isnan(), expected.isnan())
    assert output[:, [0, 1, *range(4, 18)]].isfinite().all()


def test_a_gradient_of_the_gradient_and_per_sample_gradients():
    ours, theirs, input, _ = make_case("lstm", "H7-B18-T3-nobias", torch.float64, 0)
    results = []
    for module, backend in ((ours, "triton"), (theirs, "torch")):
        x = input[:, :2].clone().requires_grad_()
        with fastrnn.use_backend(backend), torch.backends.mkldnn.flags(enabled=False):
            first = torch.autograd.grad(module(x)[0].sin().sum(), x, create_graph=True)[0]
            results.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=0, atol=FLOAT64_AGREEMENT)

    def loss(parameters, x):
        return torch.func.functional_call(ours, parameters, (x,))[0].sum()

    parameters = dict(ours.named_parameters())
    with fastrnn.use_backend("triton"):
        together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, input[:, :3, None])
        for number in range(3):
            alone = torch.func.grad(loss)(parameters, input[:, number, None])
            for name, gradient in alone.items():
                torch.testing.assert_close(together[name][number], gradient, rtol=0, atol=FLOAT64_AGREEMENT)


def test_tensors_that_do_not_lie_row_after_row():
    """Models of an ensemble, gradients of one row that share memory, and lazily negated tensors."""
    x, several = torch.randn(4, 2, 5, dtype=torch.float64), [fastrnn.GRU(5, 6, dtype=torch.float64) for _ in range(3)]
    parameters = {
        name: torch.stack([dict(m.named_parameters())[name] for m in several]) for name in several[0].state_dict()
    }
    one = several[0]

    def output(parameters, x):
        return torch.func.functional_call(one, parameters, (x,))[0]

    with fastrnn.use_backend("triton"):
        ensemble = torch.func.vmap(output, in_dims=(0, None))(parameters, x)
        jacobian = torch.func.jacrev(lambda x: one(x)[0])(x[:1, :1])
        leaf = x.clone().requires_grad_()
        (negated,) = torch.autograd.grad(one(leaf)[0], leaf, torch._neg_view(torch.ones(4, 2, 6, dtype=torch.float64)))
        single, narrow = copy.deepcopy(one).float(), x.float().requires_grad_()
        (outside,) = torch.autograd.grad(single(narrow)[0].sum(), narrow)
        loss = single(narrow)[0].sum()
        with torch.autocast("cpu", torch.bfloat16):
            (inside,) = torch.autograd.grad(loss, narrow)
    assert torch.equal(inside, outside)
    exactly = {"rtol": 0, "atol": FLOAT64_AGREEMENT}
    torch.testing.assert_close(ensemble, torch.stack([m(x)[0] for m in several]), **exactly)
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda x: one(x)[0])(x[:1, :1]), **exactly)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(-one(leaf)[0].sum(), leaf)
    torch.testing.assert_close(negated, expected, **exactly)


def test_what_it_cannot_run():
    with fastrnn.use_backend("triton"), pytest.raises(RuntimeError, match="no projections"):
        fastrnn.LSTM(3, 4, proj_size=2)(torch.randn(2, 1, 3))
    with fastrnn.use_backend("triton"):
        assert fastrnn.explain(fastrnn.GRU(3, 4), torch.randn(2, 1, 3)).layers[0].backend == "triton"
    # never measured on a GPU: it runs only when it is named
    assert fastrnn.explain(fastrnn.GRU(3, 4), torch.randn(2, 1, 3)).layers[0].backend != "triton"


SIZES = list(
    itertools.product(
        CELLS, (False, True), (1, 16, 40, 96, 128, 129, 200, 256, 512, 640, 1150, 2048), (1, 2), (1, 8, 300), (2, 4, 8)
    )
)


@pytest.mark.parametrize("limits", [HOPPER, AMPERE, AMD])
def test_tiles_cover_the_layer_and_fit(limits):
    for cell, backward, hidden, groups, batch_tiles, itemsize in SIZES:
        tiles = choose_tiles(cell, backward, hidden, groups, batch_tiles, itemsize, limits)
        gates = CELLS[cell].gates
        width = 1 if gates == 1 else 4
        depth = hidden * (gates if backward else 1)
        assert tiles.chunk * tiles.chunks >= depth and tiles.resident <= tiles.chunks
        assert tiles.blocks(hidden) * tiles.units >= hidden
        assert tiles.chunk % (16 * tiles.splits) == 0 or tiles.splits == 1
        columns = tiles.units * (1 if backward else width)
        assert tiles.resident * tiles.chunk * columns * itemsize <= limits.shared_bytes
        if tiles.alone:
            assert tiles.units >= hidden and tiles.chunks == tiles.resident == 1


@pytest.mark.parametrize("limits", [HOPPER, AMPERE, AMD])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_batches_share_a_few_kernels(cell, backward, limits):
    """All that a kernel knows of the batch is its tiles: seven of them at most, whatever the batches."""
    for hidden in (40, 128, 256, 1024, 2048):
        chosen = {choose_tiles(cell, backward, hidden, 1, tiles, 2, limits) for tiles in range(1, 400)}
        assert len(chosen) <= 7


class Recorder:
    """Stands for a kernel and notes how it is launched; ``spills`` has the registers with which it would spill."""

    def __init__(self, spills=()):
        self.launches, self.looked_at, self.spills = [], [], spills

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append((grid, arguments, options))

        return launch

    def warmup(self, *arguments, grid, maxnreg, **options):
        self.looked_at.append(maxnreg)
        return SimpleNamespace(n_spills=2 if maxnreg in self.spills else 0, _init_handles=lambda: None)


def launch(kernel, hidden=300, batch=20, groups=1, steps=3):
    scan = gpu_layer.Scan(
        "lstm", hidden, groups, batch, steps, torch.bfloat16, torch.device("cpu"), (0,) * groups, None, None
    )
    triton_layer._launch(scan, kernel, (), steps)


def test_a_kernel_that_spills_gets_other_registers(monkeypatch):
    monkeypatch.setattr(triton_layer, "INTERPRETED", False)
    monkeypatch.setattr(triton_layer, "_limits", lambda device: HOPPER)
    kernel = Recorder(spills=REGISTERS[:1])
    for batch in (20, 21, 20):
        launch(kernel, batch=batch)
    assert kernel.looked_at == list(REGISTERS[:2])
    assert {options["maxnreg"] for _, _, options in kernel.launches} == {REGISTERS[1]}
    launch(kernel, hidden=301)
    assert len(kernel.looked_at) == 4
    assert registers_without_spills({None: 8, 224: 2, 240: 6}.get) == 224


def test_counters_are_cleared_only_where_programs_wait(monkeypatch):
    monkeypatch.setattr(triton_layer, "INTERPRETED", False)
    cleared = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: cleared.append(size) or zeros(*size, **options))
    for limits, hidden, expected in ((HOPPER, 64, 0), (HOPPER, 300, 1), (HOPPER._replace(cooperative=False), 300, 0)):
        monkeypatch.setattr(triton_layer, "_limits", lambda device, limits=limits: limits)
        cleared.clear()
        launch(Recorder(), hidden)
        assert len(cleared) == expected


@pytest.mark.parametrize("sizes", [[1], [4], [3, 3, 2, 2, 2, 1], [5, 1, 1], [7, 6, 5], [3, 2, 2, 0, 0]])
def test_first_rows_are_the_same_when_no_memory_is_copied(sizes):
    """As a CUDA graph records them."""
    sizes = torch.tensor(sizes)
    copied = gpu_layer._offsets(sizes, torch.device("cpu"))
    assert torch.equal(gpu_layer._offsets_written_there(sizes, torch.device("cpu")), copied)


def test_parameters_that_begin_anywhere_give_the_same_bits():
    """A flat buffer of all parameters: its parts are no multiples of 16 bytes from its start."""
    layer, x = fastrnn.LSTM(5, 33), torch.randn(4, 3, 5)
    with fastrnn.use_backend("triton"):
        expected = layer(x)[0]
        flat = torch.empty(1 + sum(parameter.numel() for parameter in layer.parameters()))
        begin = 1
        for parameter in layer.parameters():
            place = flat[begin : begin + parameter.numel()].view_as(parameter)
            begin += parameter.numel()
            parameter.data = place.copy_(parameter.detach())
        assert layer.weight_hh_l0.data_ptr() % 16
        assert torch.equal(layer(x)[0], expected)
    assert gpu_layer.plain(layer.weight_hh_l0).data_ptr() % 16 == 0
    assert gpu_layer._as_bytes(torch.ones(40, dtype=torch.bool)[3:]).data_ptr() % 16 == 0


@pytest.mark.parametrize(
    "limits",
    [HOPPER, HOPPER._replace(programs=20), HOPPER._replace(cooperative=False)],
    ids=["H200", "small", "no cooperation"],
)
def test_programs_that_wait_for_each_other_all_run_at_the_same_time(limits, monkeypatch):
    monkeypatch.setattr(triton_layer, "INTERPRETED", False)
    monkeypatch.setattr(triton_layer, "_limits", lambda device: limits)
    for hidden, batch, groups in itertools.product((16, 256, 1024, 5000), (1, 100, 3000), (1, 2, 30)):
        kernel, steps = Recorder(), 3
        launch(kernel, hidden, batch, groups, steps)
        done = set()
        for (blocks, pairs), arguments, options in kernel.launches:
            counters, _, _, _, begin, end, first_pair, tiles_of_batch = arguments[:8]
            rows, units, alone = arguments[14], arguments[15], arguments[20]
            assert counters.numel() >= groups * tiles_of_batch * 32
            assert rows * tiles_of_batch >= batch and units * blocks >= hidden
            if not alone and blocks > 1 and end - begin > 1:
                assert options["launch_cooperative_grid"] and blocks * pairs <= limits.programs
            assert options["num_stages"] == 1
            new = set(itertools.product(range(first_pair, first_pair + pairs), range(begin, end)))
            assert not new & done
            done |= new
        assert done == set(itertools.product(range(groups * tiles_of_batch), range(steps)))
