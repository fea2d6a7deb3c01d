"""How evenly a mixture's router spreads tokens over the experts of a layer: experts.csv.

Counted over the tokens of the held-out samples, prompts included, with the weights that the run ends with. A token that
has k experts counts k times, and a layer's shares add up to 1.
"""

COLUMNS = ("layer", "experts", "max_over_mean", "without_tokens", "shares")


def rows(counts: dict[str, list[int]]) -> list[dict]:
    """A row of COLUMNS for each layer of experts; `counts` are ExpertLoad's."""
    return [dict(zip(COLUMNS, (layer, *_of_layer(tokens)))) for layer, tokens in counts.items()]


def _of_layer(tokens: list[int]) -> tuple:
    whole = max(1, sum(tokens))
    shares = [count / whole for count in tokens]
    return len(tokens), max(shares) * len(tokens), tokens.count(0), " ".join(f"{share:.4g}" for share in shares)


def summary(layers: list[dict]) -> dict[str, float | int]:
    """For result.json: how many times its even share the busiest expert of a layer has, in the mean of the layers, and
    how many experts have no token; nothing without experts."""
    if not layers:
        return {}
    return {
        "expert_imbalance": sum(row["max_over_mean"] for row in layers) / len(layers),
        "experts_without_tokens": sum(row["without_tokens"] for row in layers),
    }
