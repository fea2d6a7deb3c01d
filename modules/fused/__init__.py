"""Have a model of transformers compute with the ops of kernels/: `fuse`, and `unfuse` to undo it.

    norms (rms_norm.py), gated MLPs (mlp.py)       modules in place of the model's own (module.py)
    gated MLPs, so many tokens at a time           for long texts (chunked.py)
    linears that read one input (joined.py)        LoRA and DoRA linears with a common group
    attention (attention.py)                       an implementation that is registered with transformers
    rotary embedding (rotary.py)                   a function in place of transformers' own

Each takes the place of the model's own code only if it computes the same. Names, parameters, buffers and state dicts
stay what they are. While torch.compile traces a model, norms, MLPs and rotary embedding are the model's own code, of
which the compiler fuses more.
"""

from modules.fused.chunked import compute_mlps_in_parts
from modules.fused.fuse import fuse, unfuse

__all__ = ["compute_mlps_in_parts", "fuse", "unfuse"]
