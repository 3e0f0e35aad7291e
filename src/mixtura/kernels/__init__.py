"""How the experts are computed: the reference (the definition) and fast torch paths of equal outputs and gradients.

`layers` calls the functions named here and nothing else; the kernels decide what runs, by device and dtype.
"""

from mixtura.kernels.choosing import order_by_expert as order_by_expert
from mixtura.kernels.choosing import top_k as top_k
from mixtura.kernels.dense import batched_ffn as batched_ffn
from mixtura.kernels.dense import mix as mix
from mixtura.kernels.dense import mixed_ffn as mixed_ffn
from mixtura.kernels.dense import scaled_ffn as scaled_ffn
from mixtura.kernels.dense import spread as spread
from mixtura.kernels.device import logits_mixed_ffn as logits_mixed_ffn
from mixtura.kernels.device import sort_choices as sort_choices
from mixtura.kernels.device import sorts_choices as sorts_choices
from mixtura.kernels.device import takes_groups as takes_groups
from mixtura.kernels.few import apart_ffn as apart_ffn
from mixtura.kernels.few import are_few as are_few
from mixtura.kernels.few import few_ffn as few_ffn
from mixtura.kernels.native import takes as takes
from mixtura.kernels.sparse import sparse_ffn as sparse_ffn
