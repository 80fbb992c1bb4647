"""The constructor arguments beyond torch.nn: each against a plain loop from its paper's formula, and together."""

import copy
import io
import itertools
import random
import statistics

import pytest
import torch
from helpers import errors_against_float64, random_packed, random_state, rule_violation
from torch import nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

import fastrnn

FEATURES, HIDDEN, BATCH, STEPS = 3, 8, 4, 7
# Loop and layer add up in different orders: to what they agree in float64.
AGREEMENT = 1e-10

# Class name and its options, for every option by itself.
SINGLE = [
    ("GRU", {"reset_after": False}),
    ("RNN", {"layer_norm": True}),
    ("GRU", {"layer_norm": True}),
    ("LSTM", {"layer_norm": True}),
    ("RNN", {"zoneout": 0.3}),
    ("GRU", {"zoneout": 0.3}),
    ("LSTM", {"zoneout": 0.3}),
    ("LSTM", {"zoneout": (0.5, 0.05)}),
    ("LSTM", {"zoneout": (0.0, 0.2)}),
    ("RNN", {"recurrent_dropout": 0.4}),
    ("GRU", {"recurrent_dropout": 0.4}),
    ("LSTM", {"recurrent_dropout": 0.4}),
    ("RNN", {"weight_dropout": 0.4}),
    ("GRU", {"weight_dropout": 0.4}),
    ("LSTM", {"weight_dropout": 0.4}),
    ("RNN", {"residual": True}),
    ("GRU", {"residual": True}),
    ("LSTM", {"residual": True}),
    ("LSTM", {"peephole": True}),
    ("RNN", {"periods": (1, 2, 4, 8)}),
    ("RNN", {"periods": (3, 1)}),
]
# Further ones that meet in random combinations.
POOL = {
    "RNN": [{"nonlinearity": "relu"}, {"periods": (1, 2)}],
    "GRU": [{"reset_after": False}],
    "LSTM": [{"peephole": True}, {"zoneout": (0.4, 0.1)}, {"proj_size": 5}],
}
COMMON = [
    {"layer_norm": True},
    {"zoneout": 0.2},
    {"recurrent_dropout": 0.3},
    {"weight_dropout": 0.3},
    {"residual": True},
    {"num_layers": 3},
    {"num_layers": 2, "dropout": 0.5},
    {"bidirectional": True},
    {"bias": False},
]


def changes_the_step(case):
    """Whether the layer's step in ``eval()`` is not torch.nn's."""
    return not {"recurrent_dropout", "weight_dropout", "residual"} & case[1].keys()


def name_of(case):
    return f"{case[0]}-{'-'.join(f'{key}={value}' for key, value in case[1].items())}"


single = pytest.mark.parametrize("case", SINGLE, ids=name_of)


def combinations(count=60):
    chosen, pick = [], random.Random(6)
    while len(chosen) < count:
        class_name = pick.choice(list(POOL))
        options = {}
        for option in pick.sample(POOL[class_name] + COMMON, pick.randint(2, 6)):
            options.update(option)
        if not (options.get("layer_norm") and options.get("reset_after") is False):
            chosen.append((class_name, options))
    return chosen


def make(case, dtype=torch.float64, **more):
    class_name, options = case
    torch.manual_seed(0)
    module = getattr(fastrnn, class_name)(FEATURES, HIDDEN, dtype=dtype, **({"num_layers": 2} | options | more))
    # away from the values that layer normalization begins with
    for name, parameter in module.named_parameters():
        if "_ln_" in name:
            nn.init.normal_(parameter, 1.0 if name.startswith("weight") else 0.0, 0.3)
    return module


def draw(module, dtype=torch.float64, steps=STEPS, batch=BATCH):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, batch, FEATURES, generator=generator).to(dtype)
    return x, random_state(module, batch, dtype, 2)


