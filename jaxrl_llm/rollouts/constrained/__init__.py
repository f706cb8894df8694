from jaxrl_llm.rollouts.constrained.grammars import Grammar as Grammar
from jaxrl_llm.rollouts.constrained.token_masks import GrammarRows as GrammarRows
from jaxrl_llm.rollouts.constrained.token_masks import TokenMasker as TokenMasker
