"""What a call does: every form of input and state, dropout, and what autograd may do with the results."""

import pytest
import torch
from helpers import (
    CELL_CLASSES,
    CPU_BACKENDS,
    DTYPES,
    LAYER_CLASSES,
    assert_same_as_torch,
    make_pair,
    random_packed,
    random_state,
    run,
    tensors_in,
)
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import fastrnn

FEATURES, HIDDEN, BATCH, STEPS = 4, 6, 3, 5

backends = pytest.mark.parametrize("backend", CPU_BACKENDS)
layers = pytest.mark.parametrize("class_name", LAYER_CLASSES)
cells = pytest.mark.parametrize("class_name", CELL_CLASSES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
both_orders = pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cell_state(class_name, *shape, seed=0, dtype=torch.float32):
    h = draw(*shape, seed=seed + 100, dtype=dtype)
    return (h, draw(*shape, seed=seed + 200, dtype=dtype)) if class_name == "LSTMCell" else h


def map_state(function, state):
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


# Input and state


@backends
@layers
@both_orders
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batch", [None, 0, 1, 3], ids=["unbatched", "B0", "B1", "B3"])
def test_batched_unbatched_and_empty_batch(backend, class_name, batch_first, with_hx, batch):
    def make(seed):
        ours, theirs = make_pair(
            class_name, FEATURES, HIDDEN, 2, bidirectional=True, batch_first=batch_first, seed=seed
        )
        if batch is None:
            shape = (STEPS, FEATURES)
        else:
            shape = (batch, STEPS, FEATURES) if batch_first else (STEPS, batch, FEATURES)
        hx = random_state(ours, batch, torch.float32, seed) if with_hx else None
        return ours, theirs, draw(*shape, seed=seed), hx

    assert_same_as_torch(make, backend=backend)


@pytest.mark.parametrize("proj_size", [0, 2])
@both_orders
def test_shapes_and_layout_of_the_results(batch_first, proj_size):
    ours, theirs = make_pair(
        "LSTM", FEATURES, HIDDEN, 2, bidirectional=True, batch_first=batch_first, proj_size=proj_size
    )
    empty = (0, STEPS, FEATURES) if batch_first else (STEPS, 0, FEATURES)
    for shape in ((STEPS, FEATURES), (STEPS, BATCH, FEATURES), empty):
        mine, torchs = ours(draw(*shape)), theirs(draw(*shape))
        assert type(mine) is type(torchs) is tuple
        assert type(mine[1]) is type(torchs[1]) is tuple
        assert [mine[0].shape, *(t.shape for t in mine[1])] == [
            torchs[0].shape,
            *(t.shape for t in torchs[1]),
        ]


def strided_copies(tensor):
    """The same numbers with other strides."""
    size = tensor.dim()
    yield tensor.permute(*reversed(range(size))).contiguous().permute(*reversed(range(size)))
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
    wide[..., 1::2] = tensor
    yield wide[..., 1::2]
    wide = tensor.new_full((2 * tensor.shape[0], *tensor.shape[1:]), float("nan"))
    wide[::2] = tensor
    yield wide[::2]
    offset = tensor.new_full((tensor.numel() + 1,), float("nan"))
    offset[1:] = tensor.flatten()
    yield offset[1:].view(tensor.shape)


@backends
@layers
@both_orders
@pytest.mark.parametrize("layout", range(4), ids=["reversed", "every_second", "wide_rows", "offset"])
def test_input_and_state_of_any_strides(backend, class_name, batch_first, layout):
    def make(seed):
        pair = make_pair(class_name, FEATURES, HIDDEN, bidirectional=True, batch_first=batch_first, seed=seed)
        input = draw(BATCH, STEPS, FEATURES, seed=seed)
        hx = random_state(pair[0], BATCH if batch_first else STEPS, torch.float32, seed)
        return (
            *pair,
            list(strided_copies(input))[layout],
            map_state(lambda t: list(strided_copies(t))[layout], hx),
        )

    assert_same_as_torch(make, backend=backend)


@backends
@layers
def test_expanded_input_and_state(backend, class_name):
    def make(seed):
        pair = make_pair(class_name, FEATURES, HIDDEN, seed=seed)
        hx = map_state(lambda t: t.expand(-1, BATCH, -1), random_state(pair[0], 1, torch.float32, seed))
        return *pair, draw(1, 1, FEATURES, seed=seed).expand(STEPS, BATCH, -1), hx

    assert_same_as_torch(make, backend=backend)


@backends
@pytest.mark.parametrize("class_name", LAYER_CLASSES)
@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@both_orders
def test_packed_sequences(backend, class_name, enforce_sorted, with_hx, batch_first):
    def make(seed):
        pair = make_pair(class_name, FEATURES, HIDDEN, 2, bidirectional=True, batch_first=batch_first, seed=seed)
        input = random_packed(7, 9, FEATURES, torch.float32, seed, enforce_sorted)
        return *pair, input, random_state(pair[0], 7, torch.float32, seed) if with_hx else None

    assert_same_as_torch(make, backend=backend)
    ours, _, input, hx = make(0)
    with fastrnn.use_backend(backend):
        output, _ = ours(input, hx)
    assert isinstance(output, PackedSequence)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert getattr(output, name) is getattr(input, name)
    assert pad_packed_sequence(output)[0].shape == (9, 7, 2 * HIDDEN)


@layers
def test_packed_sequence_with_a_state_of_any_strides(class_name):
    def make(seed):
        pair = make_pair(class_name, FEATURES, HIDDEN, 2, seed=seed)
        hx = map_state(lambda t: next(strided_copies(t)), random_state(pair[0], 7, torch.float32, seed))
        return *pair, random_packed(7, 9, FEATURES, torch.float32, seed), hx

    assert_same_as_torch(make)


@layers
def test_packed_data_of_any_strides(class_name):
    packed = random_packed(7, 9, FEATURES, torch.float32, 0)
    for data in strided_copies(packed.data):
        pair = make_pair(class_name, FEATURES, HIDDEN, 2, bidirectional=True)
        strided = PackedSequence(data, *packed[1:])
        assert_same_as_torch(lambda seed, pair=pair, strided=strided: (*pair, strided, None))


@layers
def test_one_sequence_packed(class_name):
    pair = make_pair(class_name, FEATURES, HIDDEN)
    assert_same_as_torch(lambda seed: (*pair, pack_sequence([draw(STEPS, FEATURES, seed=seed)]), None))


@backends
@cells
@dtypes
@pytest.mark.parametrize("batch", [None, 0, 1, 33], ids=["unbatched", "B0", "B1", "B33"])
@pytest.mark.parametrize("hidden", [1, 7, 18, 33], ids=lambda hidden: f"H{hidden}")
def test_cells(backend, class_name, dtype, batch, hidden):
    middle = () if batch is None else (batch,)

    def make(seed, with_hx, **arguments):
        pair = make_pair(class_name, FEATURES, hidden, seed=seed, dtype=dtype, **arguments)
        hx = cell_state(class_name, *middle, hidden, seed=seed, dtype=dtype) if with_hx else None
        return *pair, draw(*middle, FEATURES, seed=seed, dtype=dtype), hx

    for arguments in [{}, {"bias": False}] + [{"nonlinearity": "relu"}] * (class_name == "RNNCell"):
        for with_hx in (False, True):
            assert_same_as_torch(
                lambda seed, with_hx=with_hx, arguments=arguments: make(seed, with_hx, **arguments),
                backend=backend,
            )
    assert_same_as_torch(lambda seed: make(seed, True), backend=backend, backward=False)


@cells
@pytest.mark.parametrize("layout", range(4), ids=["reversed", "every_second", "wide_rows", "offset"])
def test_cells_take_any_strides(class_name, layout):
    def make(seed):
        pair = make_pair(class_name, FEATURES, HIDDEN, seed=seed)
        hx = map_state(lambda t: list(strided_copies(t))[layout], cell_state(class_name, BATCH, HIDDEN, seed=seed))
        return *pair, list(strided_copies(draw(BATCH, FEATURES, seed=seed)))[layout], hx

    assert_same_as_torch(make)


def test_state_may_be_a_list():
    for class_name, input in (("LSTM", draw(STEPS, BATCH, FEATURES)), ("LSTMCell", draw(BATCH, FEATURES))):
        ours, theirs = make_pair(class_name, FEATURES, HIDDEN)
        shape = (1, BATCH, HIDDEN) if class_name == "LSTM" else (BATCH, HIDDEN)
        hx = [draw(*shape, seed=1), draw(*shape, seed=2)]
        torch.testing.assert_close(ours(input, hx), theirs(input, hx))


@layers
def test_input_and_state_are_left_alone(class_name):
    ours, _ = make_pair(class_name, FEATURES, HIDDEN, 2, bidirectional=True)
    for input in (draw(STEPS, BATCH, FEATURES), random_packed(BATCH, STEPS, FEATURES, torch.float32, 0)):
        hx = random_state(ours, BATCH, torch.float32, 0)
        before = [tensor.clone() for tensor in tensors_in((input, hx))]
        run(ours, input, hx)
        run(ours, input, hx, backward=False)
        for tensor, old in zip(tensors_in((input, hx)), before, strict=True):
            assert torch.equal(tensor, old)


@layers
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_results_share_no_memory(class_name, grad):
    """With one time step the output and the last state hold the same numbers, and are still two tensors."""
    ours, _ = make_pair(class_name, FEATURES, HIDDEN)
    hx = random_state(ours, BATCH, torch.float32, 0)
    with torch.set_grad_enabled(grad):
        output, state = ours(draw(1, BATCH, FEATURES), hx)
    states = state if isinstance(state, tuple) else (state,)
    given = hx if isinstance(hx, tuple) else (hx,)
    pointers = [t.untyped_storage().data_ptr() for t in (output, *states, *given)]
    assert len(set(pointers)) == len(pointers)


# Dropout


@backends
@layers
@dtypes
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_layers": 2, "dropout": 0.5},
        {"num_layers": 3, "dropout": 0.3, "bidirectional": True, "batch_first": True},
        {"num_layers": 2, "dropout": 1.0},
        {"num_layers": 2, "dropout": 0.5, "bidirectional": True, "packed": True},
    ],
    ids=str,
)
def test_dropout_draws_torchs_masks(backend, class_name, dtype, arguments):
    arguments = dict(arguments)
    packed = arguments.pop("packed", False)

    def make(seed):
        pair = make_pair(class_name, FEATURES, HIDDEN, dtype=dtype, seed=seed, **arguments)
        if packed:
            return *pair, random_packed(BATCH, STEPS, FEATURES, dtype, seed), None
        return *pair, draw(BATCH, STEPS, FEATURES, seed=seed, dtype=dtype), None

    assert_same_as_torch(make, backend=backend)


