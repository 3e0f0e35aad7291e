"""The Hugging Face side: importing this package teaches the Auto classes the model type `mixtura`.

It also registers `experts_implementation="mixtura"`, which other mixtures may name.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto

from mixtura.models import experts_backends
from mixtura.models.configuration_mixture import MixtureConfig as MixtureConfig
from mixtura.models.modeling_mixture import MixtureForCausalLM as MixtureForCausalLM
from mixtura.models.modeling_mixture import MixtureForSequenceClassification as MixtureForSequenceClassification
from mixtura.models.modeling_mixture import MixtureModel as MixtureModel

AutoConfig.register("mixtura", MixtureConfig)
AutoModel.register(MixtureConfig, MixtureModel)
AutoModelForCausalLM.register(MixtureConfig, MixtureForCausalLM)
AutoModelForSequenceClassification.register(MixtureConfig, MixtureForSequenceClassification)
experts_backends.register()
# The Auto classes leave these tables alone, and the Trainer reads in them whose labels to shift for label smoothing.
modeling_auto.MODEL_MAPPING_NAMES["mixtura"] = MixtureModel.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mixtura"] = MixtureForCausalLM.__name__
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["mixtura"] = MixtureForSequenceClassification.__name__
