"""Many Python threads at once, forked children, and another number of threads: right results and no hang."""

import multiprocessing
import os
import queue
import threading
import traceback

import pytest
import torch
from helpers import CELL_CLASSES, LAYER_CLASSES, make_pair, random_packed, run, tensors_in
from torch.utils.data import DataLoader, Dataset

import fastrnn

# Seconds after which a thread or a child counts as hung; compiling a kernel takes part of it.
PATIENCE = 120

everything = pytest.mark.parametrize("class_name", LAYER_CLASSES + CELL_CLASSES)
layers = pytest.mark.parametrize("class_name", LAYER_CLASSES)


def module_and_input(class_name, seed=0, batch=19, hidden=33, packed=False):
    ours, _ = make_pair(class_name, 8, hidden, seed=seed)
    if packed:
        return ours, random_packed(batch, 12, 8, torch.float32, seed)
    shape = (batch, 8) if class_name in CELL_CLASSES else (12, batch, 8)
    return ours, torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_bits(results, expected):
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


def forward_and_backward(module, input):
    """Output and gradients by the numba backend, without the random generator that all threads share."""
    with fastrnn.use_backend("numba"):
        output = next(tensors_in(module(input)))
        gradients = torch.autograd.grad(output.square().sum(), list(module.parameters()))
    names = [name for name, _ in module.named_parameters()]
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


# Threads


