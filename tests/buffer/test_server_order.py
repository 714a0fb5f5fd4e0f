"""The order of servers against a search through all of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from buffer.tables.server_order import FRONT, Place, ServerOrder

NAMES = ("a", "b", "c", "d")
changes = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.none() | st.tuples(st.integers(-1, 4), st.integers(0, 2), st.booleans()),
    ),
    max_size=30,
)
needs = st.dictionaries(st.integers(0, 3), st.integers(1, 5), max_size=3)
places = st.just(FRONT) | st.tuples(st.integers(-5, 0), st.sampled_from(NAMES))


@given(changes, needs, places)
def test_the_first_server_is_that_of_a_search_through_all(
    made: list[tuple[str, tuple[int, int, bool] | None]], needed: dict[int, int], after: Place
) -> None:
    order, model = ServerOrder(), {}
    for name, server in made:
        if server is None:
            order.remove(name)
            model.pop(name, None)
        else:
            free, version, is_idle = model[name] = server
            order.put(name, free_samples=free, weights_version=version, is_idle=is_idle)
    with_credit = {name: server for name, server in model.items() if server[0] > 0}
    assert set(order.versions) == {version for _, version, _ in with_credit.values()}
    able = [
        (-free, name)
        for name, (free, version, is_idle) in with_credit.items()
        if version in needed and (is_idle or free >= needed[version]) and (-free, name) > after
    ]
    assert order.first(after, needed) == min(able, default=None)
