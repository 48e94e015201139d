"""What the tests of several processes stand on: `ranks` of tests/conftest.py."""

import time

import pytest
import torch
from torch import distributed as dist


def test_every_rank_answers(ranks):
    def check(offset):
        total = torch.tensor([float(dist.get_rank() + offset)])
        dist.all_reduce(total)
        return dist.get_rank(), dist.get_world_size(), total

    answers = ranks(4, check, 10)
    assert [answer[:2] for answer in answers] == [(rank, 4) for rank in range(4)]
    assert all(answer[2] == 46 for answer in answers)
    assert ranks(1, lambda: dist.is_initialized()) == [False]


def test_one_that_fails_takes_the_others_with_it_and_says_why(ranks):
    def check():
        if dist.get_rank() == 1:
            raise ValueError("this one")
        dist.barrier()

    with pytest.raises(pytest.fail.Exception, match=r"(?s)rank 0: .*rank 1: exit code 1.*ValueError: this one"):
        ranks(2, check)


def test_one_that_hangs_is_ended_and_shows_where(ranks):
    def check():
        if dist.get_rank() == 0:
            time.sleep(60)

    with pytest.raises(pytest.fail.Exception, match=r"(?s)rank 0: still running after 1 s.*in check"):
        ranks(2, check, seconds=1)
