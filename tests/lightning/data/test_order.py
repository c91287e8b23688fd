"""Order and random numbers of an epoch: functions of seed, epoch and index; shared by ranks without overlap."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from rescompress.errors import InputError
from rescompress.lightning.data._order import EpochOrder, PlainBatches, ResumedBatches, drawn, mixed, uniform


def test_seeds_differ_in_every_part() -> None:
    indices = torch.arange(1000)
    seeds = torch.cat([mixed(seed, epoch, indices) for seed in (0, 1) for epoch in (0, 1)])

    assert len(set(seeds.tolist())) == 4000
    assert int(seeds.min()) >= 0


def test_a_seed_of_any_size_is_taken() -> None:
    assert int(mixed(2**64 - 1)) == int(mixed(-1))
    assert int(mixed(-1)) != int(mixed(1))


def test_uniform_numbers_are_uniform() -> None:
    numbers = uniform(mixed(0, torch.arange(20000)), 2)

    # The standard error of a mean is 0.002, of a share of a tenth as well.
    torch.testing.assert_close(numbers.mean(0), torch.tensor([0.5, 0.5]), atol=0.01, rtol=0)
    shares = torch.histc(numbers[:, 0], 10, 0, 1) / 20000
    torch.testing.assert_close(shares, torch.full((10,), 0.1), atol=0.01, rtol=0)
    assert abs(float(torch.corrcoef(numbers.T)[0, 1])) < 0.03


def test_drawn_numbers_repeat_and_the_global_state_stays() -> None:
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    found = []
    for _ in range(2):
        with drawn(5):
            found.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))

    assert found[0] == found[1]
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    order = EpochOrder(50, seed=1)
    first = list(order)
    order.set_epoch(1)
    second = list(order)

    assert sorted(index for index, _ in first) == list(range(50))
    assert [index for index, _ in first] != [index for index, _ in second]
    assert not {draw for _, draw in first} & {draw for _, draw in second}


def test_the_numbers_of_a_sample_do_not_depend_on_its_place() -> None:
    shuffled = dict(EpochOrder(50, seed=1))
    in_order = dict(EpochOrder(50, seed=1, shuffle=False))

    assert shuffled == in_order


def test_batch_k_of_all_ranks_is_the_same_on_any_number_of_ranks() -> None:
    alone = list(PlainBatches(EpochOrder(50, seed=1), 8))
    ranks = [list(PlainBatches(EpochOrder(50, seed=1, rank=rank, world=2), 4)) for rank in range(2)]

    for number in range(6):
        together = {key for rank in ranks for key in rank[number]}
        assert together == set(alone[number])
    assert [len(rank) for rank in ranks] == [6, 6]


@pytest.mark.parametrize(("length", "world", "batch_size"), [(10, 1, 4), (17, 2, 8), (16, 3, 5), (7, 3, 2)])
def test_evaluation_takes_each_sample_once_in_as_many_batches_on_every_rank(
    length: int, world: int, batch_size: int
) -> None:
    ranks = [
        list(PlainBatches(EpochOrder(length, training=False, rank=rank, world=world), batch_size))
        for rank in range(world)
    ]

    indices = sorted(index for rank in ranks for batch in rank for (index, _), _ in batch)
    assert indices == list(range(length))
    assert len({len(rank) for rank in ranks}) == 1
    assert all(1 <= len(batch) <= batch_size for rank in ranks for batch in rank)


def test_evaluation_in_batches_of_one_takes_each_sample_once_as_well() -> None:
    ranks = [list(PlainBatches(EpochOrder(5, training=False, rank=rank, world=4), 1)) for rank in range(4)]

    assert sorted(index for rank in ranks for batch in rank for (index, _), _ in batch) == [0, 1, 2, 3, 4]
    assert [len(rank) for rank in ranks] == [2, 1, 1, 1]


def test_too_few_samples_for_a_batch_on_each_rank_are_told() -> None:
    with pytest.raises(InputError, match=r"7 images do not give each of 2 process\(es\) a batch of 4"):
        PlainBatches(EpochOrder(7, world=2), 4)


def test_skipped_batches_leave_the_rest_as_it_is() -> None:
    resumed = ResumedBatches(PlainBatches(EpochOrder(50, seed=1), 8))
    resumed.begin(3, 0)
    whole = list(resumed)
    resumed.begin(3, 4)

    assert list(resumed) == whole[4:]
    assert len(resumed) == 6
