"""Objectives of LLM reinforcement learning as pure functions on plain arrays."""

from jaxrl_llm.objectives import advantages as advantages
from jaxrl_llm.objectives import aggregation as aggregation
from jaxrl_llm.objectives import corrections as corrections
from jaxrl_llm.objectives import divergence_augmented as divergence_augmented
from jaxrl_llm.objectives import divergences as divergences
from jaxrl_llm.objectives import hybrid as hybrid
from jaxrl_llm.objectives import masks as masks
from jaxrl_llm.objectives import modulation as modulation
from jaxrl_llm.objectives import pruning as pruning
from jaxrl_llm.objectives import ratios as ratios
from jaxrl_llm.objectives import surrogates as surrogates
from jaxrl_llm.objectives import token_baseline as token_baseline
from jaxrl_llm.objectives.policy_loss import LossTerms as LossTerms
from jaxrl_llm.objectives.policy_loss import policy_loss as policy_loss
from jaxrl_llm.objectives.policy_loss import policy_weights as policy_weights
from jaxrl_llm.objectives.policy_loss import token_losses as token_losses
from jaxrl_llm.objectives.recipes import RECIPES as RECIPES
from jaxrl_llm.objectives.recipes import Recipe as Recipe
from jaxrl_llm.objectives.recipes import get_recipe as get_recipe
from jaxrl_llm.objectives.recipes import loss_needs as loss_needs
from jaxrl_llm.objectives.recipes import sequence_advantages as sequence_advantages
from jaxrl_llm.objectives.signals import SIGNALS as SIGNALS
from jaxrl_llm.objectives.signals import SignalInputs as SignalInputs
from jaxrl_llm.objectives.signals import advantages_of as advantages_of
from jaxrl_llm.objectives.signals import value_targets as value_targets
