"""torch's own module samples and error samples, with fastrnn's classes in place of torch's."""

from functools import partial

import pytest
import torch
from helpers import (
    CELL_CLASSES,
    CPU_BACKENDS,
    LAYER_CLASSES,
    assert_same_as_torch,
    assert_same_error,
    tensors_in,
)
from torch.utils._pytree import tree_structure

import fastrnn

try:
    from torch.testing._internal.common_modules import (
        ModuleErrorEnum,
        module_db,
        module_inputs_torch_nn_RNN_GRU,
    )
finally:
    # The import forbids setting flags in torch.backends; other tests of this process may want to.
    torch.backends.__allow_nonbracketed_mutation_flag = True

SAMPLED_CLASSES = LAYER_CLASSES + CELL_CLASSES
INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in SAMPLED_CLASSES}
DTYPES = (torch.float32, torch.float64)

backends = pytest.mark.parametrize("backend", CPU_BACKENDS)
classes = pytest.mark.parametrize("class_name", SAMPLED_CLASSES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def samples_of(class_name, dtype, training, seed=0, with_packed=False):
    torch.manual_seed(seed)
    info = INFOS[class_name]
    inputs = info.module_inputs_func
    if with_packed:
        inputs = partial(module_inputs_torch_nn_RNN_GRU, is_rnn=class_name == "RNN", with_packed_sequence=True)
    return list(inputs(info, device="cpu", dtype=dtype, requires_grad=False, training=training))


def error_samples_of(class_name, dtype):
    info = INFOS[class_name]
    return list(info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=True))


def build_pair(class_name, constructor, dtype, training, seed=0):
    torch.manual_seed(seed)
    theirs = INFOS[class_name].module_cls(*constructor.args, **constructor.kwargs, dtype=dtype)
    ours = getattr(fastrnn, class_name)(*constructor.args, **constructor.kwargs, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(training), theirs.train(training)


def test_all_six_modules_have_samples():
    assert sorted(INFOS) == sorted(SAMPLED_CLASSES)
    for class_name in SAMPLED_CLASSES:
        assert samples_of(class_name, torch.float32, True)
        assert error_samples_of(class_name, torch.float32)


def check_against_torch(class_name, backend, dtype, training, with_packed=False):
    drawn = {}

    def make(index, seed):
        if seed not in drawn:
            drawn[seed] = samples_of(class_name, dtype, training, seed, with_packed)
        sample = drawn[seed][index]
        pair = build_pair(class_name, sample.constructor_input, dtype, training, seed)
        arguments = sample.forward_input.args
        assert not sample.forward_input.kwargs
        return *pair, arguments[0], arguments[1] if len(arguments) > 1 else None

    for index in range(len(samples_of(class_name, dtype, training, with_packed=with_packed))):
        assert_same_as_torch(partial(make, index), backend=backend)


@backends
@classes
@dtypes
@modes
def test_samples_give_torchs_outputs_and_gradients(class_name, backend, dtype, training):
    check_against_torch(class_name, backend, dtype, training)


@backends
@pytest.mark.parametrize("class_name", ["RNN", "GRU"])
@dtypes
@modes
def test_packed_samples_give_torchs_outputs_and_gradients(class_name, backend, dtype, training):
    check_against_torch(class_name, backend, dtype, training, with_packed=True)


@backends
@classes
@dtypes
@modes
def test_unbatched_samples_equal_the_reference_function(class_name, backend, dtype, training):
    """torch's samples carry a function of the module itself: unbatched input is a batch of one."""
    for sample in samples_of(class_name, dtype, training):
        ours, _ = build_pair(class_name, sample.constructor_input, dtype, training)
        with fastrnn.use_backend(backend):
            got = ours(*sample.forward_input.args)
            expected = sample.reference_fn(ours, *sample.forward_input.args)
        assert tree_structure(got) == tree_structure(expected)
        for unbatched, single in zip(tensors_in(got), tensors_in(expected), strict=True):
            assert torch.equal(unbatched, single)


@backends
@classes
@dtypes
def test_error_samples_raise_torchs_errors(class_name, backend, dtype):
    for sample in error_samples_of(class_name, dtype):
        constructor = sample.module_error_input.constructor_input
        if sample.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:

            def ours(constructor=constructor):
                return getattr(fastrnn, class_name)(*constructor.args, **constructor.kwargs)

            def theirs(constructor=constructor):
                return getattr(torch.nn, class_name)(*constructor.args, **constructor.kwargs)
        else:
            torch_module = getattr(torch.nn, class_name)(*constructor.args, **constructor.kwargs)
            our_module = getattr(fastrnn, class_name)(*constructor.args, **constructor.kwargs)
            if class_name in CELL_CLASSES:
                # The samples of cells are built for a module of the inputs' dtype.
                torch_module, our_module = torch_module.to(dtype), our_module.to(dtype)
            forward = sample.module_error_input.forward_input
            theirs = partial(torch_module, *forward.args, **forward.kwargs)
            ours = partial(our_module, *forward.args, **forward.kwargs)
        with fastrnn.use_backend(backend):
            assert_same_error(ours, theirs)
            with pytest.raises(sample.error_type, match=sample.error_regex):
                ours()
