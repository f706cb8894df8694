"""Bounds of LLM reinforcement learning as pure functions: what a theorem promises, next to what a sample shows."""

from jaxrl_llm.bounds.inputs import BoundInputs as BoundInputs
from jaxrl_llm.bounds.inputs import bound_inputs_from_scalars as bound_inputs_from_scalars
from jaxrl_llm.bounds.inputs import bound_inputs_from_tokens as bound_inputs_from_tokens
from jaxrl_llm.bounds.inputs import tv_bound_from_kl as tv_bound_from_kl
from jaxrl_llm.bounds.inverse import largest_max_kl as largest_max_kl
from jaxrl_llm.bounds.masked_guarantee import context_mask as context_mask
from jaxrl_llm.bounds.masked_guarantee import context_masked_inputs as context_masked_inputs
from jaxrl_llm.bounds.masked_guarantee import masked_gain_lower_bound as masked_gain_lower_bound
from jaxrl_llm.bounds.masked_guarantee import sampled_context_masked_gain as sampled_context_masked_gain
from jaxrl_llm.bounds.masked_guarantee import sampled_hit_probability as sampled_hit_probability
from jaxrl_llm.bounds.sampled import Estimate as Estimate
from jaxrl_llm.bounds.sampled import clustered_mean as clustered_mean
from jaxrl_llm.bounds.sampled import sampled_gain as sampled_gain
from jaxrl_llm.bounds.sampled import sampled_sequence_tv as sampled_sequence_tv
from jaxrl_llm.bounds.sampled import sampled_sequence_tv_one_sided as sampled_sequence_tv_one_sided
from jaxrl_llm.bounds.sampled import sampled_surrogate_error as sampled_surrogate_error
from jaxrl_llm.bounds.sampled import sampled_surrogate_gain as sampled_surrogate_gain
from jaxrl_llm.bounds.surrogate_error import BOUND_NAMES as BOUND_NAMES
from jaxrl_llm.bounds.surrogate_error import PRINTED as PRINTED
from jaxrl_llm.bounds.surrogate_error import SHARP as SHARP
from jaxrl_llm.bounds.surrogate_error import SurrogateErrorBounds as SurrogateErrorBounds
from jaxrl_llm.bounds.surrogate_error import surrogate_error_bounds as surrogate_error_bounds
from jaxrl_llm.bounds.surrogate_error import trivial_error_bound as trivial_error_bound