def normalized(values, gain, shift):
    """Ba et al. (2016), equation 4."""
    mean = values.mean(-1, keepdim=True)
    variance = ((values - mean) ** 2).mean(-1, keepdim=True)
    return (values - mean) / (variance + 1e-5).sqrt() * gain + shift


def plain_loop(module, x, hx, resets=None):
    """A module of fastrnn as a loop over layers, directions and time steps, from the formulas of the papers.

    Masks are drawn from torch's generator in the order in which a call does: for every layer dropped weights, dropped
    units, zoneout of c, zoneout of h, and dropout behind the layer.
    """
    options = module._options or fastrnn.options.Options()
    directions, training, is_lstm = 1 + module.bidirectional, module.training, module.mode == "LSTM"
    hs, cs = hx if is_lstm else (hx, None)
    steps, batch, size = len(x), x.shape[1], module.hidden_size
    zones = options.zoneout if isinstance(options.zoneout, tuple) else (options.zoneout, options.zoneout)
    final_h, final_c = [], []
    for layer in range(module.num_layers):
        suffixes = [f"_l{layer}", f"_l{layer}_reverse"][:directions]
        get = lambda name, suffix: getattr(module, name + suffix, 0)  # noqa: E731
        weights_hh = torch.stack([get("weight_hh", suffix) for suffix in suffixes])
        if options.periods:
            group = torch.arange(size) // (size // len(options.periods))
            longer = [[options.periods[k] <= options.periods[j] for j in group] for k in group]
            weights_hh = weights_hh * torch.tensor(longer)
        if training and options.weight_dropout:
            weights_hh = dropout(weights_hh, options.weight_dropout)
        state = hs[layer * directions : (layer + 1) * directions]
        mask = dropout(torch.ones_like(state), options.recurrent_dropout, training)
        zone_c, zone_h = (torch.full((), zone, dtype=x.dtype) for zone in zones)
        if training and is_lstm and zones[0]:
            zone_c = (torch.rand(steps * batch, directions, size) < zones[0]).to(x.dtype)
        if training and zones[1]:
            zone_h = (torch.rand(steps * batch, directions, state.shape[2]) < zones[1]).to(x.dtype)
        outputs = []
        for number, suffix in enumerate(suffixes):
            weight_ih, weight_hh = get("weight_ih", suffix), weights_hh[number]
            bias_ih, bias_hh = get("bias_ih", suffix), get("bias_hh", suffix)
            h, c = state[number], cs[layer * directions + number] if is_lstm else None
            results = [None] * steps
            for t in reversed(range(steps)) if number else range(steps):
                begin = 0
                if resets is not None:
                    border = t + 1 if number else t
                    done = resets[border] if border < steps else torch.zeros(batch, dtype=torch.bool)
                    h, c = h * ~done[:, None], c * ~done[:, None] if is_lstm else None
                    begin = torch.tensor(
                        [max([0, *resets[: t + 1, b].nonzero().flatten().tolist()]) for b in range(batch)]
                    )
                by_rows = [
                    z.view(steps, batch, directions, -1)[t, :, number] if z.dim() else z for z in (zone_c, zone_h)
                ]
                a, b = x[t] @ weight_ih.T, (h * mask[number]) @ weight_hh.T
                if options.layer_norm:
                    a = normalized(a, get("weight_ln_ih", suffix), get("bias_ln_ih", suffix))
                    b = normalized(b, get("weight_ln_hh", suffix), get("bias_ln_hh", suffix))
                a, b = a + bias_ih, b + bias_hh
                if is_lstm:
                    i, f, g, o = (a + b).split(size, -1)
                    if options.peephole:
                        i, f = i + get("weight_ci", suffix) * c, f + get("weight_cf", suffix) * c
                    new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    if options.peephole:
                        o = o + get("weight_co", suffix) * new_c
                    seen = new_c
                    if options.layer_norm:
                        seen = normalized(new_c, get("weight_ln_c", suffix), get("bias_ln_c", suffix))
                    new_h = o.sigmoid() * seen.tanh()
                    if module.proj_size:
                        new_h = new_h @ get("weight_hr", suffix).T
                    c = by_rows[0] * c + (1 - by_rows[0]) * new_c
                elif module.mode == "GRU":
                    (a_r, a_z, a_n), (b_r, b_z, b_n) = a.split(size, -1), b.split(size, -1)
                    r, z = (a_r + b_r).sigmoid(), (a_z + b_z).sigmoid()
                    if options.reset_after:
                        n = (a_n + r * b_n).tanh()
                    else:
                        bias_hn = bias_hh[2 * size :] if module.bias else 0
                        n = (a_n + (r * h * mask[number]) @ weight_hh[2 * size :].T + bias_hn).tanh()
                    new_h = (1 - z) * n + z * h
                else:
                    new_h = (a + b).tanh() if module.nonlinearity == "tanh" else (a + b).relu()
                new_h = by_rows[1] * h + (1 - by_rows[1]) * new_h
                if options.periods:
                    clock = torch.as_tensor(t - begin).expand(batch)
                    moves = torch.tensor([[int(now) % options.periods[k] == 0 for k in group] for now in clock])
                    new_h = torch.where(moves, new_h, h)
                h = results[t] = new_h
            outputs.append(torch.stack(results))
            final_h.append(h)
            final_c.append(c)
        below, x = x, torch.cat(outputs, -1)
        if options.residual and layer:
            x = x + below
        if module.dropout and layer < module.num_layers - 1:
            x = dropout(x.flatten(0, 1), module.dropout, training).view_as(x)
    h_n = torch.stack(final_h)
    return x, (h_n, torch.stack(final_c)) if is_lstm else h_n


