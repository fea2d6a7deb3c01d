"""A gated MLP that computes so many tokens at a time, for long texts: `compute_mlps_in_parts`.

Of a part backward keeps the input alone, and computes the rest again. So gate(x), up(x) and their product are in memory
for one part, not for all tokens. Each part dequantizes packed weights again.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules import seeds
from modules.adapters.state import state_of
from modules.fused.mlp import FusedMLP


class ChunkedMLP(FusedMLP):
    """A FusedMLP, `tokens` tokens at a time."""

    def __init__(self, fused: FusedMLP, tokens: int):
        self.__dict__.update(vars(fused))  # and own_class stays the model's own
        self.__dict__["tokens"] = tokens

    def forward(self, x: Tensor) -> Tensor:
        whole = super().forward
        parts = x.flatten(0, -2).split(self.tokens)  # not slices, whose gradients would each be as large as x
        if len(parts) == 1:
            return whole(x)
        again = torch.is_grad_enabled()
        about = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": seeds.kept}
        done = [checkpoint(whole, part, **about) if again else whole(part) for part in parts]
        return torch.cat(done).view(x.shape)

    def own(self) -> nn.Module:
        own = super().own()
        del own.__dict__["tokens"]
        return own


def compute_mlps_in_parts(model: nn.Module, tokens: int) -> list[str]:
    """Have the gated MLPs of a fused `model` compute `tokens` tokens at a time, in place. `unfuse` undoes it.

    Results and gradients are the same up to rounding. Names, parameters and state dicts stay what they are.

    Returns:
        The full names of these MLPs: none if `fuse` found no MLP of gate, up and down projections.
    """
    state = state_of(model)
    adapted = {} if state is None else state.base
    replaced, chunked = [], {}  # by identity: a module may be there twice
    for prefix, parent in list(model.named_modules()):
        for name, module in list(parent._modules.items()):
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(module, FusedMLP) and path not in adapted:
                setattr(parent, name, chunked.setdefault(module, ChunkedMLP(module, tokens)))
                replaced.append(path)
    return replaced
