"""The settings of a job as frozen dataclasses, one class per section.

These classes define the keys, their types, choices, ranges and defaults. Every daemon gets the same resolved
configuration. No other module states a default. `objective`, `advantage` and `task` are open mappings: the
class that each names defines and checks its keys (areal_like/registry.py).

The package imports neither hydra nor torch, because every process imports it first.
"""

from areal_like.config.buffer import BufferConfig as BufferConfig
from areal_like.config.buffer import OnFailureConfig as OnFailureConfig
from areal_like.config.distill import DistillConfig as DistillConfig
from areal_like.config.evaluation import EvalSetConfig as EvalSetConfig
from areal_like.config.job import Config as Config
from areal_like.config.job import ModelConfig as ModelConfig
from areal_like.config.loading import from_mapping as from_mapping
from areal_like.config.loading import to_mapping as to_mapping
from areal_like.config.lora import LoraConfig as LoraConfig
from areal_like.config.offline import OfflineConfig as OfflineConfig
from areal_like.config.offline import PreferencesConfig as PreferencesConfig
from areal_like.config.reward_model import RewardModelConfig as RewardModelConfig
from areal_like.config.rollout import RolloutConfig as RolloutConfig
from areal_like.config.rollout import SamplingConfig as SamplingConfig
from areal_like.config.rollout import SglangConfig as SglangConfig
from areal_like.config.security import SecurityConfig as SecurityConfig
from areal_like.config.sft import SftConfig as SftConfig
from areal_like.config.trainer import KlConfig as KlConfig
from areal_like.config.trainer import TrainerConfig as TrainerConfig
from areal_like.config.weights import WeightsConfig as WeightsConfig
