"""Items of unlike size in bins of one capacity."""

from collections.abc import Sequence

from tmdjax.core.checks import check_count


def first_fit_decreasing(
    sizes: Sequence[int], capacity: int, *, least: int = 0, multiple_of: int = 1
) -> list[list[int]]:
    """Packs items, largest first, each into the first bin with room, or into a new one.

    The number of bins is at most 11/9 of the smallest possible one, and 2/3 of a bin
    more (as long as ``least`` and ``multiple_of`` ask for none).

    Args:
        sizes: of the items, integers >= 0, such as tokens of texts.
        capacity: of a bin, >= 1.
        least: bins that get an item each before any gets a second one.
        multiple_of: the number of bins is a multiple of this, such as the number of
            devices that share them; where items are too few, some bins are empty.

    Returns:
        Indices into ``sizes``, a list a bin. Of equal items the earlier comes first.

    Raises:
        TypeError: a size or a setting is no integer.
        ValueError: an item that no bin can hold, or a setting out of range.

    References:
        D. S. Johnson, Near-optimal bin packing algorithms, 1973 (first fit decreasing);
        G. Dosa, 2007 (the bound). AReaL packs the micro-batches of an update so.
    """
    check_count("capacity", capacity)
    check_count("least", least, 0)
    check_count("multiple_of", multiple_of)
    for i, size in enumerate(sizes):
        if check_count(f"sizes[{i}]", size, 0) > capacity:
            raise ValueError(
                f"sizes[{i}]={size} is above capacity={capacity}, that of a bin; raise "
                f"the capacity, or leave the item out."
            )
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])

    def packed(least: int) -> list[list[int]]:
        bins: list[list[int]] = [[i] for i in order[:least]]
        used = [sizes[i] for i in order[:least]]
        for i in order[least:]:
            row = next(
                (r for r, u in enumerate(used) if u + sizes[i] <= capacity), None
            )
            if row is None:
                row = len(bins)
                bins.append([])
                used.append(0)
            bins[row].append(i)
            used[row] += sizes[i]
        return bins

    bins = packed(least)
    if missing := -len(bins) % multiple_of:
        bins = packed(len(bins) + missing)
    return bins + [[] for _ in range(-len(bins) % multiple_of)]
