"""The learning rate over the steps of a training."""


def learning_rate(step: int, *, base: float, final: float, warmup: int, total: int) -> float:
    """Linear warm-up from 0, then a square-root decay: the first update has learning rate 0.

    Args:
        step: number of updates before this one, at least 0.
        base: the highest learning rate, reached at step `warmup`.
        final: the learning rate from step `total` on.
        warmup: steps of the warm-up; 0: none.
        total: steps of the training.
    Source: the official code's schedule; the paper mentions only its warm-up.
    """
    if step < warmup:
        return base * step / warmup
    if step >= total:
        return final
    # final + (base - final) (1 - (s - w) / (T - w))^0.5
    return final + (base - final) * (1 - (step - warmup) / (total - warmup)) ** 0.5