def parts(result):
    output, final = result
    return [output, *(final if isinstance(final, tuple) else (final,))]


def all_results(call, module, x, hx, **arguments):
    """Output, final state and gradients of everything, from seed 3."""
    x = x.detach().requires_grad_()
    hx = tuple(part.detach().requires_grad_() for part in (hx if isinstance(hx, tuple) else (hx,)))
    torch.manual_seed(3)
    results = parts(call(x, hx if len(hx) == 2 else hx[0], **arguments))
    loss = sum((result.sin() * (1 + number)).sum() for number, result in enumerate(results))
    leaves = [x, *hx, *module.parameters()]
    return results + list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def assert_agree(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=AGREEMENT * max(1.0, other.detach().abs().max().item()))


def assert_is_plain_loop(module, **arguments):
    x, hx = draw(module)
    expected = all_results(lambda *a, **k: plain_loop(module, *a, **k), module, x, hx, **arguments)
    assert_agree(all_results(module, module, x, hx, **arguments), expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@single
def test_is_the_plain_loop(case, bidirectional, training):
    module = make(case, bidirectional=bidirectional).train(training)
    assert_is_plain_loop(module)
    with fastrnn.use_backend("torch"):
        assert_is_plain_loop(module)


@pytest.mark.parametrize("with_resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("case", combinations(), ids=name_of)
def test_combinations(case, with_resets):
    module = make(case)
    resets = torch.rand(STEPS, BATCH, generator=torch.Generator().manual_seed(0)) < 0.3
    arguments = {"resets": resets} if with_resets else {}
    assert_is_plain_loop(module, **arguments)
    assert_is_plain_loop(module.eval(), **arguments)


# Every kernel, with all that it can do beside.
KERNELS = [
    ("LSTM", {"layer_norm": True, "peephole": True, "zoneout": (0.3, 0.1), "recurrent_dropout": 0.2}),
    ("LSTM", {"peephole": True, "zoneout": (0.3, 0.1), "recurrent_dropout": 0.2}),
    ("GRU", {"layer_norm": True, "zoneout": 0.3, "recurrent_dropout": 0.2}),
    ("GRU", {"zoneout": 0.3, "recurrent_dropout": 0.2}),
    ("GRU", {"reset_after": False, "zoneout": 0.3, "recurrent_dropout": 0.2}),
    ("RNN", {"layer_norm": True, "zoneout": 0.3, "recurrent_dropout": 0.2}),
    ("RNN", {"nonlinearity": "relu", "zoneout": 0.3, "recurrent_dropout": 0.2}),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("hidden", "batch"), [(1, 1), (5, 3), (33, 1), (40, 130), (130, 21)])
@pytest.mark.parametrize("case", KERNELS, ids=name_of)
def test_sizes(case, hidden, batch, threads):
    """Rows that are no whole vectors, blocks of rows and threads, dense and packed, against the reference."""
    class_name, options = case
    torch.manual_seed(0)
    module = getattr(fastrnn, class_name)(FEATURES, hidden, bidirectional=True, dtype=torch.float64, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for input in (draw(module, batch=batch)[0], random_packed(batch, STEPS, FEATURES, torch.float64, 1)):
            results = []
            for backend in ("numba", "reference"):
                torch.manual_seed(1)
                with fastrnn.use_backend(backend):
                    output, *_ = module(input)
                output = output.data if isinstance(output, PackedSequence) else output
                results.append([output, *torch.autograd.grad(output.sin().sum(), list(module.parameters()))])
            assert_agree(*results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", KERNELS, ids=name_of)
def test_bits_do_not_depend_on_threads(case):
    module = make(case, torch.float32, bidirectional=True)
    x, hx = draw(module, torch.float32, steps=40, batch=19)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(all_results(module, module, x, hx))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(other, results[0], strict=True))


@pytest.mark.parametrize("case", KERNELS, ids=name_of)
def test_rule_in_float32(case):
    """Beside the same operations of torch in float32, on average over some draws.

    Where rows are normalized, the median of the draws decides: a row whose values happen to lie close together
    magnifies every rounding before it, and an average, even of 160 draws, is that of the worst one.
    """
    normalized = "layer_norm" in case[1]
    errors = []
    for seed in range(160 if normalized or "relu" in case[1].values() else 8):
        module = make(case, torch.float32, num_layers=1, bidirectional=True)
        exact = copy.deepcopy(module).double()
        x = torch.randn(30, 20, FEATURES, generator=torch.Generator().manual_seed(seed))
        hx = random_state(module, 20, torch.float32, seed)
        results = []
        for backend, layer in (("numba", module), ("reference", module), ("reference", exact)):
            dtype = torch.float64 if layer is exact else torch.float32
            state = tuple(part.to(dtype) for part in hx) if isinstance(hx, tuple) else hx.to(dtype)
            with fastrnn.use_backend(backend):
                results.append(all_results(layer, layer, x.to(dtype), state))
        errors.append([errors_against_float64(*three) for three in zip(*results, strict=True)])
    for draws in zip(*errors, strict=True):
        problem = rule_violation(list(draws), statistics.median if normalized else statistics.mean)
        assert problem is None, problem


def test_what_runs_where():
    x = torch.randn(STEPS, BATCH, FEATURES)
    layer = fastrnn.LSTM(FEATURES, HIDDEN, layer_norm=True)
    assert fastrnn.explain(layer, x).layers[0].backend == "numba"
    projected = fastrnn.LSTM(FEATURES, HIDDEN, proj_size=2, layer_norm=True, residual=True)
    explained = fastrnn.explain(projected, x).layers[0]
    assert explained.backend == "reference"
    assert dict(explained.passed_over) == {
        "numba": "its kernels have no layer_norm with projections (proj_size)",
        "torch": "torch.nn has no layer_norm and no residual",
    }
    with (
        fastrnn.use_backend("numba"),
        pytest.raises(RuntimeError, match="its kernels have no layer_norm with projections"),
    ):
        projected(x)
    with fastrnn.use_backend("torch"):
        assert fastrnn.explain(layer, x).layers[0].backend == "reference"
    # these change nothing in eval()
    regularised = fastrnn.LSTM(FEATURES, HIDDEN, proj_size=2, recurrent_dropout=0.5, weight_dropout=0.5)
    assert fastrnn.explain(regularised, x).layers[0].backend == "reference"
    assert fastrnn.explain(regularised.eval(), x).layers[0].backend == "numba"


def test_memory_of_others_is_left_alone():
    """The output may be changed in place, a graph used twice, and neither input nor state are written to."""
    for case in KERNELS:
        module = make(case)
        x, hx = draw(module)
        copies = copy.deepcopy((x, hx))
        torch.manual_seed(0)
        output, _ = module(x, hx)
        loss = (output * 1).sin().sum()
        parameters = list(module.parameters())
        once = torch.autograd.grad(loss, parameters, retain_graph=True)
        output.detach().zero_()
        assert_agree(torch.autograd.grad(loss, parameters), once)
        given = parts((x, hx))
        assert all(torch.equal(*pair) for pair in zip(given, parts(copies), strict=True))


@pytest.mark.parametrize("case", SINGLE + combinations(20), ids=name_of)
def test_layouts(case):
    """batch_first, a single sequence and packed input give what a batch of whole sequences does."""
    module = make(case).eval()
    x, hx = draw(module)
    output, final = module(x, hx)
    module.batch_first = True
    assert_agree(parts(module(x.transpose(0, 1), hx)), parts((output.transpose(0, 1), final)))
    module.batch_first = False
    pick = lambda part: part[:, 1]  # noqa: E731
    one = tuple(map(pick, hx)) if isinstance(hx, tuple) else pick(hx)
    assert_agree(parts(module(x[:, 1], one)), [pick(part) for part in parts((output, final))])
    packed = random_packed(BATCH, STEPS, FEATURES, torch.float64, 5)
    together, last = module(packed, hx)
    assert isinstance(together, PackedSequence)
    for number, (sequence, result) in enumerate(zip(unpack_sequence(packed), unpack_sequence(together), strict=True)):
        pick = lambda part: part[:, number]  # noqa: E731, B023
        one = tuple(map(pick, hx)) if isinstance(hx, tuple) else pick(hx)
        alone = parts(module(sequence, one))
        assert_agree([result, *map(pick, parts((together, last))[1:])], alone)


@pytest.mark.parametrize("case", SINGLE + combinations(12), ids=name_of)
def test_packed_training(case):
    """Masks of packed input: those of a batch of sequences of one length are those of the dense input."""
    module = make(case)
    x, hx = draw(module)
    torch.manual_seed(4)
    expected = parts(module(x, hx))
    torch.manual_seed(4)
    output, final = module(pack_sequence(list(x.unbind(1))), hx)
    assert_agree(parts((torch.stack(unpack_sequence(output), 1), final)), expected)


@pytest.mark.parametrize("case", SINGLE + combinations(4), ids=name_of)
def test_derivatives(case):
    """Of first and second order, in forward mode and per example; relu has a kink."""
    if case[1].get("nonlinearity") == "relu":
        case = case[0], case[1] | {"nonlinearity": "tanh"}
    module = make(case)
    x, _ = draw(module, steps=3, batch=2)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def call(x, *parameters):
        torch.manual_seed(5)  # the same masks in every call
        return parts(torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,)))[0]

    inputs = [x.requires_grad_(), *(parameter.detach().requires_grad_() for parameter in parameters)]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
    tangent = torch.randn_like(x)
    _, forward = torch.func.jvp(lambda x: call(x, *parameters), (x.detach(),), (tangent,))
    output = call(x, *parameters)
    (backward,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(forward.sum(), (backward * tangent).sum())


@pytest.mark.parametrize("case", SINGLE, ids=name_of)
def test_per_sample_gradients(case):
    module = make(case).eval()
    x, _ = draw(module)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x[:, None],))[0].sin().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)
    for number in range(BATCH):
        alone = torch.func.grad(loss)(parameters, x[:, number])
        assert_agree([together[name][number] for name in alone], list(alone.values()))


