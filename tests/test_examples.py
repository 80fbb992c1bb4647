"""``examples/recurrent_ppo.py``: its maze, its rollouts in one call, and that it learns what only memory can."""

import pytest
import torch

pytest.importorskip("tqdm")

from examples import recurrent_ppo as ppo


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def options(tmp_path, *more):
    return ["--longest", "6", "--mazes", "32", "--steps", "32", "--plot", str(tmp_path / "curve.png"), *more]


def test_maze():
    maze = ppo.TMaze(3, 5, torch.Generator().manual_seed(0))
    maze.sign[:], maze.length[:] = torch.tensor([ppo.LEFT, ppo.RIGHT, ppo.LEFT]), torch.tensor([2, 2, 5])
    assert maze.observe().argmax(-1).tolist() == [0, 1, 0]
    forward, left = torch.full((3,), ppo.FORWARD), torch.full((3,), ppo.LEFT)
    reward, done, _ = maze.step(left)  # into the wall
    assert reward.tolist() == pytest.approx([-0.1] * 3) and not done.any()
    maze.step(forward)
    assert maze.observe().argmax(-1).tolist() == [2, 2, 2]
    maze.step(forward)
    assert maze.observe().argmax(-1).tolist() == [3, 3, 2]
    maze.sign[2] = ppo.RIGHT
    reward, done, right = maze.step(left)
    assert reward.tolist() == pytest.approx([1, -1, -0.1])
    assert done.tolist() == [True, True, False] and right.tolist() == [True, False, False]
    assert maze.place.tolist() == [0, 0, 2] and maze.age.tolist() == [0, 0, 4]
    for _ in range(6):
        _, done, right = maze.step(left)
    assert done[2] and not right[2]  # too old


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_the_layer_in_one_call_repeats_the_rollout(cell, tmp_path):
    parsed = ppo.parse(options(tmp_path, "--cell", cell))
    torch.manual_seed(0)
    agent = ppo.Agent(cell, 16)
    with torch.no_grad():
        agent.policy.weight.mul_(100)  # far from the same for all states
    collector = ppo.Collector(agent, parsed, torch.Generator().manual_seed(0))
    for _ in range(2):  # the second one begins in the middle of episodes
        rollout = collector.collect(parsed.steps).of(torch.arange(5, 20))
        assert 0 < rollout.begins[1:].float().mean() < 1
        hidden, _ = agent.recurrent(rollout.observations, rollout.state, resets=rollout.begins)
        logits, values = agent.heads(hidden)
        log_probs = logits.log_softmax(-1).gather(-1, rollout.actions[..., None]).squeeze(-1)
        torch.testing.assert_close(log_probs, rollout.log_probs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values, rollout.returns - rollout.advantages, rtol=1e-4, atol=1e-4)
    without = agent.recurrent(rollout.observations, rollout.state)[0]
    assert not torch.allclose(without, hidden, atol=1e-3)


def test_learns_with_memory_only(tmp_path, capsys):
    assert ppo.main(options(tmp_path, "--iterations", "150")) == 0
    assert "solved after" in capsys.readouterr().out
    assert ppo.main(options(tmp_path, "--iterations", "20", "--forget")) == 1
    assert "not solved after 20 iterations" in capsys.readouterr().out
