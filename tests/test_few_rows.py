"""Products of a few rows: equal to plain ones whatever the numbers of rows, and rows never reach another's result."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.few_rows import (
    SLAB,
    batch_height,
    batched_product,
    few_rows_grouped_product,
    few_rows_product,
    narrow_product,
)


def plain(x_RK: Tensor, weight_ENK: Tensor, counts: list[int]) -> Tensor:
    starts = [0, *accumulate(counts)]
    return torch.cat([x_RK[starts[e] : starts[e + 1]] @ weight_ENK[e].t() for e in range(len(counts))])


@settings(deadline=None, max_examples=60)
@given(counts=st.lists(st.integers(0, 3 * SLAB), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_grouped_products_of_any_numbers_of_rows(counts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(sum(counts), 24).double(), torch.randn(len(counts), 16, 24).double()
    torch.testing.assert_close(few_rows_grouped_product(x, weight, counts), plain(x, weight, counts))
    single = few_rows_grouped_product(x.float(), weight.float(), counts)
    torch.testing.assert_close(single.double(), plain(x, weight, counts), rtol=1e-4, atol=1e-4)


def test_experts_with_more_rows_than_a_slab_are_left_over() -> None:
    counts = [1, SLAB + 3, 0, SLAB]
    x, weight = torch.randn(sum(counts), 8), torch.randn(4, 6, 8)
    out, missing = batched_product(x, weight, counts, SLAB)
    assert missing == [(1, slice(1 + SLAB, 1 + SLAB + 3))]
    done = [row for row in range(len(x)) if row not in range(1 + SLAB, 1 + SLAB + 3)]
    torch.testing.assert_close(out[done], plain(x, weight, counts)[done])


def test_the_height_of_a_batch_is_bounded_by_the_mean() -> None:
    assert batch_height([1, 0, 9, 2]) == SLAB
    assert batch_height([7, 5, 6, 6]) == 8
    assert batch_height([0, 0, 0, 40]) == 20


@pytest.mark.parametrize("counts", [[1, 1, 1, 1] + [0] * 12, [0, 0], [9, 10, 8, 30], [300, 1]], ids=str)
def test_few_experts_none_and_many_rows(counts: list[int]) -> None:
    x, weight = torch.randn(sum(counts), 8).double(), torch.randn(len(counts), 6, 8).double()
    torch.testing.assert_close(few_rows_grouped_product(x, weight, counts), plain(x, weight, counts))
    across = weight.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(few_rows_grouped_product(x, across, counts), plain(x, weight, counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_dense_products(rows: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, 48).to(dtype), torch.randn(33, 48).to(dtype)
    out = few_rows_product(x, weight)
    assert out.is_contiguous()
    tolerance = 0.3 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.double(), x.double() @ weight.double().t(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_row_is_split_over_the_threads(threads: int) -> None:
    before = torch.get_num_threads()
    x, weight = torch.randn(1, 48).double(), torch.randn(34, 48).double()
    try:
        torch.set_num_threads(threads)
        torch.testing.assert_close(narrow_product(x, weight), x @ weight.t())
    finally:
        torch.set_num_threads(before)


def test_a_row_s_result_does_not_depend_on_what_is_in_other_rows() -> None:
    counts, weight = [2, 1, SLAB + 2, 1], torch.randn(4, 16, 24)
    x = torch.randn(sum(counts), 24)
    first = few_rows_grouped_product(x, weight, counts)
    x[1:] = float("nan")
    torch.testing.assert_close(few_rows_grouped_product(x, weight, counts)[0], first[0], rtol=0, atol=0)