@single
def test_masks_are_reproducible(case):
    module = make(case)
    x, hx = draw(module)

    def run(seed):
        torch.manual_seed(seed)
        return parts(module(x, hx))

    first, again, other = run(0), run(0), run(1)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    random_ones = {"recurrent_dropout", "zoneout", "weight_dropout"}
    assert torch.equal(first[0], other[0]) == (not random_ones & case[1].keys())
    module.eval()
    assert all(torch.equal(*pair) for pair in zip(run(0), run(1), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [case for case in SINGLE if changes_the_step(case)], ids=name_of)
def test_half_precision_and_autocast(case, dtype):
    """The state is kept in float32: the result is that of float32 on the rounded numbers, rounded once."""
    module = make(case, dtype).eval()
    x, hx = draw(module, dtype)
    wide_hx = tuple(part.float() for part in hx) if isinstance(hx, tuple) else hx.float()
    single_layer = make(case, dtype, num_layers=1).eval()
    pick = lambda part: part[:1]  # noqa: E731
    first = tuple(map(pick, hx)) if isinstance(hx, tuple) else pick(hx)
    wide_first = tuple(map(pick, wide_hx)) if isinstance(hx, tuple) else pick(wide_hx)
    expected = parts(copy.deepcopy(single_layer).float()(x.float(), wide_first))
    for mine, other in zip(parts(single_layer(x, first)), expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other.to(dtype))
    with torch.autocast("cpu", dtype):
        for mine, other in zip(parts(module.float()(x.float(), wide_hx)), parts(module.to(dtype)(x, hx)), strict=True):
            assert mine.dtype == dtype
            assert torch.equal(mine, other)


@single
def test_compile(case):
    module = make(case, num_layers=2 if "residual" in case[1] else 1)
    x, hx = draw(module, steps=3)
    torch._dynamo.reset()  # every case compiles the same functions anew
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_agree(all_results(compiled, module, x, hx), all_results(module, module, x, hx))


@single
def test_state_dict_copies_and_repr(case):
    module = make(case)
    x, hx = draw(module)
    torch.manual_seed(4)
    expected = parts(module(x, hx))
    other = getattr(fastrnn, case[0])(FEATURES, HIDDEN, 2, dtype=torch.float64, **case[1])
    other.load_state_dict(module.state_dict())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (other, copy.deepcopy(module), torch.load(file, weights_only=False)):
        torch.manual_seed(4)
        assert all(torch.equal(*pair) for pair in zip(parts(twin(x, hx)), expected, strict=True))
        assert repr(twin) == repr(module)
    for name, value in case[1].items():
        assert f"{name}={value}" in repr(module)
    torch.manual_seed(7)
    fresh = getattr(fastrnn, case[0])(FEATURES, HIDDEN, 2, dtype=torch.float64, **case[1])
    torch.manual_seed(7)
    module.reset_parameters()
    torch.manual_seed(7)
    plain = getattr(nn, case[0])(FEATURES, HIDDEN, 2, dtype=torch.float64)
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, dict(module.named_parameters())[name])
        if name in dict(plain.named_parameters()):
            assert torch.equal(parameter, dict(plain.named_parameters())[name])
        elif "_ln_" in name:
            assert (parameter == name.startswith("weight")).all()


