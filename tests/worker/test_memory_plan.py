"""A device's memory is planned before it is allocated."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_agent.errors import DeviceMemoryError
from layercast_agent.worker.memory_plan import PAGE_TOKENS, plan_memory


def test_too_little_memory_names_both_sums() -> None:
    with pytest.raises(DeviceMemoryError, match=r"100 MiB.*parameters need 90 MiB.*1024 tokens 16 MiB"):
        plan_memory(
            device_bytes=100 * 2**20,
            parameter_bytes=90 * 2**20,
            kv_bytes_per_token=2**14,
            context_length_max=1024,
            batch_size_max=4,
        )


def test_too_little_memory_says_what_would_fit() -> None:
    sizes = {"kv_bytes_per_token": 2**14, "context_length_max": 1024, "batch_size_max": 4}
    with pytest.raises(DeviceMemoryError, match=r"device of 112 MiB would do, or .* at most 320 tokens here"):
        plan_memory(device_bytes=100 * 2**20, parameter_bytes=90 * 2**20, **sizes)
    with pytest.raises(DeviceMemoryError, match=r"device of 122 MiB would do, and no context fits this one"):
        plan_memory(device_bytes=100 * 2**20, parameter_bytes=99 * 2**20, **sizes)
    assert plan_memory(device_bytes=112 * 2**20, parameter_bytes=90 * 2**20, **sizes).kv_pages >= 64
    assert plan_memory(
        device_bytes=100 * 2**20, parameter_bytes=90 * 2**20, **sizes | {"context_length_max": 320}
    )


@given(
    device_mib=st.integers(1, 4096),
    parameter_mib=st.integers(0, 4096),
    kv_bytes_per_token=st.integers(64, 2**18),
    context_length_max=st.integers(1, 8192),
    batch_size_max=st.integers(1, 64),
)
def test_a_plan_fits_the_device_and_holds_one_context(
    device_mib: int, parameter_mib: int, kv_bytes_per_token: int, context_length_max: int, batch_size_max: int
) -> None:
    try:
        plan = plan_memory(
            device_bytes=device_mib * 2**20,
            parameter_bytes=parameter_mib * 2**20,
            kv_bytes_per_token=kv_bytes_per_token,
            context_length_max=context_length_max,
            batch_size_max=batch_size_max,
        )
    except DeviceMemoryError:
        return
    assert plan.total_bytes + plan.workspace_bytes <= device_mib * 2**20
    assert plan.kv_pages * PAGE_TOKENS >= context_length_max
    assert plan.kv_pages <= -(-context_length_max // PAGE_TOKENS) * batch_size_max
