from jaxrl_llm.workforce.questions.questions import Question as Question
from jaxrl_llm.workforce.questions.questions import Questions as Questions