def test_parameters():
    lstm = fastrnn.LSTM(3, 4, 2, bidirectional=True, layer_norm=True, peephole=True)
    further = {"weight_ci": 4, "weight_cf": 4, "weight_co": 4, "weight_ln_ih": 16, "bias_ln_ih": 16}
    further |= {"weight_ln_hh": 16, "bias_ln_hh": 16, "weight_ln_c": 4, "bias_ln_c": 4}
    shapes = {name: tuple(parameter.shape) for name, parameter in lstm.named_parameters()}
    for suffix, (role, size) in itertools.product(("_l0", "_l0_reverse", "_l1", "_l1_reverse"), further.items()):
        assert shapes.pop(role + suffix) == (size,)
    assert shapes.keys() == dict(nn.LSTM(3, 4, 2, bidirectional=True).named_parameters()).keys()
    gru = fastrnn.GRU(3, 4, layer_norm=True)
    assert {name for name, _ in gru.named_parameters() if "ln" in name} == {
        f"{role}_l0" for role in ("weight_ln_ih", "bias_ln_ih", "weight_ln_hh", "bias_ln_hh")
    }


def test_torch_knows_no_options():
    model = nn.ModuleDict({"inner": fastrnn.LSTM(3, 4, peephole=True), "plain": fastrnn.GRU(3, 4)})
    with pytest.raises(ValueError, match=r"torch.nn.LSTM has no peephole: inner cannot be converted"):
        fastrnn.convert(model, to="torch")
    assert type(model["plain"]) is fastrnn.GRU


