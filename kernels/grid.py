"""Sizes of grids and tiles, as the host computes them before a launch.

`triton.cdiv` and `triton.next_power_of_2` can be called in kernels too, for which they take microseconds on the host, a
few times a launch.
"""


def cdiv(n: int, size: int) -> int:
    """⌈n / size⌉: how many blocks of `size` hold n."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not less than n ≥ 1."""
    return 1 << (n - 1).bit_length()
