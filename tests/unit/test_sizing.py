from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.engine.sizing import MIN_CONTEXT_TOKENS, MIN_SLOTS, fit_cache
from serve.errors import ModelLoadError

GIB = 2**30


def test_cache_takes_the_default_slots_and_the_whole_context_when_there_is_room():
    size = fit_cache(bytes_per_token=1000, budget=10 * GIB, model_len=8192, default_slots=16)
    assert (size.num_slots, size.max_model_len) == (16, 8192)
    assert "16 slots x 8192 tokens x 1000 bytes" in size.reason


def test_cache_shrinks_the_context_before_the_batch_falls_below_eight():
    size = fit_cache(bytes_per_token=1000, budget=8 * 1024 * 1000, model_len=8192, default_slots=16)
    assert (size.num_slots, size.max_model_len) == (MIN_SLOTS, 1024)


@given(
    st.integers(1, 10**6),
    st.integers(0, 10**12),
    st.integers(16, 131072),
    st.integers(1, 64),
    st.none() | st.integers(1, 512),
    st.none() | st.integers(16, 131072),
)
def test_cache_fits_its_budget_and_keeps_what_is_set_or_is_refused(per_token, budget, model_len, slots, batch, context):
    size, refused = None, ""
    try:
        size = fit_cache(
            bytes_per_token=per_token,
            budget=budget,
            model_len=model_len,
            default_slots=slots,
            max_batch_size=batch,
            max_model_len=context,
        )
    except ModelLoadError as error:
        refused = error.message
    if size is None:
        smallest = (batch or 1) * (context or min(model_len, MIN_CONTEXT_TOKENS)) * per_token
        assert "at most" in refused
        assert smallest > budget, "refused although the smallest allowed cache fits"
        return
    assert size.num_slots * size.max_model_len * per_token <= budget
    assert batch is None or size.num_slots == batch
    assert context is None or size.max_model_len == context
    assert size.max_model_len <= (context or model_len)
