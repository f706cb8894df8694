from jaxrl_llm.workforce.workers.code import ArithmeticWorker as ArithmeticWorker
from jaxrl_llm.workforce.workers.code import CodeWorker as CodeWorker
from jaxrl_llm.workforce.workers.facts import FactsWorker as FactsWorker
from jaxrl_llm.workforce.workers.files import FilesWorker as FilesWorker
from jaxrl_llm.workforce.workers.sandbox import CodeLimits as CodeLimits
from jaxrl_llm.workforce.workers.sandbox import Sandbox as Sandbox
from jaxrl_llm.workforce.workers.sandbox import SandboxError as SandboxError
from jaxrl_llm.workforce.workers.tables import TablesWorker as TablesWorker
