"""Recipes: what a run is, as frozen dataclasses read from TOML.

A recipe is one TOML file: `[data]`, `[model]`, `[training]`, `[search]` and one `[arms.NAME]` table a side of the
comparison. Every key is a field of `schema.py`; an unknown key is an error that names the nearest one. `--set a.b=c`
overrides one key. This package knows no torch: planning, layers and the command line all stand on it.
"""

from mixtura.config.arm import ArmConfig as ArmConfig
from mixtura.config.arm import InferenceMode as InferenceMode
from mixtura.config.arm import Placement as Placement
from mixtura.config.checks import check_recipe as check_recipe
from mixtura.config.families import Family as Family
from mixtura.config.initialization import starts_from_checkpoints as starts_from_checkpoints
from mixtura.config.load import PRESETS as PRESETS
from mixtura.config.load import TASKS as TASKS
from mixtura.config.load import load_recipe as load_recipe
from mixtura.config.load import preset_path as preset_path
from mixtura.config.load import recipe_from_dict as recipe_from_dict
from mixtura.config.load import recipe_to_dict as recipe_to_dict
from mixtura.config.load import recipe_to_toml as recipe_to_toml
from mixtura.config.requests import as_recipe as as_recipe
from mixtura.config.requests import data_overrides as data_overrides
from mixtura.config.requests import finetune_recipe as finetune_recipe
from mixtura.config.requests import one_arm as one_arm
from mixtura.config.requests import start_overrides as start_overrides
from mixtura.config.schema import Activation as Activation
from mixtura.config.schema import AdapterConfig as AdapterConfig
from mixtura.config.schema import AnyRecipe as AnyRecipe
from mixtura.config.schema import BaseConfig as BaseConfig
from mixtura.config.schema import ChatArmConfig as ChatArmConfig
from mixtura.config.schema import ChatDataConfig as ChatDataConfig
from mixtura.config.schema import ChatRecipe as ChatRecipe
from mixtura.config.schema import ClassificationArmConfig as ClassificationArmConfig
from mixtura.config.schema import ClassificationDataConfig as ClassificationDataConfig
from mixtura.config.schema import ClassificationRecipe as ClassificationRecipe
from mixtura.config.schema import DataConfig as DataConfig
from mixtura.config.schema import EvaluationConfig as EvaluationConfig
from mixtura.config.schema import FinetuneRecipe as FinetuneRecipe
from mixtura.config.schema import HeadConfig as HeadConfig
from mixtura.config.schema import ModelConfig as ModelConfig
from mixtura.config.schema import Recipe as Recipe
from mixtura.config.schema import SearchConfig as SearchConfig
from mixtura.config.schema import TrainingConfig as TrainingConfig
from mixtura.config.schema import TranslationArmConfig as TranslationArmConfig
from mixtura.config.schema import TranslationDataConfig as TranslationDataConfig
from mixtura.config.schema import TranslationRecipe as TranslationRecipe
from mixtura.errors import Interrupted as Interrupted
from mixtura.errors import UserError as UserError
