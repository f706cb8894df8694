"""camel-ai's Workforce with one of our servers in all roles; run by test_workforce.py with camel's own Python.

    python workforce.py URL KEY MODEL {held,free}

`held`: each role answers in camel's own form, narrowed to the workers and tasks that there are. `free`: the coordinator
names whomever it likes, as camel's schema allows, and the first review finds fault without a remedy (a null strategy);
camel has to recover. Prints a line of JSON.
"""

import json
import re
import sys
from typing import Annotated
from typing import Literal

from camel.agents import ChatAgent
from camel.models import OpenAICompatibleModel
from camel.societies.workforce import Workforce
from camel.societies.workforce.utils import FailureHandlingConfig
from camel.societies.workforce.utils import TaskAnalysisResult
from camel.societies.workforce.utils import TaskAssignment
from camel.societies.workforce.utils import TaskAssignResult
from camel.societies.workforce.utils import TaskResult
from camel.societies.workforce.utils import WorkerConf
from camel.tasks import Task
from camel.utils import BaseTokenCounter
from pydantic import BaseModel
from pydantic import Field
from pydantic import create_model

ASKED: list[str] = []
WORKERS: list[str] = []


class Letters(BaseTokenCounter):
    """Tokens by the letter; the exact ones would be downloaded."""

    def count_tokens_from_messages(self, messages):
        return sum(len(str(message)) for message in messages) // 4

    def encode(self, text):
        return list(text.encode())

    def decode(self, token_ids):
        return bytes(token_ids).decode()


class Plan(BaseModel):
    tasks: list[Annotated[str, Field(min_length=5, max_length=40)]] = Field(min_length=2, max_length=2)


class ShortPlan(Plan):
    tasks: list[Annotated[str, Field(min_length=5, max_length=40)]] = Field(min_length=1, max_length=1)


class Result(TaskResult):
    content: str = Field(max_length=40)
    failed: Literal[False]


class Analysis(TaskAnalysisResult):
    reasoning: str = Field(max_length=40)
    issues: list[str] = Field(max_length=0)
    recovery_strategy: None
    modified_task_content: None
    quality_score: int = Field(ge=80, le=100)


class Complaint(Analysis):
    quality_score: int = Field(ge=0, le=20)


class Conf(WorkerConf):
    role: str = Field(max_length=20)
    sys_msg: str = Field(max_length=40)
    description: str = Field(max_length=40)


def assignments(text: str, held: bool) -> type[TaskAssignResult]:
    """Camel's form of assignments for the tasks of this prompt, one each."""
    tasks = list(dict.fromkeys(re.findall(r"Task ID: (\S+)", text)))
    fields = {"task_id": (Literal[tuple(tasks)], ...), "dependencies": (list[str], Field(max_length=0))}
    names = (Literal[tuple(WORKERS)], ...) if held else (str, Field(max_length=20))
    one = create_model("One", __base__=TaskAssignment, assignee_id=names, **fields)
    many = (list[one], Field(min_length=len(tasks), max_length=len(tasks)))
    return create_model("Assignments", __base__=TaskAssignResult, assignments=many)


class Held(OpenAICompatibleModel):
    """Narrows what an answer may be."""

    held = True

    def _form(self, messages, response_format):
        text = str(messages[-1]["content"])
        name = "Plan" if response_format is None else response_format.__name__
        ASKED.append(name)
        if response_format is TaskAssignResult:
            return assignments(text, self.held)
        review = Complaint if not self.held and ASKED.count(name) == 1 else Analysis
        plan = Plan if self.held else ShortPlan
        return {TaskResult: Result, TaskAnalysisResult: review, WorkerConf: Conf, None: plan}[response_format]

    def _told(self, answer, response_format):
        if response_format is None:  # a plan, as camel reads it
            message = answer.choices[0].message
            written = "".join(
                f"<task>{task.strip() or 'Answer.'}</task>" for task in json.loads(message.content)["tasks"]
            )
            message.content = f"<tasks>{written}</tasks>"
        return answer

    def _run(self, messages, response_format=None, tools=None):
        answer = super()._run(messages, self._form(messages, response_format), tools)
        return self._told(answer, response_format)

    async def _arun(self, messages, response_format=None, tools=None):
        answer = await super()._arun(messages, self._form(messages, response_format), tools)
        return self._told(answer, response_format)


def main(url: str, key: str, name: str, kind: str) -> None:
    Held.held = kind == "held"
    config = {"temperature": 0.7, "max_tokens": 200, "seed": 1}

    def agent(text: str) -> ChatAgent:
        model = Held(name, model_config_dict=config, api_key=key, url=url, token_counter=Letters(), timeout=600)
        return ChatAgent(text, model=model)

    force = Workforce(
        "a team",
        coordinator_agent=agent("You coordinate."),
        task_agent=agent("You plan."),
        new_worker_agent=agent("You work."),
        graceful_shutdown_timeout=1,
        use_structured_output_handler=False,
        failure_handling_config=FailureHandlingConfig(max_retries=3),
        task_timeout_seconds=600,
    )
    force.add_single_agent_worker("adds numbers", worker=agent("You add."))
    force.add_single_agent_worker("writes sentences", worker=agent("You write."))
    WORKERS[:] = [child.node_id for child in force._children]
    task = force.process_task(Task(content="What is 2 + 2? Say it in a sentence.", id="0"))
    found = {"state": str(task.state), "result": task.result, "asked": ASKED, "workers": len(force._children)}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
