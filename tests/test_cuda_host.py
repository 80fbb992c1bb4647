"""The CUDA kernels' sources, run on the CPU: every kernel and way to cut it up keeps the tolerance rule."""

import ctypes
import itertools
import shutil

import cuda_host
import pytest
import torch
from helpers import assert_same_as_torch, assert_within_rule, in_float64, make_pair, random_packed, random_state, run
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn import dispatch
from fastrnn.kernels import cuda_scan

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile csrc/ with")

LAYERS = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
}
# regime, tiles of 8 sequences, teams of blocks
WAYS = {"alone-1": (False, 1), "alone-2": (False, 2), "spread-1": (True, 1, 2), "spread-2": (True, 2, 1)}
# hidden size, batch, steps, options, packed: no whole lanes, several tiles of units, of sequences and of directions
SHAPES = {
    "H33-B3-T4-both-packed": (33, 3, 4, {"bidirectional": True}, True),
    "H16-B19-T3": (16, 19, 3, {}, False),
    "H40-B9-T3-both": (40, 9, 3, {"bidirectional": True, "bias": False}, False),
    "H1-B1-T1": (1, 1, 1, {}, False),
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

cells = pytest.mark.parametrize("cell", LAYERS)
ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def built(folder):
    return cuda_host.build(folder)


@pytest.fixture
def host(built):
    with cuda_host.installed(built):
        yield built


def make_case(cell, shape, dtype, seed):
    hidden, batch, steps, options, packed = SHAPES[shape] if isinstance(shape, str) else shape
    class_name, variant = LAYERS[cell]
    ours, theirs = make_pair(class_name, 5, hidden, seed=seed, dtype=dtype, **variant, **options)
    if packed:
        input = random_packed(batch, steps, 5, dtype, seed)
    else:
        input = torch.randn(steps, batch, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return ours, theirs, input, random_state(theirs, batch, dtype, seed)


def check(cell, shape, dtype, **options):
    assert_same_as_torch(lambda seed: make_case(cell, shape, dtype, seed), backend="cuda", **options)


# float32 has no registers for a second tile of a block that is alone
WAYS_AND_DTYPES = [pair for pair in itertools.product(WAYS, FLOATS) if pair != ("alone-2", torch.float32)]


@cells
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("way", "dtype"), WAYS_AND_DTYPES, ids=lambda value: str(value).removeprefix("torch."))
def test_outputs_and_gradients(host, cell, way, shape, dtype):
    host.set_schedule(seed=len(shape))
    with cuda_host.cut(*WAYS[way]):
        check(cell, shape, dtype)


@cells
@pytest.mark.parametrize("way", ["alone-1", "spread-1"])
def test_products_in_tf32(host, cell, way):
    """No CPU has TF32 to compare with; float16 has the same mantissa, so torch.nn's error in it is the measure."""
    ours, theirs, input, hx = make_case(cell, "H16-B19-T3", torch.float16, 0)
    single = [torch.utils._pytree.tree_map(torch.Tensor.float, part) for part in (input, hx)]
    torchs, exact = run(theirs, input, hx), run(in_float64(theirs), in_float64(input), in_float64(hx))
    ours = ours.float()
    with fastrnn.use_backend("cuda"), cuda_host.cut(*WAYS[way]):
        as_float32 = run(ours, *single)
        torch.backends.cudnn.allow_tf32 = True
        mine = run(ours, *single)
    for name in torchs:
        assert_within_rule(mine[name], torchs[name].float(), exact[name], name)
    # the switch was heard: three products to one are more exact
    assert not torch.equal(mine["output[0]"], as_float32["output[0]"])


@cells
@ways
def test_without_grad(host, cell, way):
    with cuda_host.cut(*WAYS[way]):
        check(cell, "H33-B3-T4-both-packed", torch.bfloat16, backward=False)


@cells
@pytest.mark.parametrize("way", ["alone-1", "spread-2"])
def test_resets(host, cell, way):
    def once(backend, dtype):
        ours, _, input, hx = make_case(cell, "H40-B9-T3-both", torch.bfloat16, 1)
        ours, input = ours.to(dtype), input.to(dtype)
        hx = tuple(part.to(dtype) for part in hx) if isinstance(hx, tuple) else hx.to(dtype)
        mask = torch.rand(input.shape[:2], generator=torch.Generator().manual_seed(3)) < 0.4
        with fastrnn.use_backend(backend):
            output, _ = ours(input.requires_grad_(), hx, resets=mask)
        output.float().square().sum().backward()
        return [output.detach(), input.grad, *(weight.grad for weight in ours.parameters())]

    with cuda_host.cut(*WAYS[way]):
        mine = once("cuda", torch.bfloat16)
    theirs, exact = once("reference", torch.bfloat16), once("reference", torch.float64)
    for index, three in enumerate(zip(mine, theirs, exact, strict=True)):
        assert_within_rule(*three, f"tensor {index}")


@pytest.mark.parametrize("way", ["alone-1", "alone-2", "spread-1"])
def test_cell_states(host, way):
    def once(backend, dtype):
        ours, _, input, hx = make_case("lstm", "H33-B3-T4-both-packed", torch.bfloat16, 2)
        ours, hx = ours.to(dtype), tuple(part.to(dtype) for part in hx)
        data = input.data.to(dtype).requires_grad_()
        with fastrnn.use_backend(backend):
            _, _, cells = ours(PackedSequence(data, *input[1:]), hx, return_cells=True)
        cells.data.float().square().sum().backward()
        return [cells.data.detach(), data.grad, *(weight.grad for weight in ours.parameters())]

    with cuda_host.cut(*WAYS[way]):
        mine = once("cuda", torch.bfloat16)
    theirs, exact = once("reference", torch.bfloat16), once("reference", torch.float64)
    for index, three in enumerate(zip(mine, theirs, exact, strict=True)):
        assert_within_rule(*three, f"tensor {index}")


def test_weights_that_registers_have_no_room_for(folder):
    """Regime L with all but one chunk of a warp's weights in shared memory; the other regime has the same code."""
    with cuda_host.installed(cuda_host.build(folder, kept_chunks=1)), cuda_host.cut(True, 1, 1):
        check("lstm", (300, 3, 2, {}, False), torch.bfloat16)
        check("gru", (270, 9, 2, {}, False), torch.float16)


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule(host, seed):
    host.set_schedule(seed=seed)
    for way, cell in itertools.product(("alone-1", "spread-2"), ("lstm", "gru")):
        with cuda_host.cut(*WAYS[way]):
            check(cell, "H33-B3-T4-both-packed", torch.bfloat16)


@pytest.mark.parametrize("block", range(3))
def test_a_block_that_is_late(host, block):
    host.set_schedule(late_block=block)
    with cuda_host.cut(True, 1, 1):
        check("lstm", "H33-B3-T4-both-packed", torch.bfloat16)


def test_no_thread_asks_for_failures_while_all_is_well(host):
    """Looks in vain are part of every step: many steps are no reason to wait for the host's memory."""
    ours, _, input, hx = make_case("rnn_tanh", (33, 3, 100, {}, False), torch.bfloat16, 0)
    with fastrnn.use_backend("cuda"), cuda_host.cut(True, 1, 1), torch.no_grad():
        ours(input, hx)
    assert host.flag_loads() == 0


def test_a_launch_that_waits_in_vain_is_given_up_and_leaves_nothing_behind(host):
    ours, _, input, hx = make_case("lstm", "H33-B3-T4-both-packed", torch.bfloat16, 0)
    with fastrnn.use_backend("cuda"), cuda_host.cut(True, 1, 1), torch.no_grad():
        right = ours(input, hx)[0].data
        host.set_schedule(dead_block=1, longest_wait=100_000)
        assert ours(input, hx)[0].data.isnan().any()
        host.set_schedule()
        with pytest.raises(RuntimeError, match="gave up waiting"):
            ours(input, hx)
        assert torch.equal(ours(input, hx)[0].data, right)


def test_a_barrier_that_is_missing_is_noticed(host):
    """One of the sites that ``make mutate`` drops: the barrier behind the partial sums of regime L."""
    with cuda_host.cut(True, 1, 1):
        check("lstm", "H33-B3-T4-both-packed", torch.bfloat16)
        site = next(n for n, name in enumerate(host.sites()) if "scan_spread" in name and "block_sync" in name)
        host.set_schedule(dropped=site)
        with pytest.raises(AssertionError):
            check("lstm", "H33-B3-T4-both-packed", torch.bfloat16)


@pytest.mark.parametrize("way", ["alone-1", "spread-1"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_nan_passes_through_and_nobody_waits_for_it(host, way, dtype):
    ours, theirs, input, hx = make_case("lstm", "H16-B19-T3", dtype, 0)
    bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
    input = input.clone()
    input[1, 2] = torch.full((5,), -1, dtype=bits).view(dtype)  # a NaN that is all ones
    with fastrnn.use_backend("cuda"), cuda_host.cut(*WAYS[way]), torch.no_grad():
        output = ours(input, hx)[0]
        ours(input, hx)  # would say so if the first had given up
    assert torch.equal(output.isnan(), theirs(input, hx)[0].isnan())
    assert output.isnan().any() and not output.isnan().all()


@pytest.mark.parametrize("way", ["alone-1", "spread-1"])
def test_a_misaligned_access_is_noticed(host, way, monkeypatch):
    """A GPU would stop at it, the CPU would not: every tensor begins two bytes late here."""
    ours, _, input, hx = make_case("lstm", "H16-B19-T3", torch.bfloat16, 0)
    address = cuda_scan._address
    monkeypatch.setattr(cuda_scan, "_address", lambda tensor: address(tensor) and address(tensor) + 2)
    misaligned = pytest.raises(RuntimeError, match="misaligned")
    with fastrnn.use_backend("cuda"), cuda_host.cut(*WAYS[way]), torch.no_grad(), misaligned:
        ours(input, hx)


def test_the_same_call_gives_the_same_bits(host):
    ours, _, input, hx = make_case("gru", "H40-B9-T3-both", torch.float32, 0)
    with fastrnn.use_backend("cuda"), cuda_host.cut(True, 2, 1):
        first = run(ours, input, hx)
        host.set_schedule(seed=9)
        second = run(ours, input, hx)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_the_kernels_cannot_take(host):
    with fastrnn.use_backend("cuda"):
        for module, reason in (
            (fastrnn.LSTM(4, 6, proj_size=2), "projections"),
            (fastrnn.LSTM(4, 6).double(), "bfloat16, float16 and float32"),
            (fastrnn.RNN(4, 4096).bfloat16(), "multiprocessors"),
            (fastrnn.LSTM(4, 1024), "shared memory|multiprocessors"),
        ):
            weight = module.weight_ih_l0
            with pytest.raises(RuntimeError, match=reason):
                module(torch.zeros(2, 1, 4, dtype=weight.dtype))


def test_the_cost_model_fills_the_device_before_it_takes_a_second_tile(host):
    cpu = torch.device("cpu")  # 64 blocks at once, says the host run
    assert cuda_scan._choose("lstm", 0, False, 128, 64, 1, cpu) == (False, 1, 0)
    assert cuda_scan._choose("lstm", 0, False, 128, 65, 1, cpu) == (False, 2, 0)
    assert cuda_scan._choose("lstm", 0, False, 512, 2, 1, cpu) == (True, 1, 2)
    assert cuda_scan._choose("lstm", 0, False, 512, 3, 1, cpu) == (True, 2, 2)
    # a second tile of sequences would be empty
    assert cuda_scan._choose("lstm", 0, False, 128, 1, 1000, cpu) == (False, 1, 0)
    assert cuda_scan._choose("lstm", 0, False, 1024, 1, 2, cpu) == (True, 1, 1)


def test_the_switch_for_tf32_is_asked_at_every_call(host):
    """An LSTM of 1024 fits in TF32 alone, and the choice of the backend is kept."""
    cpu = torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = True
    call = dispatch.Call("lstm", "cpu", torch.float32, 4, 1024, 0, 1)
    assert cuda_scan.can_run(call) is None
    torch.backends.cudnn.allow_tf32 = False
    assert "shared memory" in cuda_scan.can_run(call)
    with pytest.raises(RuntimeError, match="shared memory"):
        cuda_scan._choose("lstm", cuda_scan.EXACT_FLOAT32, False, 1024, 1, 1, cpu)


@pytest.mark.parametrize("way", WAYS)
def test_an_infinite_state_stays_one(host, way):
    """Units that pad a tile have weights of zero, and no share in it."""
    ours, _ = make_pair("RNN", 4, 24, nonlinearity="relu", dtype=torch.bfloat16)
    h0 = torch.zeros(1, 3, 24, dtype=torch.bfloat16)
    h0[0, 1, 5] = torch.inf
    input = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    with fastrnn.use_backend("cuda"), cuda_host.cut(*WAYS[way]):
        output, _ = ours(input, h0)
    with fastrnn.use_backend("reference"):
        expected, _ = ours(input, h0)
    assert torch.equal(output.isnan(), expected.isnan()) and output.isinf().any()


def test_the_word_for_failures_is_read_once(host, monkeypatch):
    monkeypatch.setattr(cuda_scan, "failure", cuda_scan.Failure())
    cpu = torch.device("cpu")
    word = ctypes.c_uint32.from_address(cuda_scan.failure.address(cpu))
    assert word.value == 0
    word.value = 1
    with pytest.raises(RuntimeError, match="gave up waiting"):
        cuda_scan.failure.address(cpu)
    assert cuda_scan.failure.address(cpu) == ctypes.addressof(word) and word.value == 0
