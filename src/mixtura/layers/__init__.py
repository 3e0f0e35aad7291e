"""Feed-forward layers of every family. They need torch alone, so a layer drops into anyone's model."""

from mixtura.layers.expert_choice import ExpertChoiceMoE as ExpertChoiceMoE
from mixtura.layers.expert_threshold import ExpertThresholdMoE as ExpertThresholdMoE
from mixtura.layers.experts import Experts as Experts
from mixtura.layers.feed_forward import DenseFFN as DenseFFN
from mixtura.layers.feed_forward import FeedForward as FeedForward
from mixtura.layers.layer_mix import LayerMix as LayerMix
from mixtura.layers.merged_experts import MergedExperts as MergedExperts
from mixtura.layers.mixture_of_tokens import MixtureOfTokens as MixtureOfTokens
from mixtura.layers.remoe import ReMoE as ReMoE
from mixtura.layers.routing import ChoiceTap as ChoiceTap
from mixtura.layers.routing import DenseRouting as DenseRouting
from mixtura.layers.routing import SparseRouting as SparseRouting
from mixtura.layers.soft import SoftMoE as SoftMoE
from mixtura.layers.statistics import RoutingStats as RoutingStats
from mixtura.layers.token_by_token import Population as Population
from mixtura.layers.token_choice import TokenChoiceMoE as TokenChoiceMoE
