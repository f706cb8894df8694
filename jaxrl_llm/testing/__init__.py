"""A test kit for losses of LLM reinforcement learning: it says in words what a loss gets wrong."""

from jaxrl_llm.testing.batch import Batch as Batch
from jaxrl_llm.testing.batch import example_batch as example_batch
from jaxrl_llm.testing.estimators import check_estimator as check_estimator
from jaxrl_llm.testing.estimators import examine_estimator as examine_estimator
from jaxrl_llm.testing.objective import CHECKS as CHECKS
from jaxrl_llm.testing.objective import check_objective as check_objective
from jaxrl_llm.testing.objective import examine_objective as examine_objective
from jaxrl_llm.testing.promises import Promises as Promises
from jaxrl_llm.testing.report import Finding as Finding
from jaxrl_llm.testing.report import Report as Report
