"""Tasks with verifiable answers, their splits and pass rates; bandits and finite MDPs to explore."""

from jaxrl_llm.environments.arithmetic import addition
from jaxrl_llm.environments.arithmetic import chain_sum
from jaxrl_llm.environments.arithmetic import signed_terms
from jaxrl_llm.environments.arithmetic import sum_identity
from jaxrl_llm.environments.arithmetic import worked
from jaxrl_llm.environments.crowd_ratings import fetch_vader
from jaxrl_llm.environments.crowd_ratings import vader_texts
from jaxrl_llm.environments.crowd_texts import CrowdTexts
from jaxrl_llm.environments.crowd_texts import labelled_texts
from jaxrl_llm.environments.deep_sea import DeepSea
from jaxrl_llm.environments.deep_sea import deep_sea
from jaxrl_llm.environments.generated import GeneratedTask
from jaxrl_llm.environments.generated import GenerationError
from jaxrl_llm.environments.generated import matching_places
from jaxrl_llm.environments.library import LEVELS
from jaxrl_llm.environments.library import SUM_SHOTS
from jaxrl_llm.environments.library import TASKS
from jaxrl_llm.environments.linear_bandits import LinearBandit
from jaxrl_llm.environments.linear_bandits import box_bandit
from jaxrl_llm.environments.mixture_mdps import draw_parameters
from jaxrl_llm.environments.mixture_mdps import random_mixture
from jaxrl_llm.environments.mixture_mdps import risky_mixture
from jaxrl_llm.environments.mixture_mdps import segment_atoms
from jaxrl_llm.environments.mixture_mdps import simplex_atoms
from jaxrl_llm.environments.moderation import Moderation
from jaxrl_llm.environments.moderation import lock_in_probability
from jaxrl_llm.environments.moderation import moderation
from jaxrl_llm.environments.moderation import moderation_rewards
from jaxrl_llm.environments.nonlinear_bandits import BernoulliBandit
from jaxrl_llm.environments.nonlinear_bandits import GaussianBandit
from jaxrl_llm.environments.nonlinear_bandits import neural_bandit
from jaxrl_llm.environments.nonlinear_bandits import quadratic_bandit
from jaxrl_llm.environments.nonlinear_bandits import vector_quadratic_bandit
from jaxrl_llm.environments.pass_rates import Curriculum
from jaxrl_llm.environments.pass_rates import CurriculumState
from jaxrl_llm.environments.pass_rates import PassRate
from jaxrl_llm.environments.pass_rates import pass_rate
from jaxrl_llm.environments.splits import Split
from jaxrl_llm.environments.splits import is_held_out
from jaxrl_llm.environments.splits import split
from jaxrl_llm.environments.splits import stable_key
from jaxrl_llm.environments.strings import StringTask
from jaxrl_llm.environments.tasks import Problem
from jaxrl_llm.environments.tasks import Score
from jaxrl_llm.environments.tasks import Task
from jaxrl_llm.environments.tasks import UnknownTaskError
from jaxrl_llm.environments.tasks import before_stop
from jaxrl_llm.environments.tasks import check_task
from jaxrl_llm.environments.tasks import final_answer
from jaxrl_llm.environments.tasks import get_task
from jaxrl_llm.environments.tasks import last_number
from jaxrl_llm.environments.tasks import register
from jaxrl_llm.environments.tasks import replaced_keys
from jaxrl_llm.environments.tasks import task_names
from jaxrl_llm.environments.time_limits import TimeLimitError
from jaxrl_llm.environments.time_limits import time_limit
from jaxrl_llm.environments.verifiers import Entry
from jaxrl_llm.environments.verifiers import UnsafeVerifierError

__all__ = [
    "LEVELS",
    "SUM_SHOTS",
    "TASKS",
    "BernoulliBandit",
    "CrowdTexts",
    "Curriculum",
    "CurriculumState",
    "DeepSea",
    "Entry",
    "GaussianBandit",
    "GeneratedTask",
    "GenerationError",
    "LinearBandit",
    "Moderation",
    "PassRate",
    "Problem",
    "Score",
    "Split",
    "StringTask",
    "Task",
    "TimeLimitError",
    "UnknownTaskError",
    "UnsafeVerifierError",
    "addition",
    "before_stop",
    "box_bandit",
    "chain_sum",
    "check_task",
    "deep_sea",
    "draw_parameters",
    "fetch_vader",
    "final_answer",
    "get_task",
    "is_held_out",
    "labelled_texts",
    "last_number",
    "lock_in_probability",
    "matching_places",
    "moderation",
    "moderation_rewards",
    "neural_bandit",
    "pass_rate",
    "quadratic_bandit",
    "random_mixture",
    "register",
    "replaced_keys",
    "risky_mixture",
    "segment_atoms",
    "signed_terms",
    "simplex_atoms",
    "split",
    "stable_key",
    "sum_identity",
    "task_names",
    "time_limit",
    "vader_texts",
    "vector_quadratic_bandit",
    "worked",
]