def test_stream():
    for case in SINGLE:
        module = make(case).eval()
        if module._options.periods is not None:
            with pytest.raises(ValueError, match="clock"):
                fastrnn.Stream(module, BATCH)
            continue
        x, _ = draw(module)
        stream = fastrnn.Stream(module, BATCH)
        assert_agree([torch.stack([stream.step(row) for row in x])], [module(x)[0].detach()])


@pytest.mark.parametrize(
    ("class_name", "options", "error", "message"),
    [
        ("RNN", {"zoneout": (0.1, 0.2)}, ValueError, "for an LSTM also a pair"),
        ("LSTM", {"zoneout": (0.1, 0.2, 0.3)}, ValueError, "for an LSTM also a pair"),
        ("LSTM", {"zoneout": 1.5}, ValueError, "zoneout should be a number from 0 to 1, got 1.5"),
        ("GRU", {"recurrent_dropout": -0.1}, ValueError, "recurrent_dropout should be a number from 0 to 1"),
        ("GRU", {"weight_dropout": "0.1"}, TypeError, "weight_dropout should be a number from 0 to 1, got '0.1'"),
        ("GRU", {"layer_norm": 1}, TypeError, "layer_norm should be True or False, got 1"),
        ("GRU", {"layer_norm": True, "reset_after": False}, ValueError, "choose one"),
        ("GRU", {"periods": (1, 2)}, TypeError, "unexpected keyword argument 'periods'"),
        ("GRU", {"peephole": True}, TypeError, "unexpected keyword argument 'peephole'"),
        ("LSTM", {"reset_after": False}, TypeError, "unexpected keyword argument 'reset_after'"),
        ("RNN", {"periods": (1, 2, 4)}, ValueError, "a hidden_size that is a multiple of 3, got 8"),
        ("RNN", {"periods": (0, 2)}, ValueError, "1 or more each"),
        ("RNN", {"periods": (1.0, 2)}, TypeError, "whole numbers"),
        ("RNN", {"periods": ()}, ValueError, "one or more"),
        ("LSTM", {"peephole": True, "checkpoint": 4}, ValueError, "checkpoint=4 does not go with peephole"),
    ],
)
def test_bad_options(class_name, options, error, message):
    with pytest.raises(error, match=message):
        getattr(fastrnn, class_name)(FEATURES, HIDDEN, **options)