def run_in_threads(work, count):
    """Runs work(index) in `count` threads that start together; raises what any of them raised."""
    barrier, failures = threading.Barrier(count), queue.Queue()

    def body(index):
        try:
            barrier.wait(PATIENCE)
            work(index)
        except BaseException:
            failures.put(traceback.format_exc())

    threads = [threading.Thread(target=body, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    assert failures.empty(), failures.get()


@everything
def test_threads_that_share_a_module(class_name):
    module, _ = module_and_input(class_name)
    inputs = [module_and_input(class_name, seed)[1] for seed in range(8)]
    expected = [forward_and_backward(module, input) for input in inputs]

    def work(index):
        for _ in range(10):
            assert_same_bits(forward_and_backward(module, inputs[index]), expected[index])

    run_in_threads(work, len(inputs))


def test_threads_with_modules_of_all_kinds():
    cases = [module_and_input(name, hidden=7 + 5 * i, batch=3 + 8 * i) for i, name in enumerate(LAYER_CLASSES)]
    cases += [module_and_input(name, packed=True) for name in LAYER_CLASSES]
    cases += [module_and_input(name) for name in CELL_CLASSES]
    expected = [forward_and_backward(*case) for case in cases]

    def work(index):
        for turn in range(12):
            which = (index + turn) % len(cases)
            assert_same_bits(forward_and_backward(*cases[which]), expected[which])

    run_in_threads(work, 6)


def test_threads_that_make_the_first_call_of_a_process():
    """Compilation, the reading of the cache and the start of the thread pool, all at once."""
    run_child(first_calls_in_threads, method="spawn")


def first_calls_in_threads():
    cases = [module_and_input(name, seed) for seed in range(2) for name in LAYER_CLASSES]
    results = [None] * len(cases)

    def work(index):
        results[index] = forward_and_backward(*cases[index])

    run_in_threads(work, len(cases))
    for case, result in zip(cases, results, strict=True):
        assert_same_bits(forward_and_backward(*case), result)


def test_the_choice_of_a_backend_belongs_to_its_thread():
    """Else two threads that leave in the order in which they came would leave a choice behind for good."""
    module, input = module_and_input("GRU")
    inside, done = threading.Event(), threading.Event()

    def other():
        with fastrnn.use_backend("reference"):
            inside.set()
            done.wait(PATIENCE)

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    assert inside.wait(PATIENCE)
    try:
        assert {layer.backend for layer in fastrnn.explain(module, input).layers} == {"numba"}
    finally:
        done.set()
        thread.join(PATIENCE)


# Forked and spawned children


def run_child(work, *arguments, method="fork"):
    """Runs `work` in a child process; fails with its traceback, or if it does not end in time."""
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    child = context.Process(target=answer, args=(answers, work, arguments), daemon=True)
    child.start()
    child.join(PATIENCE)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail("the child hangs")
    assert child.exitcode == 0, f"the child ended with {child.exitcode}"
    problem = answers.get()
    assert problem is None, problem


def answer(answers, work, arguments):
    try:
        work(*arguments)
        answers.put(None)
    except BaseException:
        answers.put(traceback.format_exc())


def check_again(module, input, expected):
    # A child may run torch's matrix products on fewer threads than its parent: close, not the same bits.
    for _ in range(3):
        torch.testing.assert_close(forward_and_backward(module, input), expected)


@layers
def test_a_forked_child_goes_on(class_name):
    module, input = module_and_input(class_name)
    expected = forward_and_backward(module, input)
    run_child(check_again, module, input, expected)
    # And so does the parent.
    check_again(module, input, expected)


def test_a_forked_child_may_meet_a_kernel_first():
    module, input = module_and_input("LSTM")
    forward_and_backward(module, input)
    other, packed = module_and_input("GRU", packed=True)
    run_child(check_again, other, packed, forward_and_backward(other, packed))
    run_child(first_call_in_float64)


def first_call_in_float64():
    module, input = module_and_input("RNN")
    with fastrnn.use_backend("numba"):
        mine = run(module.double(), input.double())
    with fastrnn.use_backend("reference"):
        reference = run(module, input.double())
    for name, value in reference.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-10, atol=1e-10)


def test_threads_in_a_forked_child():
    module, input = module_and_input("LSTM")
    expected = forward_and_backward(module, input)

    def in_threads():
        run_in_threads(lambda index: check_again(module, input, expected), 4)

    run_child(in_threads)


def test_a_fork_while_other_threads_compute():
    module, input = module_and_input("GRU")
    expected = forward_and_backward(module, input)
    stop, failures = threading.Event(), queue.Queue()

    def busy():
        try:
            while not stop.is_set():
                assert_same_bits(forward_and_backward(module, input), expected)
        except BaseException:
            failures.put(traceback.format_exc())

    threads = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            run_child(check_again, module, input, expected)
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert failures.empty(), failures.get()


def test_a_child_of_a_forked_child():
    module, input = module_and_input("RNN")
    expected = forward_and_backward(module, input)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    # A daemonic process may have no children, so that this one is none.
    child = context.Process(target=answer, args=(answers, fork_again, (module, input, expected)))
    child.start()
    child.join(PATIENCE)
    if child.is_alive():
        child.kill()
        pytest.fail("the child hangs")
    assert child.exitcode == 0
    assert answers.get() is None


def fork_again(module, input, expected):
    check_again(module, input, expected)
    run_child(check_again, module, input, expected)


class Encoded(Dataset):
    """A dataset that runs a recurrent layer, as those do that extract features on the fly."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 12

    def __getitem__(self, index):
        input = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(index))
        with torch.no_grad(), fastrnn.use_backend("numba"):
            return self.module(input)[0], os.getpid()


@layers
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(class_name, method):
    module, input = module_and_input(class_name)
    forward_and_backward(module, input)
    dataset = Encoded(module)
    expected = torch.stack([dataset[index][0] for index in range(len(dataset))])
    loader = DataLoader(dataset, batch_size=3, num_workers=2, multiprocessing_context=method, timeout=PATIENCE)
    batches, processes = zip(*loader, strict=True)
    torch.testing.assert_close(torch.cat(batches), expected)
    workers = set(torch.cat(processes).tolist())
    assert len(workers) == 2
    assert os.getpid() not in workers


# The number of threads


@pytest.fixture
def restored_thread_count():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@everything
def test_any_number_of_threads(class_name, restored_thread_count):
    module, input = module_and_input(class_name, batch=97)
    module, input = module.double(), input.double()
    torch.set_num_threads(1)
    expected = forward_and_backward(module, input)
    for count in (2, 5, 1, 3):
        torch.set_num_threads(count)
        results = forward_and_backward(module, input)
        torch.testing.assert_close(results, expected)
        assert_same_bits(forward_and_backward(module, input), results)
        assert torch.get_num_threads() == count


def test_threads_that_each_choose_a_number_of_threads(restored_thread_count):
    module, input = module_and_input("LSTM", batch=97)
    module, input = module.double(), input.double()
    expected = forward_and_backward(module, input)

    def work(index):
        torch.set_num_threads(1 + index)
        for _ in range(10):
            torch.testing.assert_close(forward_and_backward(module, input), expected)

    run_in_threads(work, 4)


@layers
def test_backward_in_another_thread_than_forward(class_name):
    module, input = module_and_input(class_name)
    expected = forward_and_backward(module, input)
    with fastrnn.use_backend("numba"):
        output, _ = module(input)
    run_in_threads(lambda _: output.square().sum().backward(), 1)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
