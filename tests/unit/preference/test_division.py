"""Which of the divisions that fit is chosen."""

import pytest

from alignment.preference.division import Division, Wish, fastest, hiding_tokens, relative_cost

LLAMA_8B = {"layers": 32, "parameters": 8_030_000_000}
LLAMA_1B = {"layers": 16, "parameters": 1_500_000_000}
FREE = Wish(None, None)


def memory(room: float, recomputed: float = 0.25, kept: float = 4.0):
    """Room for tokens that each take `recomputed` with every layer recomputed, `kept` with none; as `largest` asks for it."""
    return lambda layers: lambda count: int(room / (kept + (recomputed - kept) * count / layers))


def chosen(
    room: float, wish: Wish = FREE, model=LLAMA_8B, *, longest: int = 1500, step_tokens: int = 100_000
) -> Division | None:
    return fastest(memory(room)(model["layers"]), wish, **model, longest=longest, step_tokens=step_tokens)


def test_with_room_for_all_nothing_is_recomputed_and_a_micro_batch_is_as_large_as_brings_something():
    assert chosen(1e9) == Division(round(8 * hiding_tokens(**LLAMA_8B)), 0)
    assert 8_000 < chosen(1e9).max_tokens < 16_000
    assert chosen(1e9, model=LLAMA_1B).max_tokens > 30_000


def test_no_micro_batch_is_larger_than_the_step_or_smaller_than_the_longest_pair():
    assert chosen(1e9, step_tokens=5000).max_tokens == 5000
    assert chosen(1e9, longest=40_000, step_tokens=5000).max_tokens == 40_000


@pytest.mark.parametrize("room", [400, 1000, 5000, 16_000, 30_000, 60_000])
def test_what_is_chosen_fits_and_no_other_that_fits_is_faster(room):
    layers = LLAMA_8B["layers"]
    division = chosen(room)
    largest = memory(room)(layers)
    assert division.max_tokens <= largest(division.recompute_layers)
    cost = relative_cost(division, layers, hiding_tokens(**LLAMA_8B))
    for count in range(layers + 1):
        if largest(count) >= 1500:
            other = Division(min(largest(count), round(8 * hiding_tokens(**LLAMA_8B))), count)
            assert relative_cost(other, layers, hiding_tokens(**LLAMA_8B)) >= cost


def test_less_room_recomputes_more_before_micro_batches_become_too_small():
    tight, wide = chosen(4000), chosen(30_000)
    assert tight.recompute_layers > wide.recompute_layers


def test_where_not_even_the_longest_pair_fits_there_is_no_division():
    assert chosen(100) is None


def test_what_the_recipe_says_stays():
    assert chosen(1e9, Wish(4096, None)) == Division(4096, 0)
    assert chosen(1e9, Wish(None, 32)).recompute_layers == 32
    assert chosen(3000, Wish(4096, None)).recompute_layers > 20
    assert chosen(900, Wish(4096, None)) is None