@backends
@layers
def test_the_generator_stands_where_torchs_stands(backend, class_name):
    for training in (True, False):
        for arguments in ({"dropout": 0.5}, {"dropout": 1.0}, {"dropout": 0.0}):
            states = []
            for module in make_pair(class_name, FEATURES, HIDDEN, 3, train=training, **arguments):
                torch.manual_seed(3)
                with fastrnn.use_backend(backend):
                    module(draw(STEPS, BATCH, FEATURES))
                states.append(torch.get_rng_state())
            assert torch.equal(*states)


@layers
def test_no_dropout_in_eval_mode(class_name):
    def make(seed):
        pair = make_pair(class_name, FEATURES, HIDDEN, 3, dropout=0.9, train=False, seed=seed)
        return *pair, draw(STEPS, BATCH, FEATURES, seed=seed), None

    assert_same_as_torch(make)


# Autograd


@backends
@layers
def test_backward_in_eval_mode(backend, class_name):
    def make(seed):
        pair = make_pair(class_name, FEATURES, HIDDEN, 2, bidirectional=True, train=False, seed=seed)
        hx = random_state(pair[0], BATCH, torch.float32, seed)
        return *pair, draw(STEPS, BATCH, FEATURES, seed=seed), hx

    assert_same_as_torch(make, backend=backend)