def test_bad_calls():
    module = fastrnn.LSTM(FEATURES, HIDDEN, layer_norm=True)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\)"):
        module(torch.randn(STEPS, BATCH, FEATURES + 1))
    with pytest.raises(ValueError, match=r"layer_norm=True: this needs an input of torch.nn's ordinary form"):
        module(torch.randn(STEPS, 0, FEATURES))
    with pytest.raises(ValueError, match="does not go with layer_norm"):
        module.checkpoint = 3
    module = fastrnn.LSTM(FEATURES, HIDDEN, residual=True, weight_dropout=0.5, checkpoint=3, num_layers=2)
    x = torch.randn(STEPS, BATCH, FEATURES)
    gradients = []
    for module.checkpoint in (3, None):
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(module(x)[0].sum(), list(module.parameters())))
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair)


def keras_layer(class_name, weights, x, reset_after=True):
    """Keras's SimpleRNN, GRU or LSTM as its documentation has it: x (T, B, I) to outputs (T, B, H)."""
    kernel, recurrent_kernel, *bias = weights
    size, h = len(recurrent_kernel), torch.zeros(x.shape[1], len(recurrent_kernel), dtype=x.dtype)
    bias = bias[0] if bias else torch.zeros((2, 3 * size) if class_name == "GRU" and reset_after else kernel.shape[1])
    c, outputs = h, []
    for row in x:
        if class_name == "RNN":
            h = (row @ kernel + bias + h @ recurrent_kernel).tanh()
        elif class_name == "LSTM":
            i, f, g, o = (row @ kernel + h @ recurrent_kernel + bias).split(size, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            input_bias, recurrent_bias = bias if reset_after else (bias, 0 * bias)
            x_z, x_r, x_h = (row @ kernel + input_bias).split(size, -1)
            u_z, u_r, u_h = (h @ recurrent_kernel + recurrent_bias).split(size, -1)
            z, r = (x_z + u_z).sigmoid(), (x_r + u_r).sigmoid()
            u_h = r * u_h if reset_after else (r * h) @ recurrent_kernel[:, 2 * size :]
            h = z * h + (1 - z) * (x_h + u_h).tanh()
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("class_name", "options"),
    [("RNN", {}), ("LSTM", {}), ("GRU", {}), ("GRU", {"reset_after": False})],
)
def test_keras_weights(class_name, options, bias):
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[class_name] * HIDDEN
    layer = getattr(fastrnn, class_name)(
        FEATURES, HIDDEN, bidirectional=True, bias=bias, dtype=torch.float64, **options
    )
    x, expected = torch.randn(STEPS, BATCH, FEATURES, dtype=torch.float64), []
    for reverse in (False, True):
        of_bias = (2, gates) if class_name == "GRU" and not options else (gates,)
        shapes = [(FEATURES, gates), (HIDDEN, gates), *[of_bias] * bias]
        weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        fastrnn.load_keras_weights(layer, [weight.numpy() for weight in weights], reverse=reverse)
        walk = x.flip(0) if reverse else x
        outputs = keras_layer(class_name, weights, walk, options.get("reset_after", True))
        expected.append(outputs.flip(0) if reverse else outputs)
    torch.testing.assert_close(layer(x)[0], torch.cat(expected, -1), rtol=0, atol=AGREEMENT)


def test_bad_keras_weights():
    gru = fastrnn.GRU(FEATURES, HIDDEN)
    weights = [torch.zeros(FEATURES, 24), torch.zeros(HIDDEN, 24), torch.zeros(24)]
    with pytest.raises(ValueError, match="a Keras GRU with reset_after=False, make the module so too"):
        fastrnn.load_keras_weights(gru, weights)
    with pytest.raises(ValueError, match="kernel, recurrent kernel and bias, got 2 arrays"):
        fastrnn.load_keras_weights(gru, weights[:2])
    with pytest.raises(ValueError, match="has no layer 1"):
        fastrnn.load_keras_weights(gru, weights, layer=1)
    with pytest.raises(ValueError, match="has no layer 0 in the reverse direction"):
        fastrnn.load_keras_weights(gru, weights, reverse=True)
    with pytest.raises(ValueError, match="the module has proj_size=2"):
        fastrnn.load_keras_weights(fastrnn.LSTM(FEATURES, HIDDEN, proj_size=2), weights)
    with pytest.raises(TypeError, match="got Linear"):
        fastrnn.load_keras_weights(nn.Linear(2, 2), weights)
