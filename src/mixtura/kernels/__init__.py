"""How the experts are computed: the reference (the definition) and fast torch paths of equal outputs and gradients.

`layers` calls the functions named here and nothing else; the kernels decide what runs, by device and dtype.
"""

from mixtura.kernels.accelerator import can_run_groups as can_run_groups
from mixtura.kernels.accelerator import can_sort_choices as can_sort_choices
from mixtura.kernels.accelerator import logits_mixed_ffn as logits_mixed_ffn
from mixtura.kernels.accelerator import sort_choices as sort_choices
from mixtura.kernels.dispatch import chosen_ffn as chosen_ffn
from mixtura.kernels.dispatch import first_real_rows as first_real_rows
from mixtura.kernels.dispatch import must_not_wait as must_not_wait
from mixtura.kernels.dispatch import order_by_expert as order_by_expert
from mixtura.kernels.dispatch import routed_ffn as routed_ffn
from mixtura.kernels.dispatch import rows_by_expert as rows_by_expert
from mixtura.kernels.dispatch import top_k as top_k
from mixtura.kernels.exchange import ExpertExchange as ExpertExchange
from mixtura.kernels.expert_weights import ExpertWeights as ExpertWeights
from mixtura.kernels.mixing import batched_ffn as batched_ffn
from mixtura.kernels.mixing import merged_experts as merged_experts
from mixtura.kernels.mixing import mix as mix
from mixtura.kernels.mixing import mixed_ffn as mixed_ffn
from mixtura.kernels.mixing import scaled_ffn as scaled_ffn
from mixtura.kernels.mixing import spread as spread
from mixtura.kernels.small_batch import can_run_token_by_token as can_run_token_by_token
from mixtura.kernels.small_batch import is_small_batch as is_small_batch
from mixtura.kernels.small_batch import small_batch_ffn as small_batch_ffn
from mixtura.kernels.small_batch import token_by_token_ffn as token_by_token_ffn
from mixtura.kernels.small_batch import token_choice_ffn as token_choice_ffn
from mixtura.kernels.sparse import sparse_ffn as sparse_ffn