@backends
@pytest.mark.parametrize(
    ("class_name", "which"),
    [
        (name, which)
        for name in LAYER_CLASSES
        for which in ("output", "h_n", "c_n", "last_step", "one_direction")
        if which != "c_n" or name == "LSTM"
    ],
)
def test_backward_from_some_of_the_results(backend, class_name, which):
    def choose(returned):
        output, state = returned
        h_n, c_n = state if isinstance(state, tuple) else (state, None)
        parts = {"output": output, "h_n": h_n, "c_n": c_n, "last_step": output[-1]}
        return parts[which] if which in parts else output[..., HIDDEN:]

    def make(seed):
        pair = make_pair(class_name, FEATURES, HIDDEN, 2, bidirectional=True, seed=seed)
        hx = random_state(pair[0], BATCH, torch.float32, seed)
        return *pair, draw(STEPS, BATCH, FEATURES, seed=seed), hx

    assert_same_as_torch(make, backend=backend, choose=choose)


@backends
@layers
def test_only_what_asks_for_a_gradient_gets_one(backend, class_name):
    ours, _ = make_pair(class_name, FEATURES, HIDDEN, 2)
    input = draw(STEPS, BATCH, FEATURES)
    hx = random_state(ours, BATCH, torch.float32, 0)
    with fastrnn.use_backend(backend):
        expected = run(ours, input, hx)
        for name, asked in ours.named_parameters():
            ours.requires_grad_(False).zero_grad()
            asked.requires_grad_()
            loss = ours(input, hx)[0]
            assert loss.requires_grad
            loss.sum().backward()
            assert [key for key, p in ours.named_parameters() if p.grad is not None] == [name]
            assert asked.grad.shape == expected[f"grad {name}"].shape
        ours.requires_grad_(False).zero_grad()
        assert not ours(input, hx)[0].requires_grad
        leaf = input.clone().requires_grad_()
        ours(leaf, hx)[0].sum().backward()
    assert leaf.grad.shape == input.shape
    assert all(parameter.grad is None for parameter in ours.parameters())


