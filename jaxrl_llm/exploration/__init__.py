"""Agents that explore: each is a NamedTuple of pure functions (init, act, update), to be scanned and vmapped."""

from jaxrl_llm.exploration import indices as indices
from jaxrl_llm.exploration.agent import Agent as Agent
from jaxrl_llm.exploration.agent import Bandit as Bandit
from jaxrl_llm.exploration.agent import Play as Play
from jaxrl_llm.exploration.agent import play as play
from jaxrl_llm.exploration.gaussian import Gaussian as Gaussian
from jaxrl_llm.exploration.gaussian import Hypermodel as Hypermodel
from jaxrl_llm.exploration.gaussian import hypermodel_update as hypermodel_update
from jaxrl_llm.exploration.gaussian import isotropic_prior as isotropic_prior
from jaxrl_llm.exploration.gaussian import posterior_update as posterior_update
from jaxrl_llm.exploration.indices import IndexLaw as IndexLaw
from jaxrl_llm.exploration.indices import get_law as get_law
from jaxrl_llm.exploration.indices import update_indices as update_indices
from jaxrl_llm.exploration.inputs import require_positive_definite as require_positive_definite
from jaxrl_llm.exploration.linear import ensemble_sampling as ensemble_sampling
from jaxrl_llm.exploration.linear import greedy as greedy
from jaxrl_llm.exploration.linear import hyperagent as hyperagent
from jaxrl_llm.exploration.linear import lin_ucb as lin_ucb
from jaxrl_llm.exploration.linear import thompson_sampling as thompson_sampling