@backends
@layers
def test_backward_twice_with_retain_graph(backend, class_name):
    ours, _ = make_pair(class_name, FEATURES, HIDDEN, 2, bidirectional=True)
    input = draw(STEPS, BATCH, FEATURES).requires_grad_()
    with fastrnn.use_backend(backend):
        loss = ours(input)[0].square().sum()
        loss.backward(retain_graph=True)
        first = [input.grad.clone(), *(p.grad.clone() for p in ours.parameters())]
        loss.backward()
    second = [input.grad, *(p.grad for p in ours.parameters())]
    for once, twice in zip(first, second, strict=True):
        assert torch.equal(twice, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@backends
@layers
@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_changing_the_output_in_place_before_backward(backend, class_name, proj_size, packed):
    """torch.nn allows it in most cases on a CPU; ours in all."""
    arguments = {"proj_size": proj_size} if class_name == "LSTM" and proj_size else {}
    ours, _ = make_pair(class_name, FEATURES, HIDDEN, 2, bidirectional=True, **arguments)
    input = random_packed(BATCH, STEPS, FEATURES, torch.float32, 0)
    if not packed:
        input = pad_packed_sequence(input)[0]

    def gradients(change):
        ours.zero_grad()
        with fastrnn.use_backend(backend):
            output, state = ours(input)
            output = change(output.data if packed else output)
            states = [change(s) for s in (state if isinstance(state, tuple) else (state,))]
            (output.square().sum() + sum(s.sum() for s in states)).backward()
        return [p.grad.clone() for p in ours.parameters()]

    for changed, expected in zip(gradients(lambda t: t.mul_(2).add_(1)), gradients(lambda t: t * 2 + 1), strict=True):
        assert torch.equal(changed, expected)


@backends
@pytest.mark.parametrize("class_name", ["GRUCell", "LSTMCell"])
def test_changing_a_cells_output_in_place_before_backward(backend, class_name):
    """As torch.nn allows; its RNNCell keeps its output for the backward pass."""
    ours, _ = make_pair(class_name, FEATURES, HIDDEN)

    def gradients(change):
        ours.zero_grad()
        with fastrnn.use_backend(backend):
            result = ours(draw(BATCH, FEATURES), cell_state(class_name, BATCH, HIDDEN))
            results = [change(t) for t in (result if isinstance(result, tuple) else (result,))]
            sum(t.square().sum() for t in results).backward()
        return [p.grad.clone() for p in ours.parameters()]

    for changed, expected in zip(gradients(lambda t: t.mul_(2).add_(1)), gradients(lambda t: t * 2 + 1), strict=True):
        assert torch.equal(changed, expected)


@backends
@layers
def test_changing_the_input_before_backward_is_noticed(backend, class_name):
    ours, _ = make_pair(class_name, FEATURES, HIDDEN)
    input = draw(STEPS, BATCH, FEATURES)
    with fastrnn.use_backend(backend):
        loss = ours(input)[0].sum()
        input.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@backends
@layers
def test_changing_a_weight_before_backward_is_noticed(backend, class_name):
    ours, _ = make_pair(class_name, FEATURES, HIDDEN)
    with fastrnn.use_backend(backend):
        loss = ours(draw(STEPS, BATCH, FEATURES))[0].sum()
        with torch.no_grad():
            ours.weight_hh_l0.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@backends
@layers
def test_a_loop_through_the_state(backend, class_name):
    """Truncated BPTT: each call goes on from the state of the one before, detached or not."""

    def losses(module, dtype):
        module = module.to(dtype)
        hx, total = None, 0
        for index in range(4):
            output, hx = module(draw(STEPS, BATCH, FEATURES, seed=index, dtype=dtype), hx)
            total = total + output.square().sum()
            if index == 1:
                hx = map_state(torch.Tensor.detach, hx)
        module.zero_grad()
        total.backward()
        return [total.detach(), *(p.grad for p in module.parameters())]

    ours, theirs = make_pair(class_name, FEATURES, HIDDEN, 2)
    with fastrnn.use_backend(backend):
        mine = losses(ours, torch.float64)
    torch.testing.assert_close(mine, losses(theirs, torch.float64), rtol=1e-12, atol=1e-12)


@backends
@layers
def test_training_follows_torchs_training(backend, class_name):
    histories = []
    for module in make_pair(class_name, FEATURES, HIDDEN, 2, dtype=torch.float64):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
        history = []
        with fastrnn.use_backend(backend):
            for index in range(10):
                optimizer.zero_grad()
                loss = module(draw(STEPS, BATCH, FEATURES, seed=index % 2, dtype=torch.float64))[0].square().sum()
                loss.backward()
                optimizer.step()
                history.append(loss.item())
        histories.append(history)
    assert histories[0] == pytest.approx(histories[1], rel=1e-9)
    assert histories[0][-1] < histories[0][0]


@backends
@pytest.mark.parametrize("class_name", LAYER_CLASSES + CELL_CLASSES)
def test_inference_mode(backend, class_name):
    ours, theirs = make_pair(class_name, FEATURES, HIDDEN)
    input = draw(BATCH, FEATURES) if class_name in CELL_CLASSES else draw(STEPS, BATCH, FEATURES)
    with fastrnn.use_backend(backend), torch.inference_mode():
        mine, torchs = ours(input), theirs(input)
        mine = ours(input, mine[1] if class_name in LAYER_CLASSES else mine)
        torchs = theirs(input, torchs[1] if class_name in LAYER_CLASSES else torchs)
        first = mine[0] if isinstance(mine, tuple) else mine
        assert first.is_inference()
    torch.testing.assert_close(mine, torchs)
    with torch.inference_mode():
        made_inside = getattr(fastrnn, class_name)(FEATURES, HIDDEN)
        made_inside.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(made_inside(input), theirs(input))


@pytest.mark.parametrize("class_name", LAYER_CLASSES + CELL_CLASSES)
def test_modules_on_the_meta_device(class_name):
    shape = (BATCH, FEATURES) if class_name in CELL_CLASSES else (STEPS, BATCH, FEATURES)
    results = []
    for module in make_pair(class_name, FEATURES, HIDDEN, device="meta"):
        result = module(torch.empty(shape, device="meta"))
        results.append(torch.utils._pytree.tree_map(lambda t: (t.device, t.shape, t.dtype), result))
    assert results[0] == results[1]


@layers
def test_complex_numbers_fall_to_torch(class_name):
    """What no kernel takes, torch's own does."""
    ours, theirs = make_pair(class_name, FEATURES, HIDDEN, dtype=torch.complex64)
    input = torch.complex(draw(STEPS, BATCH, FEATURES), draw(STEPS, BATCH, FEATURES, seed=1))
    torch.testing.assert_close(ours(input), theirs(input))
